"""A network with what a task of its own needs: kernels behind frozen convolutions, and norms whose statistics are handed in.

Both are put in place of modules of a copy; the graph that :mod:`torch.fx` records stays, so that parameters are found by the names of
the user's model, those of a new kernel under ``reprogram`` and those of the convolution before it under ``conv``.
"""

import copy
import operator
from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from edgecl.splitting import recorded

_CONVOLUTIONS: dict[type[nn.Module], type[nn.Module]] = {nn.Conv1d: nn.Conv1d, nn.Conv2d: nn.Conv2d}
Batch = Tensor | Literal[True] | None
"""When a norm uses the statistics of its input: where a number is above 0, always, or never."""
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


class TaskNorm(nn.Module):
    """Batch norm whose statistics belong to a task, and which tells those of its input.

    Args:
        norm: The batch norm that it stands for, with stored statistics.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        self.weight: nn.Parameter | None = norm.weight
        self.bias: nn.Parameter | None = norm.bias
        self.eps = norm.eps
        self.register_buffer("running_mean", norm.running_mean.clone())
        self.register_buffer("running_var", norm.running_var.clone())

    def forward(self, x: Tensor, share: Tensor | None = None, full: Batch = None) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """The input, normalised by the stored statistics; with ``share`` also mean and variance [C] of the input.

        Args:
            x: float32 [N, C, ...].
            share: Share of each row in mean and variance, float32 [N], in sum 1.
            full: Where above 0, float32 [], mean and variance of the input normalise it; None never does, True always: rows of equal share.
        """
        if share is None:
            return self._stored(x)
        if full is None:
            return (self._stored(x), *moments(x.detach(), share))
        if full is True:
            return (F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps), *moments(x.detach(), share))
        mean, variance = moments(x, share)
        used = torch.where(full > 0, mean, self.running_mean), torch.where(full > 0, variance, self.running_var)
        scale = torch.rsqrt(used[1] + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = used[0] * scale * -1.0 if self.bias is None else self.bias - used[0] * scale
        return x * _per_channel(scale, x) + _per_channel(shift, x), mean.detach(), variance.detach()

    def _stored(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def moments(x: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of ``x`` [N, C, ...] over positions and rows, each row by its ``share`` [N].

    >>> moments(torch.tensor([[[1.0, 3.0]], [[9.0, 9.0]]]), torch.tensor([1.0, 0.0]))
    (tensor([2.]), tensor([1.]))
    """
    mean = _shared(x, share)
    away = x - _per_channel(mean, x)
    return mean, _shared(away * away, share)


def _shared(x: Tensor, share: Tensor) -> Tensor:
    rows = x.mean(list(range(2, x.dim()))) if x.dim() > 2 else x
    return (rows * share.unsqueeze(1)).sum(0)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(-1, *[1] * (like.dim() - 2))


def reprogrammed(suffix: nn.Module, full: bool, head: str) -> fx.GraphModule:
    """A copy of a network with a new kernel behind every convolution but those of one tap, and with :class:`TaskNorm` for batch norms.

    Args:
        suffix: Any module that :mod:`torch.fx` can trace.
        full: Whether convolutions of one tap get a kernel as well.
        head: The module that stays as it is.
    """
    root = copy.deepcopy(suffix)
    graph = recorded(root)
    for name in dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module"):
        module = root.get_submodule(name)
        if isinstance(module, _NORMS) and module.running_mean is not None:
            _put(root, name, TaskNorm(module))
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)) and name != head and (full or max(module.kernel_size) > 1):
            _put(root, name, nn.Sequential(OrderedDict(conv=module, reprogram=identity_kernel(module))))
    return fx.GraphModule(root, graph).eval()


def identity_kernel(behind: nn.Conv1d | nn.Conv2d) -> nn.Module:
    """A depthwise convolution of three taps a dimension behind another one, which gives back what it gets, to the bit."""
    channels = behind.out_channels
    kernel = _CONVOLUTIONS[type(behind)](channels, channels, 3, padding=1, groups=channels, bias=False)
    nn.init.dirac_(kernel.weight, channels)  # type: ignore[arg-type]
    return kernel


def with_moments(network: fx.GraphModule) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The network with the arguments ``share`` and ``full`` of its norms and, beside its scores, a pair of moments a call of a norm.

    Args:
        network: Of :func:`reprogrammed`; parameters and modules are shared with it.

    Returns:
        The network, and the norms' names in the order of the pairs.
    """
    graph = fx.Graph()
    result = graph.graph_copy(network.graph, {})
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    with graph.inserting_after(last):
        share = graph.placeholder("share")
    with graph.inserting_after(share):
        full = graph.placeholder("full")
    names, pairs = [], []
    for node in list(graph.nodes):
        if node.op != "call_module" or not isinstance(network.get_submodule(str(node.target)), TaskNorm):
            continue
        with graph.inserting_after(node):
            scaled, mean, variance = (graph.call_function(operator.getitem, (node, i)) for i in (0, 1, 2))
        node.replace_all_uses_with(scaled, delete_user_cb=lambda user, own=(scaled, mean, variance): user not in own)
        result = scaled if result is node else result
        node.args = (*node.args, share, full)
        names.append(str(node.target))
        pairs.append((mean, variance))
    graph.output((result, tuple(pairs)))
    return fx.GraphModule(network, graph).eval(), tuple(names)


def last_layer(suffix: nn.Module) -> str:
    """The linear layer or convolution that a network calls last, its head; empty when it calls none."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d)
    names = [str(node.target) for node in recorded(suffix).nodes if node.op == "call_module"]
    return next((name for name in reversed(names) if isinstance(suffix.get_submodule(name), layers)), "")


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, field = name.rpartition(".")
    setattr(root.get_submodule(owner), field, module)
