"""What a plan is made for, from the configuration of a run: network, samples, scenario, and the methods with their hyperparameters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from edgecl.planning.candidates import default_configs
from edgecl.planning.data import validation_split
from edgecl.planning.space import Network
from edgecl.runs.config import RunConfig
from edgecl.runs.methods import method_config
from edgecl.runs.model import check_preprocess, check_pretraining, trained
from edgecl.runs.registry import load, make_stream
from edgecl.streams import Dataset, Stream
from edgecl_device.errors import InputError


@dataclass(frozen=True, eq=False)
class Source:
    """A network and the user's data.

    Attributes:
        network: To be cut.
        data: Training samples, and held-out ones in place of the test samples.
        scenario: The stream of a data set for a stream order.
    """

    network: Network
    data: Dataset
    scenario: Callable[[Dataset, int], Stream]


def source_of(config: RunConfig, samples: int, progress: Callable[[str, int, int], None]) -> Source:
    """Load the data, hold samples out, build the network, and pretrain it where the configuration says so, without those held out.

    Args:
        config: Its learners, budget and tests are not looked at.
        samples: Most samples in use; a quarter of them is held out.
        progress: Called with what runs.

    Raises:
        InputError: when a part does not fit.
        WeightsError: when weights do not fit.
    """
    seed, options = config.device.seeds[0], config.scenario_options()

    def scenario(data: Dataset, order: int) -> Stream:
        return make_stream(config.scenario.name, options, data, seed + order)

    progress("loading the data", 0, 1)
    loaded = load(config.data.name, config.dataset_options())
    if loaded.kind != "class":
        raise InputError(
            f"data: must have one class a sample to plan with, got targets of kind {loaded.kind}; compare learners by edgecl run"
        )
    data = validation_split(loaded, samples, seed)
    stream = scenario(data, 0)
    check_preprocess(config, data)
    check_pretraining(config, stream)
    progress("building the network" + (", pretraining" if config.model.pretrain else ""), 0, 1)
    net = trained(config, data, stream, seed).eval()
    classes = config.model.classes or len(data.class_names)
    return Source(Network(net, config.preprocess(), data.x[:1], classes), data, scenario)


def configs_of(config: RunConfig, methods: Sequence[str] = ()) -> dict[str, Any]:
    """Hyperparameters of each method: those of its first learner in the configuration, else the defaults.

    Args:
        config: Its learners.
        methods: Methods to try; all that learn on the device by default.

    Raises:
        InputError: when there is no such method.
    """
    found = default_configs(tuple(dict.fromkeys(methods)))
    given: dict[str, Any] = {}
    for entry in config.learner:
        if entry.method in found:
            given.setdefault(entry.method, method_config(f"learner.{entry.method}.config", entry.method, entry.config))
    return {**found, **given}
