"""The configuration of a run: a TOML file, checked whole before anything runs. docs/run.md is its reference."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from edgecl.backbones import BACKBONES
from edgecl.graph.rules import RULES
from edgecl.methods import METHODS
from edgecl.options import parse_bytes
from edgecl.preprocess import ImageU8
from edgecl.pretraining import Recipe
from edgecl.runs.errors import checked, choice
from edgecl.runs.methods import method_config
from edgecl.runs.registry import DATASETS, SCENARIOS, check_options, dataset_options
from edgecl_device.checks import as_path, short
from edgecl_device.errors import InputError
from edgecl_device.manifest import DEFAULT_PENDING

MOST_SEEDS = 100


def _nbytes(value: Any) -> int:
    if isinstance(value, str):
        try:
            return parse_bytes("bytes", value)
        except InputError:
            pass
    elif type(value) is int and value >= 0:
        return value
    raise ValueError(f"must be bytes, as '64MiB', '500KB' or 1048576, got {short(value)}")


def _name(value: str) -> str:
    """A label is part of a path, beside the network's files, and of a table."""
    special = not value.isprintable() or any(c in value for c in '/\\:*?"<>|')
    if not value.strip() or len(value) > 60 or special or value.strip(". ") != value:
        raise ValueError(f"must be 1 to 60 characters of which none is special in a file name, got {short(value)}")
    if value.casefold().startswith("network."):
        raise ValueError(f"must not start as the network's files beside it do, got {value!r}")
    return value


Bytes = Annotated[int, BeforeValidator(_nbytes)]
Label = Annotated[str, AfterValidator(_name)]


class Section(BaseModel):
    """A table of the file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(BaseModel):
    """``[data]``: the data set. Its other keys are the options of the data set's loader."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="the data set's name")


class Scenario(BaseModel):
    """``[scenario]``: the order in which the learner meets the samples. Its other keys are the options of the scenario."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str = Field(description="the scenario's name")


class Preprocess(Section):
    """``[model.preprocess]``: uint8 images are normalised in the graph; without it samples go to the model as they are."""

    layout: Literal["HWC", "CHW", "HW"] = Field(description="the axes of one image")
    mean: list[float] = Field(min_length=1, description="the mean of each channel, on the scale 0 to 1")
    std: list[float] = Field(min_length=1, description="the standard deviation of each channel, on the scale 0 to 1")
    size: list[int] | None = Field(
        default=None, min_length=2, max_length=2, description="the height and width to resize to, bilinear; as it is by default"
    )


class Pretrain(Section):
    """``[model.pretrain]``: train the whole network on the base set first, once a seed; without it the network stays as it is."""

    epochs: int = Field(default=Recipe.epochs, ge=1, description="the number of passes over the base set")
    batch: int = Field(default=Recipe.batch, ge=2, le=1 << 20, description="the number of samples a step")
    lr: float = Field(default=Recipe.lr, gt=0, lt=1e3, description="the highest learning rate of the one cycle")
    weight_decay: float = Field(default=Recipe.weight_decay, ge=0, lt=1e3, description="AdamW's decoupled weight decay")
    device: str = Field(default="cpu", description="PyTorch's device to train on, as 'cuda'")
    threads: int = Field(default=1, ge=1, le=256, description="the number of PyTorch's threads; the last bits depend on it")

    def recipe(self) -> Recipe:
        """How to train."""
        return Recipe(self.epochs, self.batch, self.lr, self.weight_decay)


class Model(Section):
    """``[model]``: the network that is cut into a frozen trunk and a suffix."""

    name: str = Field(description=f"a backbone ({', '.join(BACKBONES)}), or file.py:function that returns an nn.Module")
    weights: Path | None = Field(default=None, description="a file of weights, .pth, .th or .safetensors")
    classes: int | None = Field(
        default=None, ge=2, le=1 << 20, description="the classes to have room for; those of the data set by default"
    )
    weights_classes: int | None = Field(
        default=None,
        ge=1,
        le=1 << 20,
        description="the number of classes that a backbone's weights were trained on, where not classes; its head is widened",
    )
    preprocess: Preprocess | None = Field(default=None, description="the normalisation of uint8 images")
    pretrain: Pretrain | None = Field(default=None, description="the training on the base set")


class LearnerConfig(Section):
    """``[learner]``, or one of several ``[[learner]]``: what learns on the device."""

    label: Label | None = Field(default=None, description="what the learner is called in tables; the method by default")
    method: str = Field(default="ridge", description="a method, see edgecl methods")
    at: str = Field(description="the last module of the frozen trunk, or several, as a,b; edgecl profile MODEL lists the places")
    config: dict[str, Any] = Field(default_factory=dict, description="a table of the method's hyperparameters")
    trunk_dtype: Literal["int8"] | None = Field(
        default=None, description="int8 for a frozen trunk in integers, calibrated on the base set; float32 by default"
    )


class Budget(Section):
    """``[budget]``: what every learner must keep to; checked on the graphs before anything runs."""

    beyond_trunk: Bytes | None = Field(default=None, description="the most bytes of state and replay rows, in bytes or as '64KiB'")
    ram: Bytes = Field(
        default=128 << 20,
        description="the most bytes of RAM, as edgecl plan --ram counts it",
    )
    update_macs: int | None = Field(default=None, ge=0, description="the most multiply-accumulates of one update, without the trunk")


class Device(Section):
    """``[device]``: how the stream is run on the device's runtime."""

    engine: str = Field(default="onnx", description=f"the runtime, {' or '.join(RULES)}")
    store: bool = Field(
        default=True, description="whether the learner keeps a crash-safe store; without one an interrupted stream starts again"
    )
    pending: int = Field(
        default=DEFAULT_PENDING, ge=1, le=1 << 20, description="the number of predictions that may wait for a delayed label"
    )
    every: int = Field(default=50, ge=1, description="the number of samples between two tests along the stream")
    test_samples: int | None = Field(default=None, ge=1, description="the most test samples of a task, one fixed subset; all by default")
    omega_all: bool = Field(
        default=False, description="whether joint is trained anew after every task, too: what omega_all of the others at its place takes"
    )
    seeds: list[Annotated[int, Field(ge=0, lt=1 << 32)]] = Field(
        default=[0],
        min_length=1,
        max_length=MOST_SEEDS,
        description="a list of seeds: of initial weights, pretraining and the order of the stream",
    )


class Report(Section):
    """``[report]``: how the result is shown; may change without a new run."""

    title: str | None = Field(default=None, max_length=200, description="the page's title")


class RunConfig(Section):
    """The whole file."""

    data: Data = Field(description="the table that names the data set")
    scenario: Scenario = Field(description="the table that names the scenario")
    model: Model = Field(description="the table that describes the network")
    learner: list[LearnerConfig] = Field(min_length=1, description="a table [learner], or several [[learner]]")
    budget: Budget = Field(default_factory=Budget, description="the table of limits")
    device: Device = Field(default_factory=Device, description="the table of the device run")
    report: Report = Field(default_factory=Report, description="the table of the report")
    _folder: Path = PrivateAttr(Path())

    @property
    def folder(self) -> Path:
        """The file's folder, which relative paths start from."""
        return self._folder

    @property
    def files(self) -> dict[str, Path]:
        """The user's files that make the network, by key."""
        model = self.model
        given = {"model.weights": model.weights, "model.name": model.name.rpartition(":")[0] if ".py:" in model.name else None}
        return {name: self.folder / path for name, path in given.items() if path}

    @property
    def labels(self) -> list[str]:
        """What each learner is called."""
        return [learner.label or learner.method for learner in self.learner]

    def preprocess(self) -> ImageU8 | None:
        """The normalisation that becomes part of the trunk."""
        found = self.model.preprocess
        try:
            return None if found is None else ImageU8(found.mean, found.std, found.layout, found.size)
        except InputError as error:
            raise InputError(f"model.preprocess.{error}") from error

    def dataset_options(self) -> dict[str, Any]:
        """Keyword arguments of the data set's loader."""
        return dataset_options(self.data.name, self.data.model_extra or {}, self.folder)

    def scenario_options(self) -> dict[str, Any]:
        """Keyword arguments of the scenario."""
        return check_options("scenario", SCENARIOS[self.scenario.name], self.scenario.model_extra or {}, self.folder)


def read_config(path: Path) -> RunConfig:
    """Read and check a configuration.

    Raises:
        InputError: when the file is missing or no TOML, or a value does not fit; everything wrong in one section is named at once.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"CONFIG: {path} cannot be read ({getattr(error, 'strerror', None) or error}); name a TOML file") from error
    except (ValueError, RecursionError) as error:  # beside TOML's own: a number of too many digits, tables too deep in each other
        raise InputError(f"CONFIG: {path} must be TOML, got a mistake ({error}); mend that line") from error
    return parse(values, path.resolve().parent)


def parse(values: dict[str, Any], folder: Path) -> RunConfig:
    """Check a configuration's values; relative paths start from ``folder``.

    Raises:
        InputError: as :func:`read_config`.
    """
    learner = values.get("learner")
    if isinstance(learner, dict):
        values = {**values, "learner": [learner]}
    config = checked(RunConfig, values)
    config._folder = folder
    _check_names(config)
    joint = {entry.at for entry in config.learner if entry.method == "joint"}
    if config.device.omega_all and all(entry.method == "joint" or entry.at not in joint for entry in config.learner):
        raise InputError(
            "device.omega_all: must be false without a learner of method joint at another one's place, got true; add one with its at"
        )
    config.preprocess()
    config.dataset_options()
    config.scenario_options()
    for i, entry in enumerate(config.learner):
        method_config(f"learner[{i}].config", entry.method, entry.config)
    folded = [label.casefold() for label in config.labels]  # a folder each, also where file names have no case
    for name in (label for label in config.labels if folded.count(label.casefold()) > 1):
        raise InputError(f"learner.label: must differ between learners, got {name!r} twice; give each [[learner]] a label of its own")
    if len(set(config.device.seeds)) < len(config.device.seeds):
        raise InputError(f"device.seeds: must be different numbers, got {config.device.seeds}; drop one")
    return config


def _check_names(config: RunConfig) -> None:
    known: dict[str, tuple[str, Any]] = {
        "data.name": (config.data.name, DATASETS),
        "scenario.name": (config.scenario.name, SCENARIOS),
        "device.engine": (config.device.engine, RULES),
        **{f"learner[{i}].method": (entry.method, METHODS) for i, entry in enumerate(config.learner)},
    }
    if ".py:" not in config.model.name:
        known["model.name"] = (config.model.name, [*BACKBONES, "file.py:function"])
    for where, (value, names) in known.items():
        if value not in names or value == "file.py:function":
            raise choice(where, value, names)
    for where, file in config.files.items():
        if not as_path(where, file).is_file():
            raise InputError(f"{where}: must be an existing file, got {file}; mend the path, which starts from that of CONFIG")
