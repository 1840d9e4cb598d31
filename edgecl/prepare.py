"""From a PyTorch model to a learner that is ready for export: split, choose a method, take in base samples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgecl.engine import on_device, parts_on, running_on, to_arrays
from edgecl.fidelity import check_gradients, check_values
from edgecl.given import NAMES, Samples, check_device, check_independent, check_like, check_names, plain_samples, sample_weights
from edgecl.int8 import check_trunk_dtype, to_int8
from edgecl.learner import Learner, Problem, State, dtype_name, refreshed
from edgecl.methods import METHODS
from edgecl.methods._dropout import check_functions
from edgecl.methods._suffix import SuffixLearner
from edgecl.splitting import check_backward, split
from edgecl.taps import tapped
from edgecl.targets import TargetKind, kind_of, room, target_arrays
from edgecl.trees import flatten_tree, leaves, map_tree
from edgecl.trunk import Trunk, checked_stream, model_inputs, preprocessing
from edgecl_device.checks import as_int, entry, has_length
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import DTYPES, Array, TensorSpec
from edgecl_device.memory import ReplayMemory, row_of
from edgecl_device.targets import target_of
from edgecl_device.whole import memory_of

KEPT = 32
"""Latents of base samples kept for the checks at export."""

KEPT_RAW = 8
"""Raw base samples kept for the same."""


class Prepared:
    """A learner with its trunk, its state and its replay rows.

    Attributes:
        trunk: Maps a raw sample to its latent ``z``.
        example: One raw sample, batch dimension of 1 included, or a mapping of its inputs; real once ``fit`` has seen samples.
        samples: Some raw samples [N, ...], which the checks at export encode; the example until ``fit`` has seen others.
        x: Its spec, or a mapping of input names to specs.
        learner: The method.
        state: Its state after the base samples.
        memory: Its replay memory, or None.
        class_names: Names of the first classes, labels or values.
        examples: Latents and targets [1, ...] of some base samples, which the checks at export start from.
        reconstruction: Squared error of the first base samples' latents as replay rows hold them, over their square; 0 without loss.
    """

    def __init__(self, trunk: Trunk, example: Samples, learner: Learner, class_names: Sequence[str] = ()) -> None:
        check_names(NAMES[learner.problem.target.kind], class_names, learner.problem.max_classes)
        self.trunk = trunk.eval().requires_grad_(False)
        self.example: Samples = example
        self.samples: Samples = example
        self.x: TensorSpec | dict[str, TensorSpec] = _specs(map_tree(example, torch.tensor), "x")
        self.learner = learner
        self.state: State = {**learner.init(), **self.trunk.initial_state()}
        self.class_names = tuple(class_names)
        self._known = len(class_names)
        self.examples: list[tuple[Any, Array]] = []
        self.reconstruction = 0.0
        self.memory: ReplayMemory | None = None
        if learner.replay is not None:
            self.memory = memory_of(learner.replay, learner.problem.max_classes)

    def known_names(self) -> tuple[str, ...]:
        """Names of the classes up to the highest that is named or was learned; one without a name is called by its index.

        An index that is another class's name gets an underscore in front. On the device a new class takes the first index behind them.
        """
        names = dict.fromkeys(self.class_names)
        for i in range(len(names), self._known):
            name = str(i)
            while name in names:
                name = f"_{name}"
            names[name] = None
        return tuple(names)

    def encode(self, x: Samples, batch: int = 64) -> list[Any]:
        """Latents of samples [N, ...], one tree of tensors [1, ...] a sample.

        Args:
            x: Raw samples as the device will get them; of a model of several inputs a mapping of them. For a stream its frames, in order,
                from its start.
            batch: Samples a pass; 1 for trunks that take single samples only; frames of a stream run one by one.

        Raises:
            InputError: when shape or dtype differ from the example's, a value is not finite, or a latent depends on the other samples
                of its batch.
        """
        x = plain_samples("x", x)
        batch = as_int("batch", batch)
        if batch < 1:
            raise InputError(f"batch: must be at least 1 sample, got {batch}; 64 is usual")
        check_like(x, self.x)
        tensors, count = map_tree(x, torch.tensor), len(leaves(x)[0])
        latents: list[Any] = []
        if self.trunk.stream is not None:
            return self._frames(tensors)
        with torch.no_grad():
            for start in range(0, count, batch):
                rows = range(min(batch, count - start))
                part = map_tree(tensors, itemgetter(slice(start, start + batch)))
                z = self.trunk(part)
                if len(rows) > 1 and not latents:
                    check_independent(z, self.trunk(map_tree(part, itemgetter(slice(1)))), len(rows))
                latents += [map_tree(z, lambda t, i=i: t[i : i + 1].clone()) for i in rows]  # type: ignore[misc]
        return latents

    def _frames(self, frames: Tensor) -> list[Any]:
        latents, state = [], self.trunk.initial_state()
        with torch.no_grad():
            for i in range(len(frames)):
                z, state = self.trunk.advance(frames[i : i + 1], state)
                latents.append(z)
        return latents

    def fit(
        self,
        x: Samples,
        y: Array,
        batch: int = 64,
        progress: Callable[[int, int], None] | None = None,
        weight: Array | None = None,
        device: str = "cpu",
    ) -> "Prepared":
        """Take in base samples: what the model already knows becomes part of the state and of the replay memory.

        May be called again with more samples. The first call calibrates what is frozen: the replay codec, ridge's reflection.

        Args:
            x: Raw samples [N, ...]; of a model of several inputs a mapping of them.
            y: Targets [N, ...]: classes [N], real values [N, D], zeros and ones [N, K], or maps [N, H, W].
            batch: As in :meth:`encode`.
            progress: Called with samples done and in all.
            weight: Sample weights [N], above 0; for methods whose base samples go through ``learn`` and that take weights.
            device: PyTorch's device for the warm-up, of methods that train on base samples in the first call.

        Raises:
            InputError: when there is no such device or the learner cannot be copied there, or shapes, types, values or labels do not
                fit; state and memory are unchanged then.
        """
        check_device(device)
        latents = self.encode(x, batch)
        problem = self.learner.problem
        targets = target_arrays(y, problem.target, problem.max_classes, len(latents))
        if not all(has_length(t.numpy()) for z in latents for t in leaves(z)):
            raise InputError("x: features must be finite, and so must their squares; check the model's weights and the preprocessing")
        weights = [None] * len(latents) if weight is None else sample_weights(weight, len(latents))
        if not self.examples:
            self.learner.calibrate(stacked(latents))
            self.reconstruction = self.learner.reconstruction(stacked(latents))
        state, rows = self.state, []
        if not self.examples:
            state = {**state, **self._warmed_up(state, latents, torch.from_numpy(np.concatenate(targets)), device)}
        for i, (z, target, one) in enumerate(zip(latents, targets, weights, strict=True)):
            with torch.no_grad():
                outputs, new = self.learner.prime(state, z, torch.tensor(target), one)
            state = refreshed(self.learner, {**state, **new}, None if self.memory is None else self.memory.draw_aside)
            if not bool(outputs.get("guard", True)) or not _finite(new.values()):
                raise InputError(f"x: sample {i} must leave a finite state within the method's guard, it does not; scale the features")
            rows.append(to_arrays(row_of(outputs)))
            if progress is not None:
                progress(i + 1, len(latents))
        self.state = state
        named = target_of(problem.target, problem.max_classes)
        self._known = max(self._known, *(int(named.classes_of(target).max(initial=-1)) + 1 for target in targets))
        x = plain_samples("x", x)
        self.example = map_tree(x, lambda a: a[:1].copy())
        chosen = np.linspace(0, len(latents) - 1, min(len(latents), KEPT_RAW)).astype(int)  # samples are often sorted by class
        self.samples = map_tree(x, lambda a: a[chosen])
        self.examples = (self.examples + list(zip(latents, targets, strict=True)))[:KEPT]
        if self.memory is not None:
            for row, target in zip(rows, targets, strict=True):
                if row:  # a method whose base samples give none starts with an empty memory
                    self.memory.offer(row, target[0], -1)
        return self

    def _warmed_up(self, state: State, latents: Sequence[Any], target: Tensor, device: str) -> State:
        learner = parts_on(device, self.learner)
        z = map_tree(stacked(latents), lambda part: part.to(device))
        with running_on(device):
            return on_device("cpu", learner.warm_up(on_device(device, state), z, target.to(device)))

    def reconstruction_of(self, x: Samples, batch: int = 64) -> float:
        """Squared error of other samples' latents as replay rows hold them, over their square: what the codec loses on held-out samples.

        Args:
            x: Raw samples [N, ...], not those that ``fit`` has seen.
            batch: As in :meth:`encode`.

        Raises:
            InputError: as :meth:`encode`.
            CodecError: before ``fit``, where there is a codec to fit.
        """
        return self.learner.reconstruction(stacked(self.encode(x, batch)))


def prepare(
    model: nn.Module,
    *,
    at: str | Sequence[str],
    example: Samples,
    method: str = "ridge",
    target: TargetKind = "class",
    classes: int | None = None,
    config: Any = None,
    preprocess: nn.Module | Mapping[str, nn.Module | None] | None = None,
    stream: nn.Module | None = None,
    class_names: Sequence[str] = (),
    masks: Mapping[str, Tensor] | None = None,
    trunk_dtype: str = "float32",
    calibration: Samples | None = None,
) -> Prepared:
    """Split a model and put a continual learner behind its frozen part.

    Args:
        model: Any traceable module; copied.
        at: Name of the last module of the frozen trunk; or names of several modules of a model of one input, whose pooled outputs become
            one feature vector (:func:`edgecl.taps.taps`), with a linear layer from zero as the part that learns.
        example: One raw sample with a batch dimension of 1, as the device will get it. For a model of several inputs a mapping of the
            names of its forward's parameters to such.
        method: Name of a method (:data:`edgecl.methods.METHODS`).
        target: What a sample's target is: ``class``, or :class:`edgecl.Vector`, :class:`edgecl.MultiLabel`, :class:`edgecl.DenseMap`.
        classes: For ``class``: classes that the learner has room for, new ones included.
        config: The method's ``Config``, or None for its defaults.
        preprocess: Runs before the model, on the device too; copied; for instance :class:`edgecl.preprocess.ImageU8`. For several
            inputs a mapping of some of their names to modules.
        stream: For streams of frames, such as audio: runs between preprocess and model and carries state from frame to frame; copied.
            ``stream.initial_state()`` gives the state before the first frame, tensors by name; ``stream(x, state)`` the model's input
            and the state behind the frame. ``example`` is one frame.
        class_names: Names of the first classes.
        masks: For methods that train the suffix: bool tensors by parameter name, of its shape; only where true is a weight
            updated. Names are the model's own, as in ``model.named_parameters()``.
        trunk_dtype: ``float32``, or ``int8`` for a frozen trunk in integers (``docs/int8.md``): a quarter of the bytes; what learns stays
            float32.
        calibration: For ``int8``: raw base samples [N, ...], or a mapping of inputs to such, whose ranges decide the scales; some hundred.

    Raises:
        InputError: for an unknown method, another method's config, an unsuitable example, too few classes, names or masks that
            do not fit, or a suffix of another number of classes.
        SplitError: when the model cannot be cut there.
    """
    kind = entry("method", method, METHODS)
    if config is not None and not isinstance(config, kind.Config):
        raise InputError(f"config: must be METHODS[{method!r}].Config or None, got {config!r}; make one of that class")
    wanted = kind_of(target)
    if wanted not in kind.targets:
        serving = ", ".join(name for name, other in METHODS.items() if wanted in other.targets)
        raise InputError(f"target: {method} serves {', '.join(kind.targets)}, got {wanted}; methods for {wanted} are {serving}")
    if isinstance(target, str):
        classes = room("classes", classes, 2)
    elif classes is not None or class_names:
        raise InputError("classes, class_names: are for target='class', got them beside another; say them in the target itself")
    check_trunk_dtype(trunk_dtype, calibration, stream)
    example = plain_samples("example", example)
    for name, part in flatten_tree(example, "example").items():
        if part.dtype.name not in DTYPES:
            raise InputError(f"{name}: must be of {', '.join(DTYPES)}, got {part.dtype}; convert it to float32 or uint8")
        if part.shape[0] != 1:
            raise InputError(f"{name}: must have a batch dimension of 1, got {part.dtype} {list(part.shape)}; use x[:1]")
    carried = None if stream is None else checked_stream(stream, example)
    try:
        with torch.no_grad():
            if isinstance(at, str):
                parts = split(model, at, list(example) if isinstance(example, Mapping) else None)
            else:
                if isinstance(example, Mapping):
                    raise InputError(f"at: several modules are for models of one input, got {list(example)}; pass one name")
                outputs = as_int("classes", classes) if isinstance(target, str) else target.resolved(None)[1]
                front = Trunk(preprocessing(preprocess, example), nn.Identity(), ("x",), carried).eval()
                (model, parts), at = tapped(model, at, model_inputs(front, example), outputs), "taps"
            if isinstance(example, Mapping):
                example = {name: example[name] for name in parts.inputs}
            trunk = Trunk(preprocessing(preprocess, example), parts.trunk, parts.inputs, carried).eval()
            x = model_inputs(trunk, example)
            # The model before its parts: when it fails, torch.fx prints nothing about the code that it made of them
            output = check_values(model, parts, x)
            z = trunk(map_tree(example, torch.tensor))
    except EdgeclError:
        raise
    except (Exception, SystemExit) as error:  # the code of model and preprocess may raise anything for shapes and types that do not fit
        shapes = ", ".join(f"{part.dtype} {list(part.shape)}" for part in leaves(example))
        got = f"{shapes} ({type(error).__name__}: {error})"
        raise InputError(f"example: must suit preprocess and model, got {got}; pass a raw sample as the device will get it") from error
    for used in (parts.trunk, parts.suffix) if issubclass(kind, SuffixLearner) else (parts.trunk,):
        _check_weights(used)
    if calibration is not None:
        trunk = to_int8(trunk, calibration, _specs(map_tree(example, torch.tensor), "x"))
        with torch.no_grad():
            z = trunk(map_tree(example, torch.tensor))
    for name, part in flatten_tree({"z": z}).items():
        if dtype_name(part.dtype) not in DTYPES:
            raise InputError(
                f"at: the latent {name} behind {at!r} is {dtype_name(part.dtype)}, must be of {', '.join(DTYPES)}; cut elsewhere"
            )
        if not part.dim() or part.shape[0] != 1:
            raise InputError(
                f"at: the latent {name} behind {at!r} must have the batch dimension of 1 in front, got {list(part.shape)}; keep it in "
                "the model, or cut elsewhere"
            )
        if not bool(torch.isfinite(part).all()):
            raise InputError(
                f"at: the latent {name} behind {at!r} must be finite, has NaN or infinity for the example; mend the trunk, "
                "preprocess or example"
            )
        if not part.numel():
            raise InputError(f"at: the latent {name} behind {at!r} must hold a value, got {list(part.shape)}; cut elsewhere")
    if issubclass(kind, SuffixLearner):
        if not isinstance(output, Tensor) or not output.is_floating_point():
            got = dtype_name(output.dtype) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(f"model: must return one tensor of scores for {method}, got {got}; wrap it in a module that does")
        check_backward(parts)
        check_gradients(model, parts, x)
        if getattr(config, "dropout", False):
            check_functions(model, at, parts.inputs)
    if isinstance(target, str):
        problem = Problem(_specs(z, "z"), as_int("classes", classes))
    else:
        output_shape = tuple(output.shape) if issubclass(kind, SuffixLearner) else None
        spec, count, class_names = target.resolved(output_shape)
        problem = Problem(_specs(z, "z"), count, spec)
    extra: dict[str, Any] = {"suffix": parts.suffix, "masks": masks} if issubclass(kind, SuffixLearner) else {}
    if masks and not extra:
        raise InputError(f"masks: {method} trains no parameter of the model, got masks for {list(masks)}; leave them out")
    return Prepared(trunk, example, kind(problem, config, **extra), class_names)


def _check_weights(part: nn.Module) -> None:
    """Finite parameters, and buffers without NaN: an infinite buffer may be a mask."""
    for name, tensor in [*part.named_parameters(), *part.named_buffers()]:
        if bool(torch.isnan(tensor).any()) or (isinstance(tensor, nn.Parameter) and bool(torch.isinf(tensor).any())):
            raise InputError(f"model: weight {name!r} must be finite, got NaN or infinity; load other weights, or train them again")


def _finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in tensors)


def _specs(tensors: Any, name: str) -> Any:
    if isinstance(tensors, Tensor):
        return TensorSpec(name, tuple(tensors.shape), dtype_name(tensors.dtype))
    return {key: TensorSpec(f"{name}.{key}", tuple(t.shape), dtype_name(t.dtype)) for key, t in tensors.items()}


def stacked(latents: Sequence[Any]) -> Any:
    """Latents of single samples as one batch."""
    if isinstance(latents[0], Tensor):
        return torch.cat(list(latents))
    return {key: torch.cat([z[key] for z in latents]) for key in latents[0]}
