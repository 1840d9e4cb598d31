"""Costs against counts made one by one: loops over output elements and taps, and a walk over the ONNX model itself."""

import itertools
from collections import Counter
from collections.abc import Iterable
from math import prod
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from edgecl.graph import cost
from edgecl.graph.capture import capture, capture_encode
from edgecl.graph.lowering import build_step, canonicalise
from edgecl.graph.step import StepGraph, UnsupportedOperatorError
from edgecl.learner import Problem
from edgecl.methods import METHODS, Finetune
from edgecl_device.manifest import TensorSpec

aten = torch.ops.aten


def everything(sizes: Iterable[int]) -> Iterable[tuple[int, ...]]:
    return itertools.product(*(range(n) for n in sizes))


def convolution_loops(x: Tensor, weight: Tensor, out: tuple[int, ...], transposed: bool, groups: int) -> int:
    """One MAC for each output element, input channel of its group and tap; of a transposed one, for each use of an input element."""
    count = 0
    if transposed:
        for _position in everything(x.shape):
            for _output_channel in range(weight.shape[1]):
                for _tap in everything(weight.shape[2:]):
                    count += 1
        return count
    for _image in range(out[0]):
        for group in range(groups):
            for _output_channel in range(group * out[1] // groups, (group + 1) * out[1] // groups):
                for _position in everything(out[2:]):
                    for _input_channel in range(x.shape[1] // groups):
                        for _tap in everything(weight.shape[2:]):
                            count += 1
    return count


def weight_gradient_loops(gradient: Tensor, x: Tensor, weight: Tensor, groups: int) -> int:
    """One MAC for each weight and each output position (of every image) that it was used at."""
    count = 0
    for _weight in everything(weight.shape):
        for _image in range(gradient.shape[0]):
            for _position in everything(gradient.shape[2:]):
                count += 1
    return count


def product_loops(left: Tensor, right: Tensor) -> int:
    count = 0
    for _row in everything(left.shape[:-1]):
        for _column in range(right.shape[-1]):
            for _inner in range(left.shape[-1]):
                count += 1
    return count


class Counting(fx.Interpreter):
    """Runs a graph and counts the MACs of each node with the loops above."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.macs: dict[fx.Node, Counter[str]] = {}
        self.node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_function(target, args, kwargs)
        assert self.node is not None
        if target is aten.convolution.default:
            found = {"both": convolution_loops(args[0], args[1], result.shape, args[6], args[8])}
        elif target is aten.convolution_backward.default:
            gradient, x, weight, mask = args[0], args[1], args[2], args[10]
            found = {
                "input_gradient": convolution_loops(x, weight, gradient.shape, False, args[9]) if mask[0] else 0,
                "weight_gradient": weight_gradient_loops(gradient, x, weight, args[9]) if mask[1] else 0,
            }
        elif target in (aten.mm.default, aten.bmm.default):
            found = {"both": product_loops(args[0], args[1])}
        elif target in (aten.addmm.default, aten.baddbmm.default):
            found = {"both": product_loops(args[1], args[2])}
        else:
            return result
        self.macs[self.node] = Counter(found)
        return result

    def by_phase(self) -> dict[str, int]:
        """A product in the backward pass is an input gradient exactly when another one is computed from it."""
        total: Counter[str] = Counter()
        for node, macs in self.macs.items():
            mark = node.meta["custom"]["phase"]
            if mark == "backward" and "both" in macs:
                mark = "input_gradient" if self.followers(node) & set(self.macs) else "weight_gradient"
            total.update({mark if key == "both" else key: n for key, n in macs.items()})
        return {phase: n for phase, n in total.items() if n}

    def followers(self, node: fx.Node) -> set[fx.Node]:
        found: set[fx.Node] = set()
        waiting = [node]
        while waiting:
            fresh = set(waiting.pop().users) - found
            found |= fresh
            waiting += fresh
        return {n for n in found if (n.meta.get("custom") or {}).get("phase") == "backward"}


CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS),  # a new method is in it without another line
    ("ridge", {"projection": 7}),
    ("ridge", {"drift": 0.9}),
    ("ridge", {"delay": 3}),
    ("slda", {"delay": 3}),
    ("finetune", {"optimizer": "adam"}),
    ("clr", {"task_rows": 2}),
    ("clr", {"optimizer": "adam", "full": True}),
    ("finetune", {"trainable": ("5.*",)}),
    ("finetune", {"trainable": ("1.*", "5.*")}),
    ("latent_replay", {"rows_per_step": 2}),
    ("latent_replay", {"rows_per_step": 3, "average": 0.9}),
    ("latent_replay", {"rows_per_step": 2, "codec": "packed", "bits": 3}),
    ("latent_replay", {"rows_per_step": 2, "crop": True, "mixup": 0.1, "lr_decay": 0.5}),
    ("latent_replay", {"rows_per_step": 2, "codec": "pq", "subquantizers": 2, "centroids": 16}),
]


@pytest.mark.parametrize(("method", "config"), CASES, ids=str)
def test_steps_of_methods_equal_a_count_by_loops(method: str, config: dict[str, Any], tools: Any, generator: torch.Generator) -> None:
    learner = tools.make_learner(method, **config)
    for step in learner.steps:
        graph = canonicalise(capture(learner, step))
        state, data = tools.random_state(learner, generator), tools.random_inputs(graph, generator)
        counting = Counting(graph.module)
        counting.run(*({**state, **data}[p.name] for p in graph.inputs))
        found = cost.count(graph)
        assert found.macs == counting.by_phase()
        assert found.total_macs == sum(sum(c.values()) for c in counting.macs.values())
        assert found.flops == 2 * found.total_macs


# Layers of the small net by hand: depthwise 3x3, pointwise, strided 3x3 to 4x4 positions, linear.
LAYERS = {"depthwise": 4 * 49 * 9, "pointwise": 4 * 49 * 4, "strided": 6 * 16 * 4 * 9, "linear": 24 * 5}


@pytest.mark.parametrize(
    ("trainable", "inputs", "weights"),
    [
        (None, ("pointwise", "strided", "linear"), ("depthwise", "pointwise", "strided", "linear")),
        (("0.pointwise.*",), ("strided", "linear"), ("pointwise",)),
        (("0.pointwise.bias",), ("strided", "linear"), ()),
        (("1.weight", "5.weight"), ("linear",), ("strided", "linear")),
        (("5.*",), (), ("linear",)),
    ],
    ids=str,
)
def test_the_backward_pass_stops_at_the_shallowest_trained_tensor(
    trainable: Any, inputs: tuple[str, ...], weights: tuple[str, ...], tools: Any
) -> None:
    found = cost.count(canonicalise(capture(tools.make_learner("finetune", trainable=trainable), "learn")))
    assert found.macs.get("forward") == sum(LAYERS.values())
    assert found.macs.get("input_gradient", 0) == sum(LAYERS[k] for k in inputs)
    assert found.macs.get("weight_gradient", 0) == sum(LAYERS[k] for k in weights)


def test_replay_multiplies_every_phase(tools: Any) -> None:
    one = cost.count(canonicalise(capture(tools.make_learner("finetune"), "learn"))).macs
    four = cost.count(canonicalise(capture(tools.make_learner("latent_replay", rows_per_step=3), "learn"))).macs
    assert {k: 4 * n for k, n in one.items()} == four


def test_mixup_and_crop_cost_what_the_page_says(tools: Any) -> None:
    """Two rows from four: the suffix works on three maps, the crop on five of 4 channels and 7x7 positions."""
    plain, full = (
        cost.count(canonicalise(capture(tools.make_learner("latent_replay", rows_per_step=2, **config), "learn"))).macs
        for config in ({}, {"crop": True, "mixup": 0.1})
    )
    assert full["augment"] == 5 * 4 * 49 * (7 + 7)
    assert full["forward"] == plain["forward"] // 3 * 4, "and one more forward pass, for the scores of the map as it is"
    assert {full[k] == plain[k] for k in ("input_gradient", "weight_gradient")} == {True}


def test_a_product_quantiser_costs_positions_times_channels_times_centroids(tools: Any) -> None:
    """Encoding a map of 49 positions and 4 channels with 16 codewords; looking them up again is no multiplication."""
    learner = tools.make_learner("latent_replay", rows_per_step=2, codec="pq", subquantizers=2, centroids=16)
    for step in ("predict", "learn"):
        found = cost.count(canonicalise(capture(learner, step))).macs
        assert found["replay_encode"] == 49 * 4 * 16
        assert "replay_decode" not in found


CONVOLUTIONS = [
    ((2, 4, 6, 7), (6, 4, 3, 2), 1, 1, 1, 1),
    ((1, 4, 6, 6), (4, 2, 3, 3), 2, 1, 2, 1),
    ((2, 4, 7, 7), (4, 1, 3, 3), 1, 0, 4, 2),
    ((1, 3, 5), (2, 3, 3), 1, 1, 1, 1),
]


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_convolutions(case: Any, transposed: bool, bench: Any) -> None:
    shape, kernel, stride, padding, groups, dilation = case
    rank = len(kernel) - 2
    if transposed:
        kernel = (shape[1], kernel[0] // groups, *kernel[2:])
    x, w = torch.ones(shape), torch.ones(kernel)
    options = ([stride] * rank, [padding] * rank, [dilation] * rank, transposed, [0] * rank, groups)
    graph = bench.raw(lambda a, b: aten.convolution.default(a, b, None, *options), x, w)
    out = aten.convolution.default(x, w, None, *options).shape
    assert cost.count(graph).total_macs == convolution_loops(x, w, out, transposed, groups)
    g = torch.ones(out)
    for mask in itertools.product([False, True], repeat=2):
        if any(mask):
            graph = bench.raw(
                lambda a, b, c, m=mask: [t for t in aten.convolution_backward(c, a, b, None, *options, [*m, False]) if t is not None],
                x,
                w,
                g,
            )
            macs = cost.count(graph).macs
            loops = convolution_loops(x, w, out, transposed, groups)
            assert macs.get("input_gradient", 0) == (loops if mask[0] else 0)
            assert macs.get("weight_gradient", 0) == (loops if mask[1] else 0)
    if not transposed:
        assert weight_gradient_loops(g, x, w, groups) == loops


@pytest.mark.parametrize(
    ("function", "shapes", "macs", "elementwise"),
    [
        (torch.mm, [(2, 3), (3, 5)], 30, 0),
        (torch.addmm, [(5,), (2, 3), (3, 5)], 30, 10),
        (torch.bmm, [(2, 2, 3), (2, 3, 4)], 48, 0),
        (torch.baddbmm, [(2, 2, 4), (2, 2, 3), (2, 3, 4)], 48, 16),
        (torch.relu, [(3, 4)], 0, 12),
        (lambda x: x * 2.0 + 1.0, [(3, 4)], 0, 24),
        (lambda x: x + x.sum(), [(3, 4)], 0, 24),
        (lambda x: x.sum(1), [(3, 4)], 0, 12),
        (lambda x: x.mean((0, 1)), [(3, 4)], 0, 12),
        (lambda x: x.amax(1), [(3, 4)], 0, 12),
        (lambda x: x.argmax(1), [(3, 4)], 0, 12),
        (lambda x: x.softmax(1), [(3, 4)], 0, 60),
        (lambda x: x.log_softmax(1), [(3, 4)], 0, 60),
        (lambda x: torch.where(x > 0, x, -1.0), [(3, 4)], 0, 24),
        (lambda x, y: x * y, [(3, 1), (1, 4)], 0, 12),
        (lambda x: x.reshape(-1).flip(0)[2:], [(3, 4)], 0, 0),
        (lambda x: torch.cat([x, x.t().reshape(3, 4)]), [(3, 4)], 0, 0),
        (lambda x: F.max_pool2d(x, 3, 2, 1), [(2, 3, 6, 6)], 0, 2 * 3 * 9 * 9),
        (lambda x: F.avg_pool2d(x, (2, 3)), [(1, 2, 6, 6)], 0, 2 * 3 * 2 * 6),
        (lambda x: aten.avg_pool2d(x, [2]), [(1, 2, 6, 6)], 0, 2 * 9 * 4),
        (lambda x: F.adaptive_avg_pool2d(x, 1), [(1, 2, 6, 6)], 0, 72),
        (lambda x, b: F.conv2d(x, torch.ones(3, 2, 1, 1), b), [(1, 2, 4, 4), (3,)], 3 * 16 * 2, 48),
    ],
)
def test_formulas(function: Any, shapes: Any, macs: int, elementwise: int, bench: Any) -> None:
    found = cost.count(bench.raw(function, *(torch.ones(s) for s in shapes)))
    assert (found.total_macs, found.elementwise) == (macs, elementwise)


@pytest.mark.parametrize(
    ("layer", "shape", "elementwise"),
    [
        (F.relu, (3, 4), 12),
        (F.relu6, (3, 4), 12),
        (torch.sigmoid, (3, 4), 36),
        (torch.tanh, (3, 4), 36),
        (lambda x: x.softmax(1), (3, 4), 48),
        (lambda x: x.log_softmax(1), (3, 4), 48),
        (lambda x: F.max_pool2d(x, 3, 2, 1), (2, 3, 6, 6), 54),
        (lambda x: F.avg_pool2d(x, 3, 2, 1), (2, 3, 6, 6), 54 * 9),
    ],
)
def test_formulas_of_gradients(layer: Any, shape: Any, elementwise: int, bench: Any, tools: Any) -> None:
    x = torch.ones(shape)
    y = layer(x)
    forward = cost.count(bench.raw(layer, x)).elementwise
    both = bench.raw(lambda t, g: [layer(t), *tools.gradients(layer, t)(t, g)], x, torch.ones_like(y))
    again = sum(n.target in FORWARD for n in both.operators) - 1
    assert cost.count(both).elementwise == forward * (1 + again) + elementwise


FORWARD = {
    aten.relu.default, aten.hardtanh.default, aten.sigmoid.default, aten.tanh.default, aten._softmax.default, aten._log_softmax.default,
    aten.max_pool2d_with_indices.default, aten.avg_pool2d.default,
}  # fmt: skip


class Sums(nn.Module):
    """An operator that there is nothing for."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumprod(2)


class Model(nn.Module):
    """``layer1``, ``layer3.0`` (a convolution and an activation), ``head``."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(2, 2, 1)
        self.layer3 = nn.Sequential(nn.Sequential())
        self.layer3[0].add_module("conv", nn.Conv2d(2, 2, 3))
        self.layer3[0].add_module("act", act)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.layer3(self.layer1(x))).flatten(1))  # type: ignore[no-any-return]


UNKNOWN = r"^step '{}': operator {} in layer3\.0\.act {}; replace it in the model, or cut the model elsewhere: [^\n]*$"


@pytest.mark.parametrize(
    ("act", "operator", "reason"),
    [
        (Sums(), r"aten\.cumprod\.default", "is not supported"),
        (nn.Upsample(size=(4, 4), mode="bicubic"), r"aten\.upsample_bicubic2d\.default", "is not supported"),
        (nn.LogSigmoid(), r"aten\.log_sigmoid_(forward|backward)\.default", "is not supported"),
    ],
    ids=["forward", "resampling", "activation"],
)
def test_an_unsupported_operator_is_named_in_one_sentence(act: nn.Module, operator: str, reason: str) -> None:
    learner = Finetune(Problem(TensorSpec("z", (1, 2, 6, 6), "float32"), 3), suffix=Model(act).eval())
    with pytest.raises(UnsupportedOperatorError, match=UNKNOWN.format("learn", operator, reason)):
        build_step(capture(learner, "learn"))


def test_an_unsupported_operator_of_the_trunk_is_named_with_its_module() -> None:
    with pytest.raises(UnsupportedOperatorError, match=UNKNOWN.format("encode", r"aten\.cumprod\.default", "is not supported")):
        build_step(capture_encode(Model(Sums()).eval(), TensorSpec("x", (1, 2, 6, 6), "float32")))


def test_every_backward_operator_of_a_layer_carries_its_module_path(tools: Any) -> None:
    graph = capture(tools.make_learner("finetune"), "learn")
    marks = {
        (str(n.target), (n.meta["custom"] or {}).get("module")) for n in graph.operators if n.meta["custom"].get("phase") == "backward"
    }
    assert {
        ("aten.convolution_backward.default", "0.depthwise"),
        ("aten.hardtanh_backward.default", "0.act"),
        ("aten.convolution_backward.default", "0.pointwise"),
        ("aten.convolution_backward.default", "1"),
        ("aten.threshold_backward.default", "2"),
        ("aten.max_pool2d_with_indices_backward.default", "3"),
        ("aten.mm.default", "5"),
    } <= marks


def onnx_macs(path: Any) -> int:
    """MACs of an ONNX model, from its own inferred shapes."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        shapes[value.name] = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
    total = 0
    for node in model.graph.node:
        out, operands = shapes[node.output[0]], [shapes[name] for name in node.input if name]
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Conv":
            total += prod(out) * prod(operands[1][1:])
        elif node.op_type == "ConvTranspose":
            total += prod(operands[0]) * prod(operands[1][1:])
        elif node.op_type == "MatMul":
            total += prod(out) * operands[0][-1]
        elif node.op_type == "Gemm":
            total += prod(out) * operands[0][0 if attributes.get("transA") else 1]
    return total


def sums_as_products(graph: StepGraph) -> int:
    """MACs of the forward pass that are sums over rows, for the statistics of a batch, written as products with ones."""
    found = 0
    for work in cost.work_by_node(graph):
        first = work.node.all_input_nodes[0]
        forward = (work.node.meta.get("custom") or {}).get("phase") == "forward"
        if (
            forward
            and work.node.target is torch.ops.aten.mm.default
            and first.op == "get_attr"
            and bool((graph.constant(first) == 1).all())
        ):
            found += work.macs
    return found


@pytest.mark.parametrize(("method", "config"), CASES, ids=str)
def test_executed_macs_equal_a_count_on_the_onnx_model(method: str, config: dict[str, Any], bench: Any, tools: Any) -> None:
    learner = tools.make_learner(method, **config)
    for step in learner.steps:
        built = build_step(capture(learner, step))
        assert built.executed.total_macs == onnx_macs(bench.emit(built.graph))
        shifted = built.executed.elementwise - built.canonical.elementwise  # products that a rule writes as elementwise ones
        if step != "refresh" or method != "sparcl":  # whose two backward passes have elementwise work in common, done once when lowered
            assert built.executed.total_macs + max(shifted, 0) >= built.canonical.total_macs
        assert set(built.executed.macs) == set(built.canonical.macs)
        # a depthwise convolution in rows is a product of elements and a sum: those of the forward pass are counted with all their taps
        moved = built.canonical.macs.get("forward", 0) - built.executed.macs.get("forward", 0) + sums_as_products(built.graph)
        assert moved in (0, sum(macs["forward"] for path, macs in built.layers.items() if path.endswith(("depthwise", "reprogram"))))


def test_layers_have_their_macs_by_phase() -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Flatten(), nn.Linear(16, 5))
    learner = Finetune(Problem(TensorSpec("z", (1, 1, 6, 6), "float32"), 5), suffix=net.eval())
    graph = canonicalise(capture(learner, "learn"))
    first, second, last = 3 * 4 * 4 * 9, 4 * 2 * 2 * 3 * 9, 16 * 5  # outputs times taps
    assert cost.count_by_module(graph) == {
        "0": {"forward": first, "weight_gradient": first},  # nobody asks for the gradient of its input
        "2.0": {"forward": second, "input_gradient": second, "weight_gradient": second},
        "4": {"forward": last, "input_gradient": last, "weight_gradient": last},
    }


@pytest.mark.parametrize("method", ["ridge", "slda"])
def test_a_methods_own_algebra_has_no_layer(method: str) -> None:
    learner = METHODS[method](Problem(TensorSpec("z", (1, 6), "float32"), 3))
    graph = canonicalise(capture(learner, "learn"))
    assert cost.count_by_module(graph) == {"": cost.count(graph).macs}
