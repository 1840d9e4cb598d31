"""Batch norm whose statistics are state: stored ones, those of a batch, or stored ones that a sample moves.

A suffix's batch norms are replaced, in the learner's own copy, by modules that read statistics which they are given and report those that
they found. What they do is said by :meth:`Statistics.using`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from edgecl.learner import State
from edgecl.splitting import recorded
from edgecl_device.errors import InputError

STORED, ROWS, MOVED, MIXED = "stored", "rows", "moved", "mixed"


class Statistics:
    """What all batch norms of a suffix do at the moment, and what they found.

    Args:
        suffix: Its batch norms are replaced by :class:`StatNorm`, under the same names.

    Attributes:
        names: Dotted names of the batch norms.

    Raises:
        InputError: when one has no stored statistics.
    """

    def __init__(self, suffix: nn.Module) -> None:
        self.mode = STORED
        self.share = 0.0
        self.reports = False
        self.found: State = {}
        self._norms: dict[str, StatNorm] = {}  # not the suffix, which holds them: a traced module in such a circle cannot be pickled
        for name, norm in list(suffix.named_modules()):
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                if norm.running_mean is None or norm.running_var is None:
                    raise InputError(f"suffix: batch norm {name!r} must have stored statistics, it tracks none; train it with them")
                parent, _, own = name.rpartition(".")
                self._norms[name] = StatNorm(norm, name, self)
                setattr(suffix.get_submodule(parent), own, self._norms[name])
        self.names = list(self._norms)

    def initial(self) -> State:
        """The stored statistics, new tensors: ``NAME.mean`` and ``NAME.var``, each [C]."""
        return {f"{name}.{part}": norm.get_buffer(part).clone() for name, norm in self._norms.items() for part in ("mean", "var")}

    @contextmanager
    def using(self, mode: str, share: float = 0.0, reports: bool = False) -> Iterator[State]:
        """While inside, every norm works in one mode; yields what they report, by the names of :meth:`initial`.

        Args:
            mode: ``stored``: by the statistics given; a scale and a shift. ``rows``: by those of the batch, through which gradients go.
                ``moved``: by the given ones, moved by ``share`` towards the batch's (:func:`moved`). ``mixed``: by ``1 - share`` times the
                given ones and ``share`` times the batch's.
            share: Of ``moved`` and ``mixed``.
            reports: Whether the statistics that were used are wanted.
        """
        before = self.mode, self.share, self.reports, self.found
        self.mode, self.share, self.reports, self.found = mode, share, reports, {}
        try:
            yield self.found
        finally:
            self.mode, self.share, self.reports, self.found = before


class StatNorm(nn.Module):
    """One batch norm: parameters ``weight`` and ``bias`` as the norm has that it replaces, buffers ``mean`` and ``var``.

    Args:
        norm: It.
        name: Its dotted name.
        statistics: What to do.
    """

    mean: Tensor
    var: Tensor

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm, name: str, statistics: Statistics) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        self.weight, self.bias, self.eps, self.name = norm.weight, norm.bias, norm.eps, name
        self.register_buffer("mean", norm.running_mean)
        self.register_buffer("var", norm.running_var)
        self._statistics = statistics

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [N, C, ...], normalised."""
        now = self._statistics
        if now.reports and f"{self.name}.mean" in now.found:
            raise InputError(
                f"suffix: batch norm {self.name!r} must be called once, it is called again, and its statistics are of one place; "
                "give each call a norm of its own"
            )
        if now.mode == ROWS:
            if now.reports:
                with torch.no_grad():  # found, not differentiated: the norm below does that for its own
                    now.found[f"{self.name}.mean"], now.found[f"{self.name}.var"] = statistics_of(x)
            return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        mean, var = self.mean, self.var
        if now.mode != STORED:
            mean, var = (moved if now.mode == MOVED else mixed)(x, mean, var, now.share)
            if now.reports:
                now.found[f"{self.name}.mean"], now.found[f"{self.name}.var"] = mean, var
        return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)


def biases_before_norms(suffix: nn.Module) -> frozenset[str]:
    """Names of the biases of layers whose result goes to one batch norm and nowhere else."""
    graph = suffix.graph if isinstance(suffix, fx.GraphModule) else recorded(suffix)
    modules = dict(suffix.named_modules())
    found = set()
    for node in graph.nodes:
        if node.op == "call_module" and getattr(modules[node.target], "bias", None) is not None and len(node.users) == 1:
            [reader] = node.users
            if reader.op == "call_module" and isinstance(modules[reader.target], nn.modules.batchnorm._BatchNorm):
                found.add(f"{node.target}.bias")
    return frozenset(found)


def statistics_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of ``x`` [N, C, ...], by which a batch norm in training divides: the biased variance."""
    axes = [0, *range(2, x.dim())]
    mean = x.mean(axes, keepdim=True)
    away = x - mean
    return mean.reshape(-1), (away * away).mean(axes, keepdim=True).reshape(-1)


def moved(x: Tensor, mean: Tensor, var: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Running mean and variance [C], moved by ``share`` towards those of ``x``, so that the variance stays that of all that was seen.

    A single image has a mean of its own, and the spread of means is part of the variance: what is averaged is v + mu^2, not v. With
    d = mu_x - mu: ``mu + s d`` and ``v + s (v_x - v) + s (1 - s) d^2``, the same without the difference of squares.

    >>> x = torch.tensor([[[3.0, 5.0]]])  # mean 4, variance 1
    >>> moved(x, torch.tensor([0.0]), torch.tensor([1.0]), 0.5)
    (tensor([2.]), tensor([5.]))
    """
    return blended(mean, var, *statistics_of(x), share)


def blended(mean: Tensor, var: Tensor, centre: Tensor, spread: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Running mean and variance [C], moved by ``share`` towards ``centre`` and ``spread``, the variance that of all that was seen."""
    away = centre - mean
    return mean + away * share, var + (spread - var + away * away * (1 - share)) * share


def mixed(x: Tensor, mean: Tensor, var: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """``(1 - share)`` times the given mean and variance [C], ``share`` times those of ``x``."""
    centre, spread = statistics_of(x)
    return mean + (centre - mean) * share, var + (spread - var) * share
