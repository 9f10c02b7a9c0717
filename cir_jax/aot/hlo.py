"""Main-memory traffic of a compiled TPU program, counted from its optimized HLO text.

The text is that of `compiled.as_text()`, or the compiler's own after its last step, which has
cycles; jaxlib's own view of a module has no shapes. Counted are bytes between HBM and one device:
each instruction reads its operands once and writes its result once. So it is a floor: a kernel
that reads an operand twice is not seen. (`cost_analysis()` counts a loop's body once, whatever the
number of iterations.)

- Buffers outside HBM (`S(1)` is VMEM) cost nothing, nor do new names for what is there already:
  tuples and their elements, bitcasts, parameters.
- A fusion reads what its result needs: of an operand that is only sliced, the slices.
- dynamic-update-slice and scatter into an operand write the update: they work in place, and where
  they could not, the compiler has put a copy before them, which counts.
- Arrays count with the padding of their tiles, parts of arrays in proportion.
- Loops count as often as they run, conditionals as their most expensive branch.
- Asynchronous operations count where they start. Custom calls, so Pallas kernels too, read all of
  their operands and write all of their results.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping

FREE = frozenset(
    "add-dependency after-all bitcast constant get-tuple-element opt-barrier parameter "
    "partition-id replica-id tuple".split()
)
# They reserve a buffer or rename one.
FREE_CALLS = frozenset(["AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast"])
SLICES = frozenset(["dynamic-slice", "gather", "slice"])
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is the update
# Each element of the result needs one element of the first operand.
ONE_TO_ONE = frozenset(
    ["bitcast", "bitcast-convert", "convert", "copy", "reshape", "reverse", "transpose", *UPDATES]
)
COLLECTIVES = frozenset(
    ["all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"]
)
# An asynchronous collective is carried from fusion to fusion, as a result of each.
CARRIED = COLLECTIVES | {"parameter"}
SAME_NUMBER = frozenset(["bitcast", "convert", "copy", "copy-done", "copy-start", "reshape"])


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's shape: sizes, dimensions from minor to major, tiles, bits of an element, space."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]
    tiles: tuple[tuple[int, ...], ...]
    bits: int
    space: int

    @property
    def data_bytes(self) -> int:
        """Of its elements, wherever they lie."""
        return math.prod(self.dims) * self.bits // 8

    @property
    def hbm_bytes(self) -> int:
        """With the padding of tiles; 0 in another memory space."""
        sizes = [self.dims[i] for i in reversed(self.order)]
        for tile in self.tiles:
            sizes = [1] * (len(tile) - len(sizes)) + sizes
            outer = len(sizes) - len(tile)
            sizes[outer:] = [-(-n // t) for n, t in zip(sizes[outer:], tile, strict=True)] + [*tile]
        return 0 if self.space else math.prod(sizes) * self.bits // 8


Shape = Array | tuple["Shape", ...]


def leaves(shape: Shape) -> list[Array]:
    return [shape] if isinstance(shape, Array) else [x for part in shape for x in leaves(part)]


def _hbm_bytes(shape: Shape) -> int:
    return sum(x.hbm_bytes for x in leaves(shape))


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """arguments: the text between the parentheses; attributes: the text that follows."""

    name: str
    opcode: str
    shape: Shape
    operands: tuple["Instruction", ...]
    arguments: str
    attributes: str
    computation: str

    def attribute(self, pattern: str) -> str:
        """What the pattern's group matches in the attributes, or nothing."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int:
        """The compiler's estimate; 0 where it makes none."""
        return int(self.attribute(r'"estimated_cycles":"(\d+)"') or 0)

    def called(self, kind: str) -> str:
        """The name of the computation with this role."""
        return self.attribute(rf"\b{kind}=%?([\w.\-]+)")

    @property
    def op_name(self) -> str:
        """Where it comes from in the traced function, such as jit(f)/while/body/add."""
        return self.attribute(r'op_name="([^"]*)"')

    @property
    def target(self) -> str:
        """The function that a custom call calls."""
        return self.attribute(r'custom_call_target="([^"]*)"')

    @property
    def index(self) -> int | None:
        """Which element get-tuple-element gets."""
        return int(self.attribute(r"\bindex=(\d+)")) if self.opcode == "get-tuple-element" else None

    @property
    def result(self) -> Shape:
        """Its shape, or that of what a start will have given when it is done."""
        if not self.opcode.endswith("-start") or self.opcode == "all-reduce-start":
            return self.shape
        # A copy's is (result, operand, ...), all others' (operands, results, ...).
        return self.shape[self.opcode != "copy-start"]


@dataclasses.dataclass(frozen=True)
class Computation:
    instructions: tuple[Instruction, ...]
    root: Instruction


@dataclasses.dataclass(frozen=True)
class Module:
    """loops: the while instruction by the names of its body and condition."""

    computations: Mapping[str, Computation]
    entry: str
    loops: Mapping[str, Instruction]

    def after(self, loop: Instruction) -> tuple[Instruction, ...]:
        """What the loop's body gives for each element of the loop's tuple."""
        return self.computations[loop.called("body")].root.operands

    def body(self, loop: str | None) -> str:
        """The body of the one loop whose op_name ends so, else ValueError; None: the program."""
        if loop is None:
            return self.entry
        names = {i.called("body"): i.op_name for i in self.loops.values()}
        found = [body for body, op_name in names.items() if op_name.endswith(loop)]
        if len(found) != 1:
            raise ValueError(
                f"loop={loop!r}: ends {len(found)} names, expected one of {sorted(names.values())}"
            )
        return found[0]


# --- the text


def parse(text: str) -> Module:
    """Reads optimized HLO text; ValueError if it is none."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    known: dict[str, Instruction] = {}
    root = None
    # A kernel's metadata may have lines of their own.
    text = re.sub(r"\n(?=\"|\}\})", " ", re.sub(r"/\*.*?\*/", "", text))
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, known = head[2], {}
            entry = name if head[1] else entry
        elif line.startswith("}") and known:
            computations[name] = Computation(tuple(known.values()), root)
            known = {}
        elif head := re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line):
            shape, rest = _shape(line[head.end() :])
            opcode, rest = rest.strip().split("(", 1)
            depth = itertools.accumulate((c == "(") - (c == ")") for c in rest)
            end = next(n for n, d in enumerate(depth) if d < 0)
            operands = tuple(known[x] for x in re.findall(r"%([\w.\-]+)", rest[:end]))
            instruction = Instruction(
                head[2], opcode, shape, operands, rest[:end], rest[end + 1 :], name
            )
            known[head[2]] = instruction
            root = instruction if head[1] else root
    if not entry:
        raise ValueError("text: has no ENTRY computation, expected optimized HLO")
    loops = {
        i.called(kind): i
        for computation in computations.values()
        for i in computation.instructions
        if i.opcode == "while"
        for kind in ("body", "condition")
    }
    return Module(computations, entry, loops)


def _shape(text: str) -> tuple[Shape, str]:
    """The shape that the text begins with, and the rest."""
    if text.startswith("("):
        parts, text = [], text[1:]
        while not text.startswith(")"):
            part, text = _shape(text.lstrip(", "))
            parts.append(part)
        return tuple(parts), text[1:]
    head = re.match(r"([a-z]+)(\d*)\w*\[([^\]]*)\](?:\{([\d,]*):?([^}]*)\})?", text)
    if not head:
        raise ValueError(f"text: expected a shape, found {text[:60]!r}")

    def numbers(listed: str) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", listed)))

    def layout(letter: str) -> str:
        found = re.search(letter + r"((?:\([\d,]*\))+)", head[5] or "")
        return found[1] if found else ""

    dims = numbers(head[3])
    order = numbers(head[4] or "") or tuple(range(len(dims)))
    tiles = tuple(map(numbers, re.findall(r"\([^)]*\)", layout("T"))))
    # Less than a byte only where the layout says so; tokens have no bits.
    whole = 0 if head[1] in ("token", "opaque") else max((8, *numbers(head[2])))
    bits = numbers(layout("E")) or (whole,)
    (space,) = numbers(layout("S")) or (0,)
    array = Array(head[1] + head[2], dims, order, tiles, bits[0], space)
    return array, text[head.end() :]


# --- one instruction


class _Node:
    """An instruction inside a fusion, or the only one outside, linked to operands and users."""

    def __init__(self, opcode: str, shape: Shape, operands: tuple["_Node", ...] = ()):
        self.opcode, self.operands = opcode, operands
        self.users: list[tuple[_Node, int]] = []
        self.elements = sum(math.prod(x.dims) for x in leaves(shape))
        # A tuple's elements are used where they come out of it.
        for number, operand in enumerate(operands if opcode != "tuple" else ()):
            operand.users.append((self, number))

    def source(self) -> "_Node":
        """What it is another name of."""
        return self.operands[0].source() if self.opcode == "bitcast" else self

    @property
    def in_place(self) -> bool:
        return self.opcode in UPDATES and self.operands[0].source().opcode == "parameter"


def _open(module: Module, instruction: Instruction, operands: tuple[_Node, ...]) -> _Node:
    """The node of an instruction; of a fusion the root's, fusions within it opened as well."""
    if instruction.opcode in ("fusion", "async-start"):
        computation = module.computations[instruction.called("calls")]
        nodes: dict[Instruction, _Node] = {}
        for i in computation.instructions:
            if i.opcode == "parameter":
                nodes[i] = operands[int(i.arguments)]
            else:
                node = _open(module, i, tuple(nodes[x] for x in i.operands))
                in_place = i.opcode == "fusion" and "output_to_operand_aliasing" in i.attributes
                # A copy inside of a fusion that lies where its operand does has other tiles of the
                # same bytes.
                nodes[i] = node.operands[0] if in_place and node.opcode == "copy" else node
        return nodes[computation.root]
    if instruction.index is not None and operands[0].opcode == "tuple":
        return operands[0].operands[instruction.index]
    opcode = instruction.target or instruction.opcode.removesuffix("-start")
    return _Node(opcode, instruction.result, operands)


def _is_free_call(instruction: Instruction) -> bool:
    begins_later = instruction.opcode == "async-start" and not instruction.operands
    return begins_later or instruction.target in FREE_CALLS


def _bytes(module: Module, instruction: Instruction) -> tuple[int, int]:
    """HBM bytes that one run of an instruction other than a loop or branch reads and writes."""
    opcode, inputs, result = instruction.opcode, instruction.operands, instruction.result
    # A gather on the sparse cores is begun without operands, and given them afterwards.
    given_later = opcode == "async-update" and len(inputs) > 1
    if given_later:
        started, *inputs = inputs
        result = instruction.shape[1]
    elif opcode in FREE or opcode.endswith(("-done", "-update")) or _is_free_call(instruction):
        return 0, 0
    operands = tuple(_Node("parameter", i.shape) for i in inputs)
    if given_later and started.op_name.endswith("/gather"):
        root = _Node("gather", result, operands)
    else:
        root = _open(module, started if given_later else instruction, operands)
    if root.opcode == "AsyncCollectiveDone":
        return 0, 0

    results = result if isinstance(result, tuple) else [result]
    outputs = root.operands if root.opcode == "tuple" else [root] * len(results)
    aliases = instruction.attribute(r"output_to_operand_aliasing=\{(.*?\))\}")
    aliased = {int(index or 0) for index in re.findall(r"\{(\d*)\}: \(", aliases)}
    written, whole, carried = 0, set(), set()
    for index, (output, shape) in enumerate(zip(outputs, results, strict=True)):
        output, hbm_bytes = output.source(), _hbm_bytes(shape)
        if output.in_place:
            update = output.operands[UPDATES[output.opcode]]
            written += hbm_bytes * update.elements // output.elements
        elif index in aliased and output.opcode in CARRIED:
            carried.add(output)
        else:
            written += hbm_bytes
            whole.add(output)

    @functools.cache
    def needed(node: _Node) -> int:
        """Elements of it that are read."""
        total = node.elements if node in whole else 0
        for user, number in node.users:
            if user not in carried:
                partly = number == 0 and user.opcode in SLICES | ONE_TO_ONE
                total += needed(user) if partly else node.elements
        return min(total, node.elements)

    read = sum(
        _hbm_bytes(i.shape) * needed(node) // max(1, node.elements)
        for i, node in zip(inputs, operands, strict=True)
    )
    return read, written


# --- loops


def iterations(module: Module, loop: Instruction) -> int | None:
    """How often a while loop runs if the program says so, else None.

    It does where the condition is counter < constant and the body adds a constant to the counter.
    """
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    test = _same(module.computations[loop.called("condition")].root)
    if test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    index = _same(test.operands[0]).index
    if index is None:
        return None
    value, steps = _same(module.after(loop)[index]), []
    while value.opcode == "add":
        steps.append(_constant(module, value.operands[1]))
        value = _same(value.operands[0])
    first = _constant(module, loop.operands[0].operands[index])
    last = _constant(module, test.operands[1])
    if value.index != index or None in (first, last, *steps) or sum(steps) < 1:
        return None
    return max(0, -(-(last - first) // sum(steps)))


def _same(instruction: Instruction) -> Instruction:
    while instruction.opcode in SAME_NUMBER:
        instruction = instruction.operands[0]
    return instruction


def _constant(module: Module, instruction: Instruction) -> int | None:
    """The value of a whole number, also of one that goes through loops unchanged."""
    instruction = _same(instruction)
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments):
        return int(instruction.arguments)
    loop, index = module.loops.get(instruction.computation), instruction.index
    if loop is None or index is None or _same(module.after(loop)[index]).index != index:
        return None
    return _constant(module, loop.operands[0].operands[index])


# --- the program


@dataclasses.dataclass(frozen=True)
class Access:
    """An instruction that runs `times`, and the HBM bytes it reads and writes each time."""

    instruction: Instruction
    times: int
    read: int
    written: int

    @property
    def total(self) -> int:
        return self.times * (self.read + self.written)

    def __str__(self) -> str:
        return (
            f"{self.total / 1e6:.3f} MB: {self.times} x {self.instruction.name} reads "
            f"{self.read / 1e6:.3f}, writes {self.written / 1e6:.3f}, {self.instruction.op_name}"
        )


@dataclasses.dataclass(frozen=True)
class Traffic:
    """HBM bytes per device read and written, and the instructions that do it, largest first."""

    accesses: tuple[Access, ...]

    @property
    def read(self) -> int:
        return sum(a.times * a.read for a in self.accesses)

    @property
    def written(self) -> int:
        return sum(a.times * a.written for a in self.accesses)

    def __str__(self) -> str:
        return "\n".join(map(str, self.accesses))


def schedule(
    module: Module,
    *,
    trips: Mapping[str, int],
    loop: str | None,
    idle: tuple[str, ...] = (),
) -> list[Access]:
    """Every instruction of one run of the program, or of one iteration of a loop of it.

    trips: iterations of while loops by the end of their op_name; the longest that fits counts.
        Loops that `iterations` knows need none.
    loop: the end of one loop's op_name.
    idle: ends of op_names of conditionals that have nothing to do: their cheapest branch counts.

    Raises: ValueError for a loop of unknown length.
    """

    def times(instruction: Instruction) -> int:
        ends = [end for end in trips if instruction.op_name.endswith(end)]
        number = trips[max(ends, key=len)] if ends else iterations(module, instruction)
        if number is None:
            raise ValueError(
                f"trips={dict(trips)}: expected the iterations of loop {instruction.op_name!r}, "
                "which the program leaves open"
            )
        return number

    def taken(conditional: Instruction, branches: list[list[Access]]) -> list[Access]:
        choose = min if conditional.op_name.endswith(idle) else max
        return choose(
            branches, key=lambda accesses: sum(a.total + a.instruction.cycles for a in accesses)
        )

    return _walk(module, module.body(loop), 1, times, taken)


def traffic(module: Module, *, trips: Mapping[str, int], loop: str | None) -> Traffic:
    """HBM traffic of what `schedule` gives."""
    found = [a for a in schedule(module, trips=trips, loop=loop) if a.total]
    return Traffic(tuple(sorted(found, key=lambda a: -a.total)))


def large_writes(module: Module, at_least_bytes: int, *, loop: str | None) -> list[Access]:
    """Instructions that write at least that many bytes of HBM in one run, in all branches.

    They copy a large buffer or make one anew; updates in place count as what they update.
    loop: looks only at the one whose op_name ends so.
    """

    def every(_: Instruction, branches: list[list[Access]]) -> list[Access]:
        return [a for accesses in branches for a in accesses]

    found = _walk(module, module.body(loop), 1, lambda _: 1, every)
    return [a for a in found if a.written >= max(1, at_least_bytes)]


def collectives(module: Module) -> list[tuple[Instruction, int]]:
    """Every collective in the program and the bytes of its result, wherever it lies."""
    found = [
        i
        for computation in module.computations.values()
        for i in computation.instructions
        if i.opcode.removesuffix("-start") in COLLECTIVES
    ]
    return [(i, sum(x.data_bytes for x in leaves(i.result))) for i in found]


def _walk(
    module: Module,
    computation: str,
    number: int,
    times: Callable[[Instruction], int],
    choose: Callable[[Instruction, list[list[Access]]], list[Access]],
) -> list[Access]:
    """What `number` runs of a computation access."""
    found = []
    for i in module.computations[computation].instructions:
        if i.opcode == "while":
            runs = number * times(i)
            found += _walk(module, i.called("body"), runs, times, choose)
            found += _walk(module, i.called("condition"), runs + number, times, choose)
        elif i.opcode == "conditional":
            listed = i.attribute(r"branch_computations=\{([^}]*)\}")
            names = re.findall(r"[\w.\-]+", listed) or [
                i.called("true_computation"),
                i.called("false_computation"),
            ]
            found += choose(i, [_walk(module, name, number, times, choose) for name in names])
        elif i.opcode == "call":
            found += _walk(module, i.called("to_apply"), number, times, choose)
        else:
            found.append(Access(i, number, *_bytes(module, i)))
    return found
