"""Every wrong value of a configuration is one error that names the key, the constraint, the value and the mend."""

import dataclasses
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from edgecl import cli
from edgecl.backbones import BACKBONES
from edgecl.methods import METHODS
from edgecl.pretraining import Recipe, train
from edgecl.runs import RunConfig, read_config, registry
from edgecl.runs.config import parse
from edgecl.runs.registry import DATASETS, SCENARIOS, options_of
from edgecl_device.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
GOOD = """
[data]
name = "fashion-mnist-subset"
[scenario]
name = "class-incremental"
base_classes = [0, 1]
steps = [[2]]
[model]
name = "small_cnn"
[learner]
at = "pool"
[device]
seeds = [0]
[budget]
ram = "1MiB"
"""

WRONG = {
    "a section that there is none of": (
        "[budget]",
        "[bugdet]",
        "configuration: keys must be among data, scenario",
        "the nearest is 'budget'",
    ),
    "an unknown key": ("seeds =", "evry = 5\nseeds =", "device: keys must be among engine", "got 'evry'; the nearest is 'every'"),
    "a missing key": (
        'at = "pool"',
        'method = "ncm"',
        "learner[0].at: must be given, got nothing",
        "edgecl profile MODEL lists the places",
    ),
    "a missing section": ('[model]\nname = "small_cnn"', "", "model: must be given, got nothing", "the network"),
    "a number as text": ("seeds = [0]", 'seeds = ["0"]', "device.seeds[0]: must be a valid integer, got '0'", ""),
    "a number below the least": (
        "seeds = [0]",
        "every = 0",
        "device.every: must be greater than or equal to 1, got 0",
        "between two tests",
    ),
    "an empty list": ("seeds = [0]", "seeds = []", "device.seeds: ", "got []"),
    "a seed twice": ("seeds = [0]", "seeds = [1, 1]", "device.seeds: must be different numbers, got [1, 1]", "drop one"),
    "no size in bytes": ('ram = "1MiB"', 'ram = "much"', "budget.ram: must be bytes, as '64MiB', '500KB' or 1048576, got 'much'", ""),
    "no data set": (
        "fashion-mnist-subset",
        "fashion-mnits",
        "data.name: must be one of ",
        "got 'fashion-mnits'; the nearest is 'fashion-mnist'",
    ),
    "no scenario": ("class-incremental", "clas-incremental", "scenario.name: must be one of ", "the nearest is 'class-incremental'"),
    "no method": ('at = "pool"', 'at = "pool"\nmethod = "rigde"', "learner[0].method: must be one of ", "the nearest is 'ridge'"),
    "no backbone": ('"small_cnn"', '"smal_cnn"', "model.name: must be one of small_cnn, ", "the nearest is 'small_cnn'"),
    "no file of a model": ('"small_cnn"', '"gone.py:build"', "model.name: must be an existing file, got ", "gone.py"),
    "no file of weights": ('"small_cnn"', '"small_cnn"\nweights = "gone.pth"', "model.weights: must be an existing file, got ", "gone.pth"),
    "classes of weights beyond the most": (
        '"small_cnn"',
        f'"small_cnn"\nweights_classes = {10**30}',
        "model.weights_classes: must be less than or equal to 1048576, got 1000",
        "",
    ),
    "a file name that is too long": (
        '"small_cnn"',
        f'"small_cnn"\nweights = "{"w" * 300}"',
        "model.weights: must be a path, got ",
        "name too long",
    ),
    "no engine": ("seeds = [0]", 'engine = "onxx"', "device.engine: must be one of ", "the nearest is 'onnx'"),
    "no option of the scenario": (
        "steps = [[2]]",
        "steps = [[2]]\nordered = true",
        "scenario: keys must be among base_classes, steps",
        "'ordered'",
    ),
    "a missing option": ("steps = [[2]]", "", "scenario.steps: must be given, got nothing", ""),
    "an option of another type": ("steps = [[2]]", "steps = [2]", "scenario.steps[0]: ", "got 2"),
    "no option of the data": ('subset"\n', 'subset"\nfolder = "x"\n', "data: keys must be among (none), got 'folder'; leave it out", ""),
    "no download": (
        'subset"\n',
        'subset"\ndownload = true\n',
        "data.download: must be true or false, and is for fashion-mnist, ",
        "give its files",
    ),
    "no hyperparameter": (
        'at = "pool"',
        'at = "pool"\nconfig = { gama = 1.0 }',
        "learner[0].config: keys must be among gamma",
        "nearest is 'gamma'",
    ),
    "a hyperparameter out of range": (
        'at = "pool"',
        'at = "pool"\nconfig = { gamma = -1.0 }',
        "learner[0].config.gamma: must be ",
        "got -1.0",
    ),
    "a label that is a path": ('at = "pool"', 'at = "pool"\nlabel = "../x"', "learner[0].label: must be 1 to 60 characters", "got '../x'"),
    "a label with a control character": (
        'at = "pool"',
        'at = "pool"\nlabel = "a\\u0000b"',
        "learner[0].label: must be 1 to 60",
        "'a\\x00b'",
    ),
    "a label that is a file of the network": (
        'at = "pool"',
        'at = "pool"\nlabel = "network.pth"',
        "learner[0].label: must not start as the network's files",
        "'network.pth'",
    ),
    "a date as text": ('"small_cnn"', "2026-01-01", "model.name: must be a valid string, got {'date or time': '2026-01-01'}", "a backbone"),
    "a date as a hyperparameter": (
        'at = "pool"',
        'at = "pool"\nconfig = { dtype = 10:00:00 }',
        "learner[0].config.dtype: must be of type str, got {'date or time': '10:00:00'}",
        "",
    ),
    "a path of another type": (
        'name = "fashion-mnist-subset"',
        'name = "windows"\npath = 3',
        "data.path: must be a valid string, got 3",
        "",
    ),
    "a number too large for float32": (
        'at = "pool"',
        'at = "pool"\nmethod = "ridge"\nconfig = { gamma = 1e300 }',
        "learner[0].config.gamma: must be at most 3.4e+38",
        "got 1e+300",
    ),
    "a number of too many digits": ("seeds = [0]", f"seeds = [{'9' * 5000}]", "CONFIG: ", "must be TOML, got a mistake"),
    "a normalisation of two lengths": (
        'name = "small_cnn"',
        'name = "small_cnn"\npreprocess = { layout = "HW", mean = [0.5], std = [0.5, 0.5] }',
        "model.preprocess.mean, std: must have one value for each channel, got 1 and 2",
        "",
    ),
    "a size that is none": (
        'name = "small_cnn"',
        'name = "small_cnn"\npreprocess = { layout = "HW", mean = [0.5], std = [0.5], size = [0, 8] }',
        "model.preprocess.size: must be a height and a width",
        "got [0, 8]",
    ),
    "lists too deep in each other": ("seeds = [0]", f"seeds = {'[' * 50000}", "CONFIG: ", "must be TOML, got a mistake"),
    "no TOML": ("[model]", "[model", "CONFIG: ", "must be TOML, got a mistake"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_one_error(tmp_path, name):
    old, new, start, end = WRONG[name]
    assert GOOD.count(old) == 1
    path = tmp_path / "run.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(InputError) as error:
        read_config(path)
    assert str(error.value).startswith(start) and end in str(error.value)
    assert "\n" not in str(error.value) and "pydantic" not in str(error.value)


def test_every_wrong_value_is_named_at_once(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(GOOD.replace("seeds = [0]", "every = 0\nstore = 1").replace('"1MiB"', "-1"))
    with pytest.raises(InputError) as error:
        read_config(path)
    assert all(f"{key}: must be " in str(error.value) for key in ("budget.ram", "device.every", "device.store"))


def test_two_learners_of_one_name_are_refused():
    values = tomllib.loads(GOOD)
    values["learner"] = [{"at": "pool"}, {"at": "block3"}]
    with pytest.raises(InputError, match="must differ between learners, got 'ridge' twice"):
        parse(values, ROOT)


def test_two_learners_that_differ_in_case_alone_are_refused():
    values = tomllib.loads(GOOD)
    values["learner"] = [{"at": "pool", "label": "A"}, {"at": "block3", "label": "a"}]
    with pytest.raises(InputError, match="must differ between learners, got 'A' twice"):
        parse(values, ROOT)


def test_values_as_they_are_meant(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("\ufeff" + GOOD.replace('at = "pool"', 'at = "pool"\nconfig = { gamma = 2 }'))
    config = read_config(path)
    assert config.labels == ["ridge"] and config.budget.ram == 1 << 20 and config.folder == tmp_path
    assert config.scenario_options() == {"base_classes": [0, 1], "steps": [[2]]}


def test_paths_start_from_the_file_and_downloads_have_none(tmp_path):
    values = tomllib.loads(GOOD)
    found = parse({**values, "data": {"name": "cifar10", "folder": "bin"}}, tmp_path).dataset_options()
    assert found == {"folder": tmp_path / "bin"}
    assert parse({**values, "data": {"name": "cifar10", "download": True}}, tmp_path).dataset_options() == {"folder": None}
    with pytest.raises(InputError, match=r"data\.folder: must not be given beside download = true"):
        parse({**values, "data": {"name": "cifar10", "download": True, "folder": "bin"}}, tmp_path)


def test_a_download_is_fetched_by_its_public_name(monkeypatch):
    asked = []
    monkeypatch.setattr(registry, "fetch", lambda name: asked.append(name) or "cache")
    source = dataclasses.replace(DATASETS["fsdd"], load=lambda folder, mels: (folder, mels))
    monkeypatch.setitem(DATASETS, "fsdd", source)
    assert registry.load("fsdd", {"folder": None, "mels": 20}) == ("cache", 20) and asked == ["fsdd"]


def test_the_example_is_written_once_and_is_good(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "--init"]) == 0
    assert capsys.readouterr().out == "Wrote run.toml. Run it with: edgecl run run.toml\n"
    config = read_config(Path("run.toml"))
    assert config.labels == ["frozen", "fine-tuning", "ridge", "latent replay", "joint"]
    assert cli.main(["run", "--init"]) == 2 and "run.toml exists" in capsys.readouterr().err
    assert cli.main(["run"]) == 2 and "edgecl run --init" in capsys.readouterr().err


def sections(model: type[BaseModel], path: str = ""):
    """Every key of the configuration with its model's field, by section."""
    for name, field in model.model_fields.items():
        kinds = [kind for kind in (field.annotation, *getattr(field.annotation, "__args__", ())) if isinstance(kind, type)]
        inner = next((kind for kind in kinds if issubclass(kind, BaseModel)), None)
        if inner is None:
            yield path, name, field
        else:
            yield from sections(inner, f"{path}.{name}" if path else name)


def test_the_page_describes_every_key():
    page = (ROOT / "docs" / "run.md").read_text(encoding="utf-8")
    rows = {}
    for heading, body in re.findall(r"^### `\[\[?([\w.]+)\]\]?`.*?\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL):
        for name, default, text in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", body, re.MULTILINE):
            if name not in {**DATASETS, **SCENARIOS}:  # which have tables of their own
                rows[heading, name] = default, text
    expected = {}
    for path, name, field in sections(RunConfig):
        default = (
            "required" if field.is_required() else "" if field.default is None else f"`{field.get_default(call_default_factory=True)}`"
        )
        expected[path, name] = default.replace("`None`", ""), field.description
    assert rows == expected
    for names in (DATASETS, SCENARIOS):
        assert [name for name in names if f"| `{name}` |" not in page] == []
    for source in DATASETS.values():
        assert all(f"`{name}`" in page for name in options_of(source.load))
    assert all(f"`{name}`" in page for scenario in SCENARIOS.values() for name in options_of(scenario))
    assert set(BACKBONES) <= set(re.findall(r"\w+", page)) and METHODS


@pytest.mark.parametrize("device", ["meta", "gpu", ""])
def test_a_device_that_cannot_train_is_refused(device):
    x, y = np.zeros((4, 2), np.float32), np.array([0, 1, 0, 1])
    with pytest.raises(InputError, match="device: must be a device that PyTorch has here"):
        train(torch.nn.Linear(2, 2), x, y, preprocess=None, recipe=Recipe(), generator=torch.Generator(), device=device)


def test_a_network_with_fewer_outputs_than_classes_is_refused():
    x, settings = np.zeros((4, 2), np.float32), {"preprocess": None, "recipe": Recipe(), "generator": torch.Generator(), "device": "cpu"}
    with pytest.raises(InputError, match=r"^model: must return a score for each class, 4 of them, got 2; give it such a head"):
        train(torch.nn.Linear(2, 2), x, np.arange(4), **settings)
    maps = np.arange(4)[:, None, None] * np.ones((1, 3, 3), np.int64)
    with pytest.raises(InputError, match=r"^model: must return a score for each class, 4 of them, got 2"):
        train(torch.nn.Conv2d(2, 2, 1), np.zeros((4, 2, 3, 3), np.float32), maps, **settings, kind="map")
