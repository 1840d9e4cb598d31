"""PyTorch without oneDNN for a while: its kernels are this machine's, and its LSTM is none that every runtime has."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def without_onednn() -> Iterator[None]:
    """Inside, layers run in PyTorch's own operators; ``torch.backends.mkldnn.flags`` would warn of settings that it leaves alone."""
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.enabled
    mkldnn.enabled = False
    try:
        yield
    finally:
        mkldnn.enabled = before
