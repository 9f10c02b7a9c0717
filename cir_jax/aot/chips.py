"""TPU generations: what one device of each can do, and which slices there are.

A device is what jax calls one: a chip of v5e, v5p and v6e, one of the two cores of a chip of v4
and tpu7x.
Sources: FLOP/s, HBM and links, "How to Scale Your Model" (jax-ml.github.io/scaling-book, TPUs,
table of 2025), whose 2.8e12 B/s for v5p's HBM jax's own table and libtpu's model put at 2.46e12
and 2.35e12. Usable HBM: what libtpu 0.0.51's own error messages say. Clocks follow from the peak
and the size of the matrix units; where they are unknown, no time is given. Kernels: VLIW bundles
that libtpu schedules for splash attention with heads of 128, one bundle a cycle.
"""

import dataclasses
import math
import re

from cir_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device.

    flops_per_s: bfloat16. hbm_gib: what programs can use. links: one-way, of the ICI, bytes/s each,
    one a torus axis in use. clock_hz: None: unknown. splash: cycles of attention's kernel as
    multiples of those that its matrix products need at the peak, forward and backward; None:
    unknown.
    """

    flops_per_s: float
    hbm_bytes_per_s: float
    hbm_gib: float
    link_bytes_per_s: float
    axes: int
    clock_hz: float | None
    splash: tuple[float, float] | None
    devices_per_chip: int = 1


CHIPS = {
    "v4": Chip(2.75e14 / 2, 1.2e12 / 2, 15.25, 4.5e10, 3, None, None, 2),
    "v5e": Chip(1.97e14, 8.1e11, 15.75, 4.5e10, 2, 1.5e9, (1.16, 1.0)),
    "v5p": Chip(4.59e14, 2.8e12, 95.73, 9e10, 3, 1.75e9, (1.16, 1.0)),
    "v6e": Chip(9.2e14, 1.6e12, 31.24, 9e10, 2, 1.75e9, (4.32, 2.81)),
    "tpu7x": Chip(2.31e15 / 2, 7.4e12 / 2, 94.74, 9e10, 3, None, None, 2),
}

_NAME = re.compile(r"(v4|v5e|v5p|v6e|tpu7x):(\d+(?:x\d+){1,2})", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its generation and the chips along each axis."""

    kind: str
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * self.chip.devices_per_chip


def topology(name: str) -> Topology:
    """Of a name such as v5e:4x4. ConfigError if it is none."""
    found = _NAME.fullmatch(name)
    if not found:
        raise ConfigError(
            f"--topology={name!r}: must be GENERATION:AxB or GENERATION:AxBxC in chips, such as "
            f"v5e:4x4 or v5p:2x2x2; generations: {', '.join(CHIPS)}"
        )
    result = Topology(found[1].lower(), tuple(map(int, found[2].split("x"))))
    if len(result.shape) != result.chip.axes or 0 in result.shape:
        raise ConfigError(
            f"--topology={name!r}: {result.kind} slices have {result.chip.axes} axes, such as "
            f"{result.kind}:{'x'.join('2' * result.chip.axes)}"
        )
    return result
