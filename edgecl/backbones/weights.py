"""Published weights: ``.th`` and ``.pth`` checkpoints and ``.safetensors`` files."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from edgecl_device.checks import short
from edgecl_device.errors import EdgeclError


class WeightsError(EdgeclError, ValueError):
    """A weight file is missing, unreadable, or does not fit the model."""


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a weight file into ``model``, every key and shape exactly; the prefix ``module.`` of the keys is dropped.

    Only tensors are read: a checkpoint cannot run code. A checkpoint may hold the weights under ``state_dict``.

    Raises:
        WeightsError: naming what is missing, unexpected or of another shape; the model is then as it was.
    """
    if not isinstance(path, (str, Path)):
        raise WeightsError(f"path: must be a file's path, got {short(path)}; pass a string or a pathlib.Path")
    path = Path(path)
    read = _read(path)
    weights = {key.removeprefix("module."): value for key, value in read.items()}
    if len(weights) < len(read):
        raise WeightsError(f"{path}: keys must be different, some are there with and without 'module.'; save model.state_dict() again")
    own = model.state_dict()
    # Files older than PyTorch 0.4.1 lack this counter, which eval mode never reads.
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in weights if key not in own]
    if missing or unexpected:
        raise WeightsError(
            f"{path}: keys do not fit the model; missing {_first(missing)}; unexpected {_first(unexpected)}; load it into the"
            " architecture and width that it was saved from"
        )
    for key, value in weights.items():
        if value.shape != own[key].shape:
            raise WeightsError(
                f"{path}: {key} must have shape {list(own[key].shape)}, got {list(value.shape)};"
                " build the model with the file's number of classes and width, then widen its head"
            )
    model.load_state_dict({key: _like(own[key], value, f"{path}: {key}") for key, value in weights.items()}, strict=False)


def _like(own: Tensor, value: Tensor, name: str) -> Tensor:
    """A value as a tensor of the model's type, which holds it."""
    try:
        if value.is_complex():
            raise ValueError("complex numbers")
        found = torch.empty_like(own).copy_(value)
        if (torch.isfinite(value) & ~torch.isfinite(found)).any():
            raise ValueError("values too large for it")
    except Exception as error:  # a tensor may be sparse, quantised or without values, and each raises something else
        cause = short(str(error).partition("\n")[0])
        raise WeightsError(
            f"{name} must hold {own.dtype} values, got {value.dtype} ({cause}); save the weights as dense real tensors"
        ) from error
    return found


def _read(path: Path) -> dict[str, Tensor]:
    try:
        there = path.is_file()
    except (OSError, ValueError):  # too long a name, or one with a zero byte
        there = False
    if not there:
        raise WeightsError(f"{short(str(path)) if len(str(path)) > 1000 else path}: no such file; download the weights first")
    try:
        data = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # arbitrary bytes make an unpickler raise anything
        cause = f"{type(error).__name__}: {str(error).partition('.')[0][:120]}"  # torch goes on with advice on running code from files
        raise WeightsError(f"{path}: not a readable weight file ({cause}); it must hold tensors only, download it again") from error
    data = data.get("state_dict", data) if isinstance(data, dict) else data
    if not isinstance(data, dict) or not all(isinstance(key, str) and isinstance(value, Tensor) for key, value in data.items()):
        raise WeightsError(f"{path}: must hold a mapping of names to tensors; save model.state_dict()")
    return data


def _first(keys: list[str], limit: int = 8) -> str:
    return ", ".join(keys[:limit]) + (f" and {len(keys) - limit} more" if len(keys) > limit else "") or "none"
