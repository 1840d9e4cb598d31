"""What masks are made of, for every method that trains or keeps a part: criteria, the choice of the best, schedules, bitmaps.

A criterion is a pure function from tensors to scores of the same shape, or of one score a unit. A unit is a weight, or a block of output
channels. :func:`top` chooses, :class:`Schedule` says how many, :mod:`edgecl.masks.bitmap` stores one bit a weight.
"""

from edgecl.masks.bitmap import pack, unpack
from edgecl.masks.choose import places, slots, top
from edgecl.masks.criteria import cwi, fixed_half, gradient, magnitude, output_magnitude, random, table_shape
from edgecl.masks.nominal import Density, nominal_macs
from edgecl.masks.schedule import Schedule
from edgecl.masks.units import by_unit, channels_of

__all__ = [
    "Density",
    "Schedule",
    "by_unit",
    "channels_of",
    "cwi",
    "fixed_half",
    "gradient",
    "magnitude",
    "nominal_macs",
    "output_magnitude",
    "pack",
    "places",
    "random",
    "slots",
    "table_shape",
    "top",
    "unpack",
]
