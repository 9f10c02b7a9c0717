"""What a compiled program costs, by the compiler's own estimates and a model of the links.

Nothing here was measured on hardware. Matrix products and vector work: the compiler's
`estimated_cycles` of each instruction, as often as it runs. It makes none for kernels: those of
attention take what their matrix products need at the peak, times a factor of the chip's
(chips.py). Nor for collectives: they take their bytes by the links' rate, and a blocking one 5 us
besides; one over the whole slice uses a link along each axis, any other a single one. An
asynchronous one is taken to be hidden behind what runs beside it, a blocking one adds its time.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from cir_jax.aot import hlo
from cir_jax.aot.chips import Topology

_KERNEL = "tpu_custom_call"
_LATENCY_S = 5e-6


@dataclasses.dataclass(frozen=True)
class Collective:
    """That one device takes part in `times`. size: devices; bytes: of the larger of what goes in
    and comes out, each time."""

    kind: str
    dtypes: tuple[str, ...]
    size: int
    bytes: int
    times: int
    blocking: bool
    op_name: str

    def seconds(self, topology: Topology) -> float:
        """Of all times, as a ring needs it, in which each device passes on all but its own part."""
        axes = sum(n > 1 for n in topology.shape) if self.size == topology.num_devices else 1
        rate = topology.chip.link_bytes_per_s * max(1, axes)
        rounds = 2 if self.kind == "all-reduce" else 1
        share = (self.size - 1) / self.size if self.kind != "collective-permute" else 1
        latency = _LATENCY_S if self.blocking else 0.0
        return self.times * (rounds * self.bytes * share / rate + latency)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run. cycles: of all but kernels. kernel_flops: of attention's matrix products, forward
    and backward, in blocks that the causal mask leaves."""

    cycles: int
    kernel_flops: tuple[int, int]
    read: int
    written: int
    collectives: tuple[Collective, ...]

    @property
    def traffic(self) -> int:
        return self.read + self.written

    def compute_s(self, topology: Topology) -> float | None:
        clock = topology.chip.clock_hz
        return None if clock is None else self.cycles / clock

    def kernels_s(self, topology: Topology) -> float | None:
        factors = topology.chip.splash
        if factors is None:
            return None
        scaled = sum(n * f for n, f in zip(self.kernel_flops, factors, strict=True))
        return scaled / topology.chip.flops_per_s

    def links_s(self, topology: Topology, *, blocking: bool) -> float:
        return sum(c.seconds(topology) for c in self.collectives if c.blocking == blocking)

    def seconds(self, topology: Topology) -> float | None:
        """None where the clock is unknown."""
        parts = self.compute_s(topology), self.kernels_s(topology)
        if None in parts:
            return None
        return sum(parts) + self.links_s(topology, blocking=True)


def cost(
    module: hlo.Module,
    *,
    trips: Mapping[str, int],
    loop: str | None,
    idle: tuple[str, ...] = (),
) -> Cost:
    """As `hlo.schedule`, of the whole program or of one iteration of a loop."""
    runs = hlo.schedule(module, trips=trips, loop=loop, idle=idle)
    flops = [0, 0]
    for run in runs:
        if run.instruction.target == _KERNEL:
            backward, number = _kernel(run.instruction)
            flops[backward] += run.times * number
    return Cost(
        cycles=sum(run.times * run.instruction.cycles for run in runs),
        kernel_flops=(flops[0], flops[1]),
        read=sum(run.times * run.read for run in runs),
        written=sum(run.times * run.written for run in runs),
        collectives=tuple(_collectives(module, runs)),
    )


def _kernel(call: hlo.Instruction) -> tuple[bool, int]:
    """Whether it is attention's backward pass, and its FLOPs; none of other kernels."""
    if "splash" not in call.name + call.op_name:
        return False, 0
    block = int(call.attribute(r'block_q(?:_dkv)?\\*": (\d+)') or 0)
    # Queries and their gradients are the largest operands: [..., heads, positions, head size].
    *others, T, H = max((x.dims for x in hlo.leaves(_operands(call))), key=math.prod)
    blocks = -(-T // block) if block else 1
    live = blocks * (blocks + 1) // 2
    size = (block or T) ** 2 * H * live * math.prod(others)
    backward = "dkv" in call.name
    return backward, (10 if backward else 4) * size


def _operands(call: hlo.Instruction) -> tuple[hlo.Shape, ...]:
    return tuple(i.shape for i in call.operands)


def _collectives(module: hlo.Module, runs: Iterable[hlo.Access]) -> Iterable[Collective]:
    carried = set()
    for run in runs:
        for i, kind, asynchronous in _inside(module, run.instruction):
            # One that goes on beside several fusions is in each of them.
            key = run.instruction.computation, i.attribute(r"channel_id=(\d+)"), i.op_name
            if asynchronous and key in carried:
                continue
            carried.add(key)
            yield Collective(
                kind=kind,
                dtypes=tuple(sorted({x.dtype for x in hlo.leaves(i.result)})),
                size=_group_size(i),
                bytes=max(
                    sum(x.data_bytes for x in hlo.leaves(s)) for s in (i.result, _operands(i))
                ),
                times=run.times,
                blocking=not asynchronous,
                op_name=i.op_name or run.instruction.op_name,
            )


def _inside(module: hlo.Module, i: hlo.Instruction) -> Iterable[tuple[hlo.Instruction, str, bool]]:
    """The collectives that an instruction is or holds, their kinds, and whether others run beside
    them."""
    kind = i.opcode.removesuffix("-start")
    if kind in hlo.COLLECTIVES:
        yield i, kind, kind != i.opcode
    elif i.opcode in ("fusion", "async-start"):
        called = i.called("calls")
        instructions = module.computations[called].instructions
        marks = {called, *(x.target for x in instructions)}
        beside = i.opcode == "async-start" or any(
            mark.startswith(("async_collective", "AsyncCollective")) for mark in marks
        )
        for inner in instructions:
            for found, kind, asynchronous in _inside(module, inner):
                # One operation on the links, though written as a sum and a slice of it.
                scattered = called.startswith("all-reduce-scatter")
                yield found, "reduce-scatter" if scattered else kind, beside or asynchronous


def _group_size(i: hlo.Instruction) -> int:
    """Of the devices that exchange something; of a permutation 2."""
    if listed := i.attribute(r"replica_groups=\{\{([\d,]*)\}"):
        return len(listed.split(","))
    if shape := i.attribute(r"replica_groups=\[\d+,(\d+)\]"):
        return int(shape)
    return 2
