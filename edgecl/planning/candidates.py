"""What may learn behind a cut: methods, the tensors that they train, and the codecs of their replay rows."""

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from edgecl.codecs import CODECS
from edgecl.learner import Learner
from edgecl.methods import METHODS
from edgecl.methods._suffix import NORMS, SuffixLearner
from edgecl.planning.latents import At, specs_of
from edgecl.planning.space import Depth, place_text
from edgecl_device.errors import InputError


@dataclass(frozen=True)
class Candidate:
    """One learner that could be proposed.

    Attributes:
        at: Its depth.
        method: Its method.
        config: Its hyperparameters.
        trains: Which tensors of the network it trains, in words; empty for methods that train none.
    """

    at: At
    method: str
    config: Any
    trains: str = ""

    def learner(self, depth: Depth) -> Learner:
        """The method at its depth.

        Raises:
            InputError: when it cannot work there.
        """
        kind = METHODS[self.method]
        extra: dict[str, Any] = {"suffix": depth.suffix} if issubclass(kind, SuffixLearner) else {}
        return kind(depth.problem, self.config, **extra)

    @property
    def sizes_memory(self) -> bool:
        """Whether its configuration says how large its replay memory is."""
        return hasattr(self.config, "capacity_bytes")

    @property
    def codec(self) -> str:
        """The codec of its replay rows in words; empty without one.

        >>> Candidate("a", "latent_replay", METHODS["latent_replay"].Config(codec="packed")).codec
        'packed, 4 bits'
        """
        name = getattr(self.config, "codec", "")
        details = {"packed": ("bits", "bits"), "pq": ("subquantizers", "bytes a position")}
        field, words = details.get(name, ("", ""))
        return f"{name}, {getattr(self.config, field)} {words}" if field else name

    @property
    def family(self) -> tuple[At, str, str]:
        """What candidates have in common that differ in the codec alone."""
        return self.at, self.method, self.trains

    def words(self) -> str:
        """In a few words.

        >>> Candidate(("a", "b"), "slda", None).words()
        'slda at a,b'
        """
        details = [detail for detail in (self.trains, self.codec) if detail]
        return ", ".join([f"{self.method} at {place_text(self.at)}", *details])


_ALL_CODECS = ("codec", "bits", "subquantizers", "centroids")
"""What a method takes whose rows may be of any codec."""


def default_configs(names: tuple[str, ...] = ()) -> dict[str, Any]:
    """The defaults of methods that learn one class a sample on the device; of all by default.

    Raises:
        InputError: when there is no such method, or it learns nothing on the device, or no classes.

    >>> sorted(default_configs(("ncm", "slda")))
    ['ncm', 'slda']
    """
    known = {name: kind for name, kind in METHODS.items() if not kind.host_only and hasattr(kind, "learn") and "class" in kind.targets}
    for name in names:
        if name not in known:
            raise InputError(f"--method: must be among {', '.join(known)}, which learn one class a sample on the device, got {name!r}")
    return {name: known[name].Config() for name in names or known}


def candidates(depth: Depth, configs: Mapping[str, Any], *, calibrated: bool = True) -> list[Candidate]:
    """Every learner to try at one depth; of those that differ in the codec alone, the method's own codec comes first.

    Args:
        depth: The place.
        configs: Hyperparameters of each method to try; of these ``trainable`` and, of methods that take every one, ``codec`` are the
            planner's to choose where they have their default, and ``capacity_bytes`` always.
        calibrated: Whether there are base samples, which a codec is fitted to.
    """
    found = []
    for method, config in configs.items():
        default, trains = METHODS[method].Config(), {"": dict[str, Any]()}
        if issubclass(METHODS[method], SuffixLearner):
            if depth.suffix is None:
                continue
            groups = trainable_groups(depth.suffix) if getattr(config, "trainable", ()) is None else {"as given": ()}
            trains = {words: {"trainable": patterns} if patterns != () else {} for words, patterns in groups.items()}
        chooses = all(hasattr(config, name) for name in _ALL_CODECS) and config.codec == default.codec
        codecs = codec_choices(depth, config, calibrated) if chooses else [{}]
        for (words, tensors), codec in itertools.product(trains.items(), codecs):
            found.append(Candidate(depth.at, method, dataclasses.replace(config, **tensors, **codec), words))
    return found


def codec_choices(depth: Depth, config: Any, calibrated: bool) -> list[dict[str, Any]]:
    """Hyperparameters of each codec, the configuration's own first; without base samples of the one that needs none."""
    if not calibrated:
        return [{"codec": "float32"}]
    channels = [spec.shape[1] for spec in specs_of(depth.problem.features).values()]
    wanted = getattr(config, "subquantizers", 1)
    parts = max(m for m in range(1, wanted + 1) if all(count % m == 0 for count in channels))
    extra = {"pq": {"subquantizers": parts}}
    return [{"codec": name, **extra.get(name, {})} for name in sorted(CODECS, key=lambda name: name != config.codec)]


def trainable_groups(suffix: nn.Module) -> dict[str, tuple[str, ...] | None]:
    """Sets of trained tensors: all but norms, the head, and the head with the layer before it; patterns as ``trainable`` takes them.

    >>> groups = trainable_groups(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)))
    >>> groups["whole suffix"], groups["head"]
    (None, ('4.weight', '4.bias'))
    """
    layers: list[tuple[str, ...]] = []
    for path, module in suffix.named_modules():
        own = tuple(f"{path}.{name}" if path else name for name, _ in module.named_parameters(recurse=False))
        if own and not isinstance(module, NORMS):
            layers.append(own)
    found: dict[str, tuple[str, ...] | None] = {"whole suffix": None}
    if len(layers) > 1:
        found["head"] = layers[-1]
    if len(layers) > 2:
        found["last 2 layers"] = layers[-2] + layers[-1]
    return found
