"""A suffix in parts, each with a meta network beside it, by editing its graph; and how far these go from what is frozen."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from edgecl.backbones.initialise import initialise
from edgecl.methods._features import require
from edgecl.splitting import recorded

META = "metas"
"""Start of the names of the meta networks' modules."""


class Branch(nn.Module):
    """``ReLU(BN(Conv3x3(x)))`` without a bias, from one map's shape to another's.

    Args:
        inputs: Channels of ``x``.
        outputs: Channels of the result.
        stride: Of the convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [N, C, H, W] as [N, outputs, H / stride, W / stride]."""
        found: Tensor = self.norm(self.conv(x)).relu()
        return found


class Sum(nn.Module):
    """``normed + branch``.

    Attributes:
        gaps: While this is a list, the mean distance of the sum to the frozen part's own output goes there.
        bypassed: Gives that output itself: the network without its meta networks.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gaps: list[Tensor] | None = None
        self.bypassed = False

    def forward(self, normed: Tensor, branch: Tensor, frozen: Tensor) -> Tensor:
        """Three maps of one shape as one."""
        if self.bypassed:
            return frozen
        found = normed + branch
        if self.gaps is not None:
            self.gaps.append((found - frozen.detach()).abs().mean())
        return found


def with_meta(
    suffix: nn.Module, z: Any, names: Sequence[str], stem: str | None, detached: bool, seed: int
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """The suffix with a meta network beside each part: ``x_k = BN(E_k(x_{k-1})) + ReLU(BN(Conv(x_{k-1})))``.

    Args:
        suffix: Left as it is.
        z: One latent; its values do not matter.
        names: Where parts end: modules, in the order in which they run.
        stem: The module behind which the first part begins; None for the latent, which is one map [1, C, H, W] then.
        detached: Whether frozen parts pass no gradient to what lies before them.
        seed: Of the meta networks' initial weights.

    Returns:
        The suffix, whose new modules are ``metas.K.branch``, ``metas.K.norm`` and ``metas.K.sum``, and the elements [1, ...] of the maps
        between parts, that before the first one at the start.

    Raises:
        InputError: when the model cannot be cut there, or a map's size is not a whole multiple of the next one's.
    """
    graph = deepcopy(suffix.graph) if isinstance(suffix, fx.GraphModule) else recorded(suffix)
    whole = fx.GraphModule(deepcopy(suffix), graph).eval()
    ShapeProp(whole).propagate(z)
    start = [] if stem is None else [_end(graph, stem, "stem")]
    ends = [_end(graph, name, "parts") for name in names]
    nodes = list(graph.nodes)
    order = [nodes.index(node) for node in (*start, *ends)]
    require(order == sorted(set(order)), "parts", "run one behind the other, and behind the stem", names, "sort them")
    before = start[0] if start else next(node for node in nodes if node.op == "placeholder")
    shapes = [tuple(node.meta["tensor_meta"].shape) for node in (before, *ends)]
    strides = [_stride(name, *pair) for name, pair in zip(names, pairwise(shapes), strict=True)]
    meta = nn.ModuleDict()
    for k, (stride, (one, other)) in enumerate(zip(strides, pairwise(shapes), strict=True)):
        parts = {"branch": Branch(one[1], other[1], stride), "norm": nn.BatchNorm2d(other[1]), "sum": Sum()}
        meta[str(k)] = nn.ModuleDict(parts)
    initialise(meta, torch.Generator().manual_seed(seed))
    whole.add_module(META, meta)
    for k, end in enumerate(ends):
        readers, followers = list(before.users), list(end.users)
        with graph.inserting_after(before):
            branch = _called(graph, f"{META}.{k}.branch", before)
            if detached and k:
                apart = graph.call_method("detach", (before,))
                for reader in readers:
                    reader.replace_input_with(before, apart)
        with graph.inserting_after(end):
            normed = _called(graph, f"{META}.{k}.norm", end)
        with graph.inserting_after(normed):
            before = _called(graph, f"{META}.{k}.sum", normed, branch, end)
        for follower in followers:
            follower.replace_input_with(end, before)
    whole.recompile()
    graph.lint()
    return whole.eval().requires_grad_(False), tuple(int(torch.Size(shape).numel()) for shape in shapes)


def default_parts(suffix: nn.Module) -> tuple[str, ...]:
    """The containers at the top of a suffix that hold a batch norm, such as ``layer1``, ``layer2``, ``layer3``."""
    norm = nn.modules.batchnorm._BatchNorm
    inside = {
        name: [module for module in child.modules() if isinstance(module, norm) and module is not child]
        for name, child in suffix.named_children()
    }
    return tuple(name for name, found in inside.items() if found)


def _end(graph: fx.Graph, name: str, parameter: str) -> fx.Node:
    """The node whose value a module's part ends with, which is all that is left of what ran before."""
    nodes = list(graph.nodes)
    inside = [i for i, node in enumerate(nodes) if node.op not in ("placeholder", "output") and _is_inside(node, name)]
    require(bool(inside), parameter, "name modules behind the cut", name, "pass containers such as 'layer1', in their order")
    front = set(nodes[: inside[-1] + 1])
    crossing = [node for node in nodes if node in front and any(user not in front for user in node.users)]
    shape: Any = getattr(crossing[0].meta.get("tensor_meta"), "shape", ()) if len(crossing) == 1 else ()
    require(len(shape) == 4, parameter, "end where one map [N, C, H, W] is all that goes on", name, "cut at the end of a block")
    end: fx.Node = crossing[0]
    return end


def _is_inside(node: fx.Node, name: str) -> bool:
    paths = [*(node.meta.get("nn_module_stack") or {}), str(node.target) if node.op == "call_module" else ""]
    return any(path == name or path.startswith(f"{name}.") for path in paths)


def _stride(name: str, before: tuple[int, ...], after: tuple[int, ...]) -> int:
    stride = round(before[2] / after[2])
    fits = stride >= 1 and all(-(-size // stride) == new for size, new in zip(before[2:], after[2:], strict=True))
    require(
        fits,
        "parts",
        f"end at a map whose sides are those of {list(before)} by one whole number",
        list(after),
        f"cut elsewhere than at {name!r}",
    )
    return stride


def _called(graph: fx.Graph, path: str, *inputs: fx.Node) -> fx.Node:
    """A call of a module, under its path in costs and errors."""
    node = graph.call_module(path, inputs)
    node.meta["nn_module_stack"] = {path: None}
    return node


def kept_elements(maps: Sequence[int]) -> int:
    """Elements of one sample that an update keeps where no gradient passes the frozen parts: ``sum_k |x_{k-1}| + 2 |x_k|``.

    They are each meta convolution's input, and the inputs of its two norms; masks are not counted.

    Args:
        maps: Elements of the maps between parts, the latent's first.

    >>> kept_elements((16384, 32768, 32768, 16384, 8192))  # WRN-40-2 in four parts
    278528
    """
    return sum(before + 2 * after for before, after in pairwise(maps))
