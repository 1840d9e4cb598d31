"""Parity of an int8 trunk: a rounding that falls to the other side moves a value by a whole step, and many that come after it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edgecl_device.manifest import Array
from edgecl_export.errors import refuse

INT8 = 1.5
"""Largest distance of an engine's latents from eager's, as a share of eager's distance from the float32 trunk's: two int8 evaluations of
which no two roundings agree would be the square root of 2 apart. Measured: 0 to 0.76 (``docs/int8.md``)."""


@dataclass
class Latents:
    """Latents of the same samples from eager's int8 trunk, an engine's, and the trunk in float32."""

    apart: dict[str, list[float]] = field(default_factory=dict)
    error: dict[str, list[float]] = field(default_factory=dict)

    def add(self, eager: Mapping[str, Array], engine: Mapping[str, Array], exact: Mapping[str, Array]) -> None:
        """One sample's, by name."""
        for name, z in eager.items():
            size = max(float(np.linalg.norm(exact[name].astype(np.float64))), 1e-30)
            self.apart.setdefault(name, []).append(float(np.linalg.norm(engine[name].astype(np.float64) - z)) / size)
            self.error.setdefault(name, []).append(float(np.linalg.norm(z.astype(np.float64) - exact[name])) / size)

    def check(self, bar: float) -> str:
        """What was found, empty without samples; a latent may always differ by ``bar``, as those of a float32 trunk may.

        Raises:
            ExportError: naming the latent, the difference and the bar.
        """
        found = []
        for name in self.apart:
            apart, error = (float(np.sqrt(np.mean(np.square(values[name])))) for values in (self.apart, self.error))
            if not apart <= max(INT8 * error, bar):
                why = f"step 'encode': {name} differs from eager by {apart:.2e}, more than {INT8} times what int8 costs ({error:.2e})"
                raise refuse("parity", why, "report this as a defect")
            found.append(f"{name} {apart:.0e} from eager, {error:.0e} from float32")
        return f"int8 trunk: {', '.join(found)}; " if found else ""
