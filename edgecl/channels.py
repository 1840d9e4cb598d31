"""Train some output channels of a layer, as slices: what stays frozen has no gradient, no state and no update.

Source: Lin, Zhu, Chen, Wang, Gan, Han, "On-Device Training Under 256KB Memory", NeurIPS 2022, section 3.2 (sparse update of
sub-tensors). A mask over a whole tensor (``prepare(masks=...)``) trains the same weights, but computes and stores all of it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from edgecl.splitting import SplitError, copied, listing

Layer = nn.Conv1d | nn.Conv2d | nn.Linear


class ChannelParts(nn.Module):
    """A layer whose output channels are computed in two parts, ``trained`` and ``frozen``, each a layer with weights of its own.

    Args:
        layer: A linear layer or a convolution, plain or depthwise (one input channel a group).
        channels: Output channels of ``trained``, in increasing order.
    """

    joined: Tensor | None
    order: Tensor | None

    def __init__(self, layer: Layer, channels: Sequence[int]) -> None:
        super().__init__()
        rest = sorted(set(range(layer.weight.shape[0])) - set(channels))
        self.axis = -1 if isinstance(layer, nn.Linear) else 1
        self.trained, self.frozen = _part(layer, channels), _part(layer, rest)
        self.depthwise = getattr(layer, "groups", 1) > 1
        self.first = len(channels)
        joined = torch.tensor([*channels, *rest])
        moved = bool((joined[1:] < joined[:-1]).any())
        self.register_buffer("joined", joined if moved and self.depthwise else None, persistent=False)
        self.register_buffer("order", joined.argsort() if moved else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes."""
        if self.depthwise:
            x = x if self.joined is None else x.index_select(1, self.joined)
            parts = [self.trained(x[:, : self.first]), self.frozen(x[:, self.first :])]
        else:
            parts = [self.trained(x), self.frozen(x)]
        y = torch.cat(parts, self.axis)
        return y if self.order is None else y.index_select(self.axis, self.order)


def _part(layer: Layer, channels: Sequence[int]) -> nn.Module:
    """The layer with some of its output channels."""
    part = copied(layer)
    assert isinstance(part, Layer)
    part.weight = nn.Parameter(layer.weight.detach()[list(channels)].clone())
    if layer.bias is not None:
        part.bias = nn.Parameter(layer.bias.detach()[list(channels)].clone())
    if isinstance(part, nn.Linear):
        part.out_features = len(channels)
    else:
        part.out_channels = len(channels)
        if part.groups > 1:
            part.in_channels = part.groups = len(channels)
    return part


def split_channels(model: nn.Module, channels: Mapping[str, Sequence[int]]) -> nn.Module:
    """Copy ``model`` with some layers in two parts, so that a pattern of ``trainable`` can name the part that learns.

    Their parameters are then ``NAME.trained.weight`` and ``NAME.frozen.weight`` (and ``bias``).

    Args:
        model: Any module.
        channels: Output channels to train by the name of an ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d``; at least one, not all. The
            first ones of a layer are fastest: others have to be put back into their places.

    Raises:
        SplitError: when a name is none of such a layer, its groups are neither one nor one a channel, or the channels do not fit.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    >>> parts = split_channels(net, {"0": [0, 1]})
    >>> {name: tuple(p.shape) for name, p in parts.named_parameters() if name.endswith("weight")}
    {'0.trained.weight': (2, 3, 3, 3), '0.frozen.weight': (6, 3, 3, 3)}
    >>> x = torch.rand(1, 3, 5, 5)
    >>> torch.allclose(parts(x), net(x), atol=1e-6)
    True
    """
    whole = copied(model)
    layers = {name: module for name, module in whole.named_modules() if name and isinstance(module, Layer)}
    for name, chosen in channels.items():
        if name not in layers:
            known = listing(name, layers)
            raise SplitError(f"channels: must be of an nn.Linear, nn.Conv1d or nn.Conv2d, got {name!r}; choose some of: {known}")
        layer = layers[name]
        outputs, groups = layer.weight.shape[0], getattr(layer, "groups", 1)
        if groups > 1 and not groups == outputs == getattr(layer, "in_channels", 0):
            raise SplitError(f"channels: {name!r} must have one group, or one a channel, got {groups} groups; leave it out")
        ok = len(chosen) == len(set(chosen)) and all(type(c) is int and 0 <= c < outputs for c in chosen) and 0 < len(chosen) < outputs
        if not ok:
            raise SplitError(
                f"channels: of {name!r} must be different integers below {outputs}, at least one and not all, got {list(chosen)}; "
                "leave the layer out to train or freeze it as a whole"
            )
        parent, _, last = name.rpartition(".")
        setattr(whole.get_submodule(parent), last, ChannelParts(layer, sorted(chosen)))
    return whole
