"""Latents as the rows of a memory hold them: one codec a tensor, fitted on base samples and frozen."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgecl.codecs import CODECS, Codec
from edgecl.graph.phases import phase
from edgecl.learner import Problem
from edgecl.methods._features import SMALLEST_NORM
from edgecl_device.manifest import TensorSpec


class CodedRows:
    """What a learner has whose memory keeps latents; a mixin, in front of :class:`edgecl.methods._suffix.SuffixLearner`.

    Attributes:
        codecs: By the name of a latent's tensor; the one of a latent that is a single tensor is empty.
    """

    problem: Problem
    codecs: dict[str, Codec]

    def code_rows(self, codec: str, config: Any) -> None:
        """Choose the codecs: of float32 tensors ``codec``, with what it takes of ``config``; integers are stored as they are."""
        latent = self.problem.features
        features = {"": latent} if isinstance(latent, TensorSpec) else latent
        self._names = list(features)
        self.codecs = {name: CODECS[codec if spec.dtype == "float32" else "float32"].of(config) for name, spec in features.items()}
        self._coded = [
            TensorSpec(f"z.{name}" if name else "z", row.shape, row.dtype)
            for name, row in ((name, self.codecs[name].row_spec(spec)) for name, spec in features.items())
        ]

    def calibrate(self, latents: Any) -> None:
        """Fit the codecs on latents [N, ...] of base samples."""
        for name, part in self._parts(latents).items():
            self.codecs[name].fit(part)

    def reconstruction(self, latents: Any) -> float:
        """Squared error of decoded latents [N, ...] over their square."""
        with torch.no_grad():
            return float(self._error(latents, self._decode(self._encode(latents))))

    @property
    def codebooks(self) -> tuple[Tensor, ...]:
        """Those of the codecs."""
        return tuple(table for codec in self.codecs.values() for table in codec.constants())

    def row_fields(self, target: bool = True) -> tuple[TensorSpec, ...]:
        """Fields of a row: codes and, with ``target``, the target where it is no class index."""
        stored = self.problem.target.stored(self.problem.max_classes) if target else None
        return tuple(self._coded + ([] if stored is None else [stored]))

    def row_inputs(self, fields: tuple[TensorSpec, ...], rows: int) -> dict[str, Any]:
        """So many rows as the input of a step: ``z`` in the latent's form, and what else a row has by its name."""
        specs = {field.name: TensorSpec(field.name, (rows, *field.shape), field.dtype) for field in fields}
        codes = {name: specs.pop(f"z.{name}" if name else "z") for name in self._names}
        return {"z": self._whole(codes), **specs}

    def _filled(self, rows: Any, code: Any, real: Tensor) -> Any:
        """Rows with this sample's code in place of filler: of zeros a suffix may make NaN, which no weight of zero takes away."""
        own = self._parts(code)
        return self._whole(
            {
                name: torch.where((real > 0).reshape(-1, *[1] * (part.dim() - 1)), part, own[name])
                for name, part in self._parts(rows).items()
            }
        )

    def _error(self, z: Any, decoded: Any) -> Tensor:
        """Squared error over squared length, float32 []."""
        others = self._parts(decoded)
        pairs = [(part.to(torch.float32), others[name].to(torch.float32)) for name, part in self._parts(z).items()]
        error = torch.stack([((part - other) * (part - other)).sum() for part, other in pairs]).sum()
        return error / torch.stack([(part * part).sum() for part, _ in pairs]).sum().clamp_min(SMALLEST_NORM)

    def _parts(self, z: Any) -> dict[str, Tensor]:
        return dict(z) if isinstance(z, Mapping) else {"": z}

    def _whole(self, parts: dict[str, Any]) -> Any:
        return parts[""] if self._names == [""] else parts

    def _encode(self, z: Any) -> Any:
        with phase("replay_encode"):
            return self._whole({name: self.codecs[name].encode(part) for name, part in self._parts(z).items()})

    def _decode(self, code: Any) -> Any:
        with phase("replay_decode"):
            return self._whole({name: self.codecs[name].decode(part) for name, part in self._parts(code).items()})

    def _join(self, first: Any, rest: Any) -> Any:
        parts = self._parts(rest)
        return self._whole({name: torch.cat([part, parts[name]]) for name, part in self._parts(first).items()})

    def _row(self, code: Any) -> dict[str, Tensor]:
        return {f"row.z.{name}" if name else "row.z": part for name, part in self._parts(code).items()}
