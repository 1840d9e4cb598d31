"""The frozen trunk in int8: quantised once, in PyTorch, so that host, ONNX Runtime and ExecuTorch run one graph.

The XNNPACK quantiser of ExecuTorch says what is quantised and how (activations int8 with one scale a tensor, weights int8 with one scale
an output channel), torchao does it: batch norm is folded, observers watch the calibration samples, and weights become int8 constants.
What lies between a ``quantize`` and a ``dequantize`` is computed in integers by the runtimes.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference".
"""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from edgecl.given import Samples, check_like, plain_samples
from edgecl.graph.quantised import DEQUANTIZE, QUANTIZE, is_dequantized, is_packed
from edgecl.onednn import without_onednn
from edgecl.quiet import quiet
from edgecl.trees import leaves, map_tree
from edgecl.trunk import Trunk
from edgecl_device.errors import EdgeclError, InputError
from edgecl_device.manifest import TensorSpec

aten = torch.ops.aten

TRUNK_DTYPES = ("float32", "int8")
"""What ``prepare(trunk_dtype=...)`` takes."""

BATCH = 64
"""Calibration samples a pass."""

ENOUGH = 512
"""Calibration samples that :func:`calibration_of` takes at most."""

_SUMS = frozenset({
    aten.conv1d.default, aten.conv2d.default, aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.linear.default,
    aten.adaptive_avg_pool2d.default, aten.mean.dim,
})  # fmt: skip
"""Operators whose float32 sums depend on the order of their terms, which on this machine may be another one in another batch."""


_ADDS = (aten.add.Tensor, aten.add_.Tensor)

_PADS = (aten.pad.default, aten.constant_pad_nd.default)

_CLIPS = (aten.hardtanh.default, aten.hardtanh_.default)
"""What ReLU6 is."""


def check_trunk_dtype(trunk_dtype: Any, calibration: Any, stream: nn.Module | None) -> None:
    """Whether these arguments of ``prepare`` go together."""
    if trunk_dtype not in TRUNK_DTYPES:
        raise InputError(f"trunk_dtype: must be one of {', '.join(TRUNK_DTYPES)}, got {trunk_dtype!r}; take one of them")
    if trunk_dtype == "float32" and calibration is not None:
        raise InputError("calibration: is for trunk_dtype='int8', got samples with 'float32'; leave it out, or set trunk_dtype")
    if trunk_dtype == "int8" and calibration is None:
        raise InputError("calibration: must be raw samples [N, ...] for trunk_dtype='int8', got None; pass some hundred base samples")
    if trunk_dtype == "int8" and stream is not None:
        raise InputError("trunk_dtype: must be 'float32' for streams, whose state is float, got 'int8'; leave it out")


def calibration_of(x: Samples) -> Samples:
    """Up to :data:`ENOUGH` of the samples [N, ...] of a base set, evenly spaced, as they are often sorted by class.

    >>> len(calibration_of(np.zeros((2000, 4))))
    512
    """
    count = len(leaves(x)[0])
    chosen = np.linspace(0, count - 1, min(count, ENOUGH)).astype(int)
    found: Samples = map_tree(x, lambda part: part[chosen])
    return found


def to_int8(trunk: Trunk, calibration: Samples, wanted: TensorSpec | Mapping[str, TensorSpec]) -> Trunk:
    """A trunk with the model in int8; preprocessing is the same.

    Args:
        trunk: In eval mode.
        calibration: Raw samples [N, ...] that are like those the device will see, or a mapping of a model's inputs to such.
        wanted: Specs of one raw sample.

    Raises:
        InputError: when samples do not fit, or the model cannot be quantised.
        EdgeclError: when the packages that quantise are not installed.
    """
    calibration = plain_samples("calibration", calibration)
    check_like(calibration, wanted, "calibration")
    tensors, count = map_tree(calibration, torch.tensor), len(leaves(calibration)[0])
    with torch.no_grad():
        batches = [trunk.prepared(map_tree(tensors, itemgetter(slice(start, start + BATCH)))) for start in range(0, count, BATCH)]
        found = [trunk.model(*batch) for batch in batches]
        if not all(bool(torch.isfinite(z).all()) for batch in found for z in leaves(batch)):
            raise InputError("calibration: latents of its samples must be finite, got NaN or infinity; mend the samples or preprocess")
    made = Trunk(list(trunk.preprocess), quantised(trunk.model, batches), trunk.inputs).eval()
    made.in_float = (trunk,)
    return made


def quantised(model: nn.Module, batches: Sequence[Sequence[Tensor]]) -> fx.GraphModule:
    """A model in int8.

    Args:
        model: In eval mode; takes any number of samples.
        batches: Inputs of the model to calibrate with, in its order.
    """
    prepare_pt2e, convert_pt2e, quantizer = _tools()
    with quiet(), torch.no_grad(), without_onednn():
        graph = _exported(model, batches[0])
        try:
            observed = prepare_pt2e(graph, quantizer)
            for batch in batches:
                observed(*batch)
            found = convert_pt2e(observed)
        except Exception as error:  # its errors share no base class
            raise InputError(_refusal(f"the quantiser fails with {type(error).__name__} ({_first_line(error)})")) from error
        return _plain(found)


def _tools() -> tuple[Any, Any, Any]:
    with quiet():
        try:
            from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer, get_symmetric_quantization_config
            from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        except ImportError as error:
            raise EdgeclError("executorch and torchao are not installed; install them with: pip install 'edgecl[int8]'") from error

        class Quantizer(XNNPACKQuantizer):  # type: ignore[misc]
            """Takes a layer and the clip behind it together, as XNNPACK does, where the base class does so for ReLU alone.

            Products stay float, and so do sums with a constant: squares and what normalises them do not bear a single scale.
            """

            SUPPORTED_PATTERNS: ClassVar = [pattern for pattern in XNNPACKQuantizer.SUPPORTED_PATTERNS if "mul" not in pattern.name]

            def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
                clips = {node: node.target for node in model.graph.nodes if node.target in _CLIPS}
                for node in clips:
                    node.target = aten.relu.default
                model = super().annotate(model)
                for node, target in clips.items():
                    node.target = target
                return model

        quantizer = Quantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
        return prepare_pt2e, convert_pt2e, quantizer.set_filter_function(_bears_a_scale)


def _bears_a_scale(node: fx.Node) -> bool:
    return node.target not in _ADDS or all(n.op != "get_attr" for n in node.all_input_nodes)


def _exported(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """The model's graph for any number of samples: traced with two, as one of a size of 1 counts as fixed."""
    two = tuple(torch.cat([x[:1], x[:1]]) for x in inputs)
    batch = torch.export.Dim("batch")
    try:
        program = torch.export.export(model, two, dynamic_shapes=tuple({0: batch} for _ in two))
    except Exception as error:  # tracing runs the user's code, which may raise anything
        raise InputError(_refusal(f"it cannot be traced for any number of samples ({_first_line(error)})")) from error
    return program.module(check_guards=False)


def _plain(found: fx.GraphModule) -> fx.GraphModule:
    """What torchao returns as a module like those of ``split``: constants are buffers, operators know their places in the model."""
    root = nn.Module()
    graph: fx.Graph = found.graph
    names: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            name = names.setdefault(str(node.target), f"constant_{len(names)}")
            root.register_buffer(name, _attribute(found, str(node.target)).detach().clone(), persistent=False)
            node.target = name
        elif node.target in _SUMS and any(is_dequantized(n) for n in node.all_input_nodes):
            node.args, node.target = (node.target, *node.args), summed
    if not any(map(is_packed, graph.nodes)):
        raise InputError(_refusal("it has no layer that can be: no convolution and no linear layer"))
    for node in graph.nodes:
        # zeros lie in every range: a layer may pad the integers
        if node.target in _PADS and node.args[0].target is DEQUANTIZE and _pads_zeros(node):
            for quantize in [user for user in node.users if user.target is QUANTIZE]:
                for user in (quantize, *list(quantize.users)):
                    user.args = (user.args[0], *node.args[0].args[1:])
    for node in reversed(list(graph.nodes)):  # where they are used: each weight is float for one layer only
        if node.op == "get_attr" or is_packed(node):
            node_users = set(node.users)
            first = next(n for n in graph.nodes if n in node_users)
            first.prepend(node)
    places: dict[fx.Node, str] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        places[node] = str(list(stack.values())[-1][0]) if stack else next((places[n] for n in node.all_input_nodes if places[n]), "")
        node.meta["nn_module_stack"] = {places[node]: None}
    return fx.GraphModule(root, graph, class_name="Int8Trunk").eval()


def _pads_zeros(node: fx.Node) -> bool:
    """Whether the values that are put around a map are zeros: ``pad(x, amounts, mode, value)``, ``constant_pad_nd(x, amounts, value)``."""
    rest = [*node.args[2:], *node.kwargs.values()]
    return all(value in (0, None, "constant") for value in rest)


def summed(operator: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Call an operator: as it is where it is traced, else in float64.

    The runtimes sum products of integers without rounding. So do sums in float64 here, in whatever order: a latent is the same in every
    batch, while a float32 sum that falls on the edge between two integers would round to one or the other.
    """
    if get_proxy_mode() is not None:
        traced: Tensor = operator(*args, **kwargs)
        return traced
    wide = [a.double() if isinstance(a, Tensor) else a for a in args]
    result: Tensor = operator(*wide, **kwargs).float()
    return result


def _attribute(module: nn.Module, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), name)
    return value


def _refusal(why: str) -> str:
    return f"trunk_dtype: 'int8' must suit the trunk, {why}; cut elsewhere, or leave it 'float32'"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
