"""A new head for a network that was trained on other classes."""

from typing import TypeVar

from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def with_head(net: Net, at: str, classes: int) -> Net:
    """The network, its classifier replaced by one of zeros for other classes.

    Args:
        net: Changed in place.
        at: Dotted name of its classifier, a linear layer.
        classes: Of the new one.

    >>> with_head(nn.Sequential(nn.Linear(4, 2)), "0", 3)[0].weight.sum().item()
    0.0
    """
    old = net.get_submodule(at)
    assert isinstance(old, nn.Linear)
    head = nn.Linear(old.in_features, classes)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    net.set_submodule(at, head)
    return net
