"""Dropout whose masks are inputs: the device draws integers, the graph makes masks of them.

Source: Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting"; by channel, Tompson et al. 2015,
"Efficient Object Localization Using Convolutional Networks". Deviation: shares that are kept are multiples of 1 / :data:`GRAIN`.
"""

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from edgecl.splitting import SplitError, cut, module_place, recorded, traced
from edgecl_device.checks import MOST_DRAWS
from edgecl_device.errors import InputError
from edgecl_device.manifest import DrawSpec

GRAIN = 1 << 16
"""Equally likely integers of which one is drawn for each value, or channel."""

_BY_CHANNEL = (nn.Dropout1d, nn.Dropout2d)
_KINDS = (nn.Dropout, *_BY_CHANNEL)
_ALL = (*_KINDS, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DRAWS = re.compile("dropout|bernoulli|^rand")
"""In the names of functions and methods that drop values, or draw which to drop."""


@dataclass(frozen=True)
class Site:
    """One call of a dropout module.

    Attributes:
        draw: The integers that its mask is made of.
        p: Share of values, or channels, that are dropped.
    """

    draw: DrawSpec
    p: float

    def mask(self, drawn: Tensor) -> Tensor:
        """What the activation is multiplied by, float32 of the draw's shape: 0, or ``1 / (1 - p)``.

        >>> Site(DrawSpec("drop", (2,), GRAIN), 0.75).mask(torch.tensor([16383, 16384]))
        tensor([4., 0.])
        """
        kept = (drawn < round((1 - self.p) * GRAIN)).to(torch.float32)
        return kept * (1 / (1 - self.p))


def with_masks(suffix: nn.Module, z: Any) -> tuple[fx.GraphModule, tuple[Site, ...]]:
    """The suffix with a second argument, the masks by name of their draw, and the calls that they act at.

    Args:
        suffix: Maps features to scores; parameters keep their names.
        z: Features of the batch of an update, [1 + r, ...]; their values do not matter.

    Raises:
        InputError: when no dropout module is called, or the masks of one cannot be drawn.
    """
    traced = fx.GraphModule(suffix, recorded(suffix))
    modules = dict(traced.named_modules())
    ShapeProp(traced).propagate(z)
    calls = [node for node in traced.graph.nodes if node.op == "call_module" and _drops(modules[node.target])]
    others = sorted({type(modules[node.target]).__name__ for node in calls if not isinstance(modules[node.target], _KINDS)})
    if others:
        raise InputError(f"dropout: must be False for {', '.join(others)}, whose masks are not drawn, got True; take nn.Dropout there")
    shared = [node.target for node in calls if modules[node.target].inplace and len(node.all_input_nodes[0].users) > 1]
    if shared:
        raise InputError(f"dropout: {shared[0]!r} must not be in place where its input is used again; give it inplace=False")
    hidden = sorted({name for name, module in modules.items() if _drops(module)} - {node.target for node in calls})
    if hidden:
        raise InputError(f"dropout: must be False for dropout within a layer of PyTorch's, got True with {hidden}; leave it out")
    if not calls:
        raise InputError(
            "dropout: must be False for a suffix that calls no nn.Dropout, nn.Dropout1d or nn.Dropout2d with p above 0, got True; "
            "leave it out, or cut the model further up"
        )
    sites = tuple(_site(node, modules[node.target]) for node in calls)
    with traced.graph.inserting_after(next(node for node in traced.graph.nodes if node.op == "placeholder")):
        masks = traced.graph.placeholder("masks")
    for node, site in zip(calls, sites, strict=True):
        with traced.graph.inserting_before(node):
            mask = traced.graph.call_function(operator.getitem, (masks, site.draw.name))
            node.replace_all_uses_with(traced.graph.call_function(operator.mul, (node.all_input_nodes[0], mask)))
        traced.graph.erase_node(node)
    traced.recompile()
    return traced, sites


def check_functions(model: nn.Module, at: str, inputs: Sequence[str] | None = None) -> None:
    """Check that behind the cut only modules drop: what a function drops by ``self.training`` is off in the parts, traced in eval mode.

    Args:
        model: The user's model; left as it is.
        at: Where it is cut.
        inputs: As :func:`edgecl.splitting.split` takes them.

    Raises:
        InputError: naming the function and the module that calls it; when the model cannot be cut in training mode.
    """
    try:
        _, tracer, graph, _ = traced(model, inputs, training=True)
        nodes, front, _ = cut(tracer, graph, at)
    except SplitError as error:
        raise InputError(f"dropout: must be False for a model that cannot be cut in training mode, got True ({error})") from error
    for node in nodes:
        if node.op in ("call_function", "call_method") and node not in front and (name := _drawing(node)):
            path = next(reversed(node.meta.get("nn_module_stack") or {"": None}))
            raise InputError(
                f"dropout: must be False for a suffix that calls {name} in training, in {module_place(path)}, got True, which is for "
                "modules; make it an nn.Dropout module, or leave dropout out"
            )


def _drawing(node: fx.Node) -> str | None:
    """The name of a function or method that drops values in the mode in which it was traced."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if "dropout" in name:  # PyTorch's all take (input, p, training)
        p = (*node.args[1:2], node.kwargs.get("p"))[0]
        training = (*node.args[2:3], node.kwargs.get("training", node.kwargs.get("train")))[0]
        return name if p and training else None
    return name if _DRAWS.search(name) else None


def _drops(module: nn.Module) -> bool:
    return isinstance(module, _ALL) and module.p > 0


def _site(node: fx.Node, module: Any) -> Site:
    shape = tuple(node.meta["tensor_meta"].shape)
    if module.p == 1:
        raise InputError(f"dropout: {node.target!r} must keep a share, got p = 1; give it a p below 1")
    if isinstance(module, _BY_CHANNEL):
        if len(shape) < 3:
            raise InputError(f"dropout: {node.target!r} must act on [N, C, ...], got {list(shape)}; use nn.Dropout there")
        shape = (*shape[:2], *[1] * (len(shape) - 2))
    if math.prod(shape) > MOST_DRAWS:
        raise InputError(
            f"dropout: {node.target!r} must draw at most {MOST_DRAWS:,} integers an update, got {list(shape)}; "
            "lower rows_per_step, drop whole channels with nn.Dropout2d, or cut the model further down"
        )
    return Site(DrawSpec(f"dropout_{node.name}", shape, GRAIN), float(module.p))
