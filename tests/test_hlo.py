"""HBM traffic by rule, on small texts with the bytes worked out, and of decode loops for v5e."""

import pytest
import tpu

from cir_jax.aot import hlo

# One region for all that need one.
ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def module(entry, *others):
    computations = [f"%{head} {{\n{body}\n}}\n" for head, body in others]
    return hlo.parse("\n".join([ADD, *computations, "ENTRY %main () -> f32[] {", entry, "}"]))


def bytes_of(entry, *others, trips=None, loop=None):
    counted = hlo.traffic(module(entry, *others), trips=trips or {}, loop=loop)
    return counted.read, counted.written


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[3,5]", 60),
        ("bf16[3,5]{0,1}", 30),
        ("pred[7]", 7),
        ("s4[10]{0:E(4)}", 5),
        ("s4[10]", 10),
        # 9 x 130 in tiles of 8 x 128: 16 x 256.
        ("f32[9,130]{1,0:T(8,128)}", 4 * 16 * 256),
        # Stored the other way round: 130 x 9 is 136 x 128.
        ("f32[9,130]{0,1:T(8,128)}", 4 * 136 * 128),
        # Pairs of rows within tiles pad nothing more.
        ("bf16[2,9,130]{2,1,0:T(8,128)(2,1)}", 2 * 2 * 16 * 256),
        ("s32[]{:T(128)}", 4 * 128),
        ("bf16[100]{0:T(256)(128)(2,1)}", 2 * 256),
        ("f32[9,130]{1,0:T(8,128)S(1)}", 0),
        ("u32[]{:S(2)}", 0),
        ("(f32[2], (s8[3], token[]), f8e4m3fn[4])", 8 + 3 + 0 + 4),
    ],
)
def test_bytes_of_a_shape(shape, expected):
    # A custom call without operands writes its result, and nothing is read.
    assert bytes_of(f'  ROOT %r = {shape} custom-call(), custom_call_target="f"') == (0, expected)


def test_operands_are_read_and_results_written():
    # 2 x 4 x 8 elements of 4 bytes in, 8 x 4 out; the rest has no bytes of its own.
    entry = """
  %x = f32[8]{0} parameter(0)
  %t = (f32[8]{0}, f32[8]{0}) tuple(%x, %x)
  %y = f32[8]{0} get-tuple-element(%t), index=1
  %b = f32[2,4]{1,0} bitcast(%y)
  %c = f32[8]{0} constant({...})
  %v = f32[8]{0:S(1)} add(%x, %c)
  %s = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %w = f32[8]{0} negate(%v)"""
    assert bytes_of(entry) == (64, 32)


def test_slices_count_as_slices():
    # Three parts of 10 elements are read and written; gather's and dynamic-slice's indices are
    # 2 x 4 bytes and 4.
    entry = """
  %x = f32[10,10]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %is = s32[2]{0} parameter(2)
  %a = f32[1,10]{1,0} slice(%x), slice={[3:4], [0:10]}
  %b = f32[1,10]{1,0} dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,10}
  ROOT %c = f32[2,5]{1,0} gather(%x, %is), slice_sizes={1,5}"""
    assert bytes_of(entry) == (3 * 40 + 2 * 4 + 8, 3 * 40)


SLICED = (
    "sliced (p0: f32[10,10], p1: s32[]) -> f32[1,5]",
    """
  %p0 = f32[10,10]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %c = bf16[10,10]{1,0} convert(%p0)
  %row = bf16[1,10]{1,0} dynamic-slice(%c, %p1, %p1), dynamic_slice_sizes={1,10}
  ROOT %half = bf16[1,5]{1,0} slice(%row), slice={[0:1], [0:5]}""",
)


def test_a_fusion_reads_what_its_result_needs():
    """Through conversions, slices of slices and fusions within fusions."""
    # Of x 5 elements through the inner fusion, 10 in the last row: 15 x 4 bytes; the index 4;
    # y whole, 100 x 4. Written: 10 bf16 and one f32.
    outer = (
        "outer (q0: f32[10,10], q1: s32[], q2: f32[10,10]) -> (bf16[10], f32[])",
        """
  %q0 = f32[10,10]{1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %q2 = f32[10,10]{1,0} parameter(2)
  %inner = bf16[1,5]{1,0} fusion(%q0, %q1), kind=kLoop, calls=%sliced
  %last = f32[1,10]{1,0} slice(%q0), slice={[9:10], [0:10]}
  %l = bf16[10]{0} convert(%last)
  %zero = f32[] constant(0)
  %total = f32[] reduce(%q2, %zero), dimensions={0,1}, to_apply=%add
  %more = f32[] reduce(%inner, %total), dimensions={0,1}, to_apply=%add
  ROOT %t = (bf16[10]{0}, f32[]) tuple(%l, %more)""",
    )
    entry = """
  %x = f32[10,10]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %y = f32[10,10]{1,0} parameter(2)
  ROOT %f = (bf16[10]{0}, f32[]) fusion(%x, %i, %y), kind=kLoop, calls=%outer"""
    assert bytes_of(entry, SLICED, outer) == (15 * 4 + 4 + 400, 20 + 4)


def test_no_more_than_the_operand_is_read():
    # Twelve rows of ten are gathered: the operand is read once, and its 12 indices.
    entry = """
  %x = f32[10,10]{1,0} parameter(0)
  %i = s32[12]{0} parameter(1)
  ROOT %g = f32[12,10]{1,0} gather(%x, %i), slice_sizes={1,10}"""
    assert bytes_of(entry) == (400 + 48, 480)


def test_updates_in_place_write_the_update():
    # Bare: update and index are read, 10 x 4 + 4, and 40 written. In a fusion with a tuple for
    # its result: a scatter of 2 x 10 in bf16 (update 40, indices 8), through a bitcast and a
    # fusion around; a dynamic-update-slice in VMEM of one row that is read from HBM, 40 + 4
    # bytes, and writes nothing there.
    inner = (
        "put (p0: bf16[100], p1: s32[2], p2: bf16[2,10]) -> bf16[10,10]",
        """
  %p0 = bf16[100]{0} parameter(0)
  %p1 = s32[2]{0} parameter(1)
  %p2 = bf16[2,10]{1,0} parameter(2)
  %square = bf16[10,10]{1,0} bitcast(%p0)
  ROOT %s = bf16[10,10]{1,0} scatter(%square, %p1, %p2), to_apply=%add
  %unused = bf16[] constant(0)""",
    )
    both = (
        "both (q0: bf16[100], q1: s32[2], q2: bf16[2,10], q3: f32[10,10], q4: f32[1,10], "
        "q5: s32[]) -> (bf16[100], f32[10,10])",
        """
  %q0 = bf16[100]{0} parameter(0)
  %q1 = s32[2]{0} parameter(1)
  %q2 = bf16[2,10]{1,0} parameter(2)
  %q3 = f32[10,10]{1,0:S(1)} parameter(3)
  %q4 = f32[1,10]{1,0} parameter(4)
  %q5 = s32[] parameter(5)
  %s = bf16[10,10]{1,0} fusion(%q0, %q1, %q2), kind=kLoop, calls=%put
  %flat = bf16[100]{0} bitcast(%s)
  %u = f32[10,10]{1,0:S(1)} dynamic-update-slice(%q3, %q4, %q5, %q5)
  ROOT %t = (bf16[100]{0}, f32[10,10]{1,0:S(1)}) tuple(%flat, %u)""",
    )
    entry = """
  %x = f32[10,10]{1,0} parameter(0)
  %row = f32[1,10]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %k = bf16[100]{0} parameter(3)
  %is = s32[2]{0} parameter(4)
  %rows = bf16[2,10]{1,0} parameter(5)
  %v = f32[10,10]{1,0:S(1)} parameter(6)
  %d = f32[10,10]{1,0} dynamic-update-slice(%x, %row, %i, %i)
  ROOT %f = (bf16[100]{0}, f32[10,10]{1,0:S(1)}) fusion(%k, %is, %rows, %v, %row, %i), calls=%both
"""
    bare = (40 + 2 * 4, 40)
    fused = (40 + 8 + 40 + 4, 40)
    assert bytes_of(entry, inner, both) == (bare[0] + fused[0], bare[1] + fused[1])


@pytest.mark.parametrize(
    ("aliasing", "written"), [("output_to_operand_aliasing={{}: (0, {})}, ", 10), ("", 100)]
)
def test_other_tiles_of_the_same_bytes_are_no_copy(aliasing, written):
    # A row of 10 bytes is put into 100: in place where a copy before it, in a fusion of its own,
    # lies where its operand does.
    tiled = (
        "retile (p0: s8[10,10]) -> s8[10,10]",
        """
  %p0 = s8[10,10]{1,0} parameter(0)
  ROOT %c = s8[10,10]{1,0} copy(%p0)""",
    )
    put = (
        "put (q0: s8[10,10], q1: s8[1,10], q2: s8[]) -> s8[10,10]",
        f"""
  %q0 = s8[10,10]{{1,0}} parameter(0)
  %q1 = s8[1,10]{{1,0}} parameter(1)
  %q2 = s8[] parameter(2)
  %t = s8[10,10]{{1,0}} fusion(%q0), kind=kLoop, {aliasing}calls=%retile
  ROOT %u = s8[10,10]{{1,0}} dynamic-update-slice(%t, %q1, %q2, %q2)""",
    )
    entry = """
  %x = s8[10,10]{1,0} parameter(0)
  %row = s8[1,10]{1,0} parameter(1)
  %i = s8[] parameter(2)
  ROOT %f = s8[10,10]{1,0} fusion(%x, %row, %i), kind=kLoop, calls=%put"""
    assert bytes_of(entry, tiled, put)[1] == written


def test_collectives_are_listed_with_their_results():
    # Wherever they lie, without the padding of tiles: 3 x 5 x 4 bytes, and 2 x 3 x 5 x 4.
    entry = """
  %x = f32[3,5]{1,0:T(8,128)S(1)} parameter(0)
  %a = f32[3,5]{1,0:T(8,128)S(1)} all-reduce(%x), to_apply=%add
  %s = (f32[3,5]{1,0}, f32[6,5]{1,0}) all-gather-start(%a), dimensions={0}
  ROOT %d = f32[6,5]{1,0} all-gather-done(%s)"""
    found = hlo.collectives(module(entry))
    assert [(i.name, size) for i, size in found] == [("a", 60), ("s", 120)]


@pytest.mark.parametrize("opcode", ["copy", "convert", "negate"])
def test_updates_of_something_new_write_it_whole(opcode):
    # The operand is read whole, 400 bytes, with row and index, and a buffer of 400 is written.
    fused = (
        "fused (p0: f32[10,10], p1: f32[1,10], p2: s32[]) -> f32[10,10]",
        f"""
  %p0 = f32[10,10]{{1,0}} parameter(0)
  %p1 = f32[1,10]{{1,0}} parameter(1)
  %p2 = s32[] parameter(2)
  %new = f32[10,10]{{0,1}} {opcode}(%p0)
  ROOT %u = f32[10,10]{{0,1}} dynamic-update-slice(%new, %p1, %p2, %p2)""",
    )
    entry = """
  %x = f32[10,10]{1,0} parameter(0)
  %row = f32[1,10]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[10,10]{0,1} fusion(%x, %row, %i), kind=kLoop, calls=%fused"""
    assert bytes_of(entry, fused) == (400 + 40 + 4, 400)
    (written,) = hlo.large_writes(module(entry, fused), 400, loop=None)
    assert written.instruction.name == "f"
    assert hlo.large_writes(module(entry, fused), 401, loop=None) == []


def test_asynchronous_operations():
    # To VMEM: 40 read. From VMEM: 80 written. A slice: 20 read, to VMEM. A gather from 2 devices:
    # 40 read, 80 written. A reduction of two: 40 + 20 read and written.
    entry = """
  %x = f32[10]{0} parameter(0)
  %h = f32[5]{0} parameter(1)
  %a = (f32[10]{0:S(1)}, f32[10]{0}, u32[]{:S(2)}) copy-start(%x)
  %b = f32[10]{0:S(1)} copy-done(%a)
  %v = f32[20]{0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %c = (f32[20]{0}, f32[20]{0:S(1)}, u32[]{:S(2)}) copy-start(%v)
  %d = f32[20]{0} copy-done(%c)
  %e = ((f32[10]{0}), f32[5]{0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:5]}
  %f = f32[5]{0:S(1)} slice-done(%e)
  %g = (f32[10]{0}, f32[20]{0}) all-gather-start(%x), channel_id=1, dimensions={0}
  %i = f32[20]{0} all-gather-done(%g)
  %j = (f32[10]{0}, f32[5]{0}) all-reduce-start(%x, %h), channel_id=2, to_apply=%add
  ROOT %k = (f32[10]{0}, f32[5]{0}) all-reduce-done(%j)"""
    assert bytes_of(entry) == (40 + 20 + 40 + 60, 80 + 80 + 60)


def test_collectives_carried_through_fusions_count_once():
    # Start: 40 read, 80 written. The fusion that carries it on: only its own 8 read, 8 written.
    start = (
        "start (p0: f32[10]) -> (f32[10], f32[20], s32[2])",
        """
  %p0 = f32[10]{0} parameter(0)
  %g = f32[20]{0} all-gather(%p0), channel_id=1, dimensions={0}
  ROOT %s = (f32[10]{0}, f32[20]{0}, s32[2]{0:S(4)}) custom-call(%g), \
custom_call_target="AsyncCollectiveStart\"""",
    )
    carry = (
        "carry (p0: f32[10], p1: f32[20], p2: s32[2], p3: f32[2]) -> (f32[2], f32[10], f32[20], "
        "f32[20], s32[2])",
        """
  %p0 = f32[10]{0} parameter(0)
  %p1 = f32[20]{0} parameter(1)
  %p2 = s32[2]{0:S(4)} parameter(2)
  %p3 = f32[2]{0} parameter(3)
  %n = f32[2]{0} negate(%p3)
  %g = f32[20]{0} all-gather(%p0), channel_id=1, dimensions={0}
  ROOT %t = (f32[2]{0}, f32[10]{0}, f32[20]{0}, f32[20]{0}, s32[2]{0:S(4)}) \
tuple(%n, %p0, %p1, %g, %p2)""",
    )
    done = (
        "done (p0: f32[10], p1: f32[20], p2: s32[2]) -> f32[20]",
        """
  %p0 = f32[10]{0} parameter(0)
  %p1 = f32[20]{0} parameter(1)
  %p2 = s32[2]{0:S(4)} parameter(2)
  %g = f32[20]{0} all-gather(%p0), channel_id=1, dimensions={0}
  ROOT %s = f32[20]{0} custom-call(%p0, %p1, %g, %p2), custom_call_target="AsyncCollectiveDone\"""",
    )
    entry = """
  %x = f32[10]{0} parameter(0)
  %y = f32[2]{0} parameter(1)
  %a = (f32[10]{0}, f32[20]{0}, s32[2]{0:S(4)}) fusion(%x), kind=kCustom, \
output_to_operand_aliasing={{0}: (0, {})}, calls=%start
  %a0 = f32[10]{0} get-tuple-element(%a), index=0
  %a1 = f32[20]{0} get-tuple-element(%a), index=1
  %a2 = s32[2]{0:S(4)} get-tuple-element(%a), index=2
  %b = (f32[2]{0}, f32[10]{0}, f32[20]{0}, f32[20]{0}, s32[2]{0:S(4)}) fusion(%a0, %a1, %a2, %y), \
kind=kLoop, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {}), {3}: (1, {}), {4}: (2, {})}, \
calls=%carry
  %b1 = f32[10]{0} get-tuple-element(%b), index=1
  %b3 = f32[20]{0} get-tuple-element(%b), index=3
  %b4 = s32[2]{0:S(4)} get-tuple-element(%b), index=4
  ROOT %c = f32[20]{0} fusion(%b1, %b3, %b4), kind=kCustom, \
output_to_operand_aliasing={{}: (1, {})}, calls=%done"""
    with_start = bytes_of(entry, start, carry, done)
    assert with_start == (40 + 8, 80 + 40 + 8)


COUNTED = """
  %t0 = (s32[], f32[10]{0}, s32[]) parameter(0)
  %n = s32[] get-tuple-element(%t0), index=0
  %x = f32[10]{0} get-tuple-element(%t0), index=1
  %step = s32[] get-tuple-element(%t0), index=2
  %same = s32[] copy(%n)
  %more = s32[] add(%same, %step)
  %y = f32[10]{0} negate(%x)
  ROOT %t1 = (s32[], f32[10]{0}, s32[]) tuple(%more, %y, %step)"""


def loop_of(bound, first=1, step=2, direction="LT", body=("", "")):
    """A loop with a counter; its step goes through the loop unchanged. body: replaced by what."""
    below = f"""
  %t2 = (s32[], f32[10]{{0}}, s32[]) parameter(0)
  %n2 = s32[] get-tuple-element(%t2), index=0
  %step2 = s32[] get-tuple-element(%t2), index=2
  %bound = s32[] {bound}
  ROOT %less = pred[] compare(%n2, %bound), direction={direction}"""
    entry = f"""
  %x0 = f32[10]{{0}} parameter(0)
  %first = s32[] constant({first})
  %step0 = s32[] constant({step})
  %init = (s32[], f32[10]{{0}}, s32[]) tuple(%first, %x0, %step0)
  ROOT %w = (s32[], f32[10]{{0}}, s32[]) while(%init), condition=%below, body=%counted, \
metadata={{op_name="jit(f)/while"}}"""
    counted = ("counted (t: f32[]) -> f32[]", COUNTED.replace(*body))
    return entry, counted, ("below (t: f32[]) -> pred[]", below)


# Of one iteration: the counter is copied and added to, 4 + 4 and 8 + 4 bytes, the array negated,
# 40 + 40. Each test: 8 bytes read, 1 written.
BODY = (4 + 8 + 40, 4 + 4 + 40)
TEST = (8, 1)


def test_loops_count_as_often_as_they_run():
    # 1, 3, 5, 7 are below 8: four iterations, five tests.
    expected = tuple(4 * b + 5 * t for b, t in zip(BODY, TEST, strict=True))
    assert bytes_of(*loop_of("constant(8)")) == expected
    # Below 7 there are three.
    assert bytes_of(*loop_of("constant(7)"))[1] == 3 * BODY[1] + 4
    assert bytes_of(*loop_of("constant(1)")) == TEST
    assert bytes_of(*loop_of("constant(8)"), loop="f)/while") == BODY


@pytest.mark.parametrize(
    "change",
    [
        {"bound": "negate(%n2)"},
        {"bound": "constant(8)", "direction": "NE"},
        {"bound": "constant(8)", "step": 0},
        {"bound": "constant(8)", "body": ("add(%same, %step)", "add(%step, %step)")},
        {"bound": "constant(8)", "body": ("%y, %step)", "%y, %same)")},
    ],
)
def test_loops_of_unknown_length_need_a_number(change):
    with pytest.raises(ValueError, match=r"trips=.*expected the iterations of loop 'jit\(f\)/whi"):
        bytes_of(*loop_of(**change))
    other = {"jit(g)/while": 9, "while": 9, "(f)/while": 3}
    read, written = bytes_of(*loop_of(**change), trips=other)
    extra = 4 * (change["bound"] == "negate(%n2)")  # the bound is worked out at each test
    assert (read, written) == (3 * BODY[0] + 4 * (8 + extra), 3 * BODY[1] + 4 * (1 + extra))


def test_a_written_length_is_taken():
    entry, *others = loop_of("negate(%n2)")
    entry += ', backend_config={"known_trip_count":{"n":"5"},"x":{"y":1}}'
    assert bytes_of(entry, *others)[1] == 5 * BODY[1] + 6 * 5


def test_nested_loops():
    # The inner loop of 10 negates 4 bytes, in an outer one that runs 3 times; the inner one's
    # bound comes from outside of both. Bodies: inner 4 + 8 bytes read and 4 + 4 written, outer 8
    # and 4 besides. Tests: 8 read, 1 written.
    count = """
  %u0 = (s32[], s32[], f32[]) parameter(0)
  %n = s32[] get-tuple-element(%u0), index=0
  %bound = s32[] get-tuple-element(%u0), index=1
  %x = f32[] get-tuple-element(%u0), index=2
  %one = s32[] constant(1)
  %more = s32[] add(%n, %one)"""
    inner = f"""{count}
  %y = f32[] negate(%x)
  ROOT %u1 = (s32[], s32[], f32[]) tuple(%more, %bound, %y)"""
    outer = f"""{count}
  %zero = s32[] constant(0)
  %start = (s32[], s32[], f32[]) tuple(%zero, %bound, %x)
  %v = (s32[], s32[], f32[]) while(%start), condition=%under, body=%inner, \
metadata={{op_name="jit(f)/while/body/while"}}
  %z = f32[] get-tuple-element(%v), index=2
  ROOT %u1 = (s32[], s32[], f32[]) tuple(%more, %bound, %z)"""
    under = """
  %u2 = (s32[], s32[], f32[]) parameter(0)
  %n = s32[] get-tuple-element(%u2), index=0
  %bound = s32[] get-tuple-element(%u2), index=1
  ROOT %less = pred[] compare(%n, %bound), direction=LT"""
    entry = """
  %zero = s32[] constant(0)
  %ten = s32[] constant(10)
  %x = f32[] parameter(0)
  %start = (s32[], s32[], f32[]) tuple(%zero, %ten, %x)
  ROOT %w = (s32[], s32[], f32[]) while(%start), condition=%under2, body=%outer, \
metadata={op_name="jit(f)/while"}"""
    others = (
        ("inner (u: f32[]) -> f32[]", inner),
        ("under (u: f32[]) -> pred[]", under),
        ("outer (u: f32[]) -> f32[]", outer),
        ("under2 (u: f32[]) -> pred[]", under),
    )
    inside = (10 * 12 + 11 * 8, 10 * 8 + 11)
    counted = bytes_of(entry, *others, trips={"jit(f)/while": 3})
    assert counted == (3 * (inside[0] + 8) + 4 * 8, 3 * (inside[1] + 4) + 4)
    assert bytes_of(entry, *others, loop="body/while") == (12, 8)
    with pytest.raises(ValueError, match=r"loop='while': ends 2 names, expected one of"):
        bytes_of(entry, *others, loop="while")


def test_conditionals_count_as_their_most_expensive_branch():
    # Of 10 elements one branch reads and writes 5, the other all.
    branches = (
        (
            "half (p: f32[10]) -> f32[5]",
            """
  %p = f32[10]{0} parameter(0)
  ROOT %s = f32[5]{0} slice(%p), slice={[0:5]}""",
        ),
        (
            "all (p: f32[10]) -> f32[10]",
            """
  %p = f32[10]{0} parameter(0)
  ROOT %s = f32[10]{0} negate(%p)""",
        ),
    )
    for attributes in (
        "branch_computations={%half, %all}",
        "true_computation=%all, false_computation=%half",
    ):
        entry = f"""
  %x = f32[10]{{0}} parameter(0)
  %c = s32[] parameter(1)
  ROOT %r = f32[10]{{0}} conditional(%c, %x, %x), {attributes}"""
        assert bytes_of(entry, *branches) == (40, 40)
        # A write in either branch is found.
        found = hlo.large_writes(module(entry, *branches), 20, loop=None)
        assert {a.instruction.computation for a in found} == {"half", "all"}


def test_writes_are_found_where_asked():
    # The loop writes 40 bytes in its body; the copy before it writes 40 as well.
    entry, *others = loop_of("constant(8)")
    entry = entry.replace("tuple(%first, %x0", "tuple(%first, %before").replace(
        "  %first =", "  %before = f32[10]{0} copy(%x0)\n  %first ="
    )
    whole = module(entry, *others)
    assert [a.instruction.name for a in hlo.large_writes(whole, 40, loop=None)] == ["before", "y"]
    (inside,) = hlo.large_writes(whole, 40, loop="jit(f)/while")
    assert inside.instruction.name == "y"
    assert "y reads 0.000, writes 0.000" in str(inside)


def test_the_report_begins_with_the_largest():
    # Four times 80 bytes, then the counter's 12 and 8.
    counted = hlo.traffic(module(*loop_of("constant(8)")), trips={}, loop=None)
    assert [a.instruction.name for a in counted.accesses[:3]] == ["y", "more", "less"]
    assert str(counted).splitlines()[0].startswith("0.000 MB: 4 x y reads")


def test_what_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.parse("module @jit_f {\n}\n")


# A decode loop on four devices with 4 key heads, one to each, and 2 queries a head. On a device, in
# bytes: keys and values of a layer are B x S x H x 2 = 2^27 each, what v5e's VMEM holds. A layer's
# weights: q D x 2 x H, k and v D x H, o 2 x H x D, up and down D x F / 4, times 2.
L, B, K, R, S, H, D, F = 4, 64, 4, 2, 8192, 128, 2048, 8192
LAYER = B * S * H * 2
CACHE = 2 * L * LAYER
WEIGHTS = L * (6 * D * H + 2 * D * F // 4) * 2
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P

kind, topology, (L, B, K, R, S, H, D, F) = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology)
mesh = topologies.make_mesh(devices, (4,), ("x",))

def array(*shape, split=None, dtype=jnp.bfloat16):
    spec = P(*("x" if i == split else None for i in range(len(shape))))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

weights = {
    "q": array(L, D, K, R, H, split=2), "k": array(L, D, K, H, split=2),
    "v": array(L, D, K, H, split=2), "o": array(L, K, R, H, D, split=1),
    "up": array(L, D, F, split=2), "down": array(L, F, D, split=1),
}
cache = (array(L, B, K, S, H, split=2),) * 2
rows = jnp.arange(B)

def layer(w, x, position, write, read):
    q = jnp.einsum("bd,dkrh->bkrh", x, w["q"])
    cache = write(jnp.einsum("bd,dkh->bkh", x, w["k"]), jnp.einsum("bd,dkh->bkh", x, w["v"]))
    k, v = read(cache)
    scores = jnp.einsum("bkrh,bksh->bkrs", q, k, preferred_element_type=jnp.float32)
    seen = jnp.arange(S) <= position[:, None, None, None]
    p = jax.nn.softmax(jnp.where(seen, scores, -1e30)).astype(x.dtype)
    x = x + jnp.einsum("bkrs,bksh,krhd->bd", p, v, w["o"], optimize=[(0, 1), (0, 1)])
    return x + jax.nn.silu(x @ w["up"]) @ w["down"], cache

SET = dict(mode="promise_in_bounds", unique_indices=True)

def in_carry(weights, x, cache, position):
    def one(l, carry):
        x, cache = carry
        def write(*new):
            return [c.at[l, rows, :, position].set(n, **SET) for c, n in zip(cache, new)]
        def read(cache):
            return [jax.lax.dynamic_index_in_dim(c, l, keepdims=False) for c in cache]
        x, cache = layer(jax.tree.map(lambda w: w[l], weights), x, position, write, read)
        return x, tuple(cache)
    return jax.lax.fori_loop(0, L, one, (x, cache))

def in_scan(weights, x, cache, position):
    def one(x, inputs):
        w, *cache = inputs
        def write(*new):
            return [c.at[rows, :, position].set(n, **SET) for c, n in zip(cache, new)]
        x, cache = layer(w, x, position, write, lambda cache: cache)
        return x, tuple(cache)
    return jax.lax.scan(one, x, (weights, *cache))

def decode(weights, cache, x, position, steps):
    def step(carry):
        n, x, cache, position = carry
        x, cache = (in_scan if kind == "scan" else in_carry)(weights, x, cache, position)
        return n + 1, x, cache, position + 1
    return jax.lax.while_loop(lambda c: c[0] < steps, step, (0, x, cache, position))

donated = () if kind == "not donated" else 1
compiled = jax.jit(decode, donate_argnums=donated).lower(
    weights, cache, array(B, D), array(B, dtype=jnp.int32), array(dtype=jnp.int32)
).compile()
print(json.dumps(compiled.as_text()))
"""
STEP = "jit(decode)/while"


def decode_loop(kind):
    return hlo.parse(tpu.run(PROGRAM, kind, "v5e:2x2", (L, B, K, R, S, H, D, F)))


@pytest.mark.tpu
def test_a_decode_step_reads_weights_and_cache_once():
    compiled = decode_loop("carry")
    # Of the program with one step: the compiler may load a small weight once for all steps.
    once = hlo.traffic(compiled, trips={STEP: 1}, loop=None)
    assert CACHE + WEIGHTS <= once.read <= 1.01 * (CACHE + WEIGHTS), str(once)
    assert once.written < 0.01 * CACHE, str(once)
    step = hlo.traffic(compiled, trips={}, loop=STEP)
    assert 0.98 * (CACHE + WEIGHTS) <= step.read <= once.read, str(step)
    assert hlo.large_writes(compiled, LAYER // 8, loop=None) == []


@pytest.mark.tpu
def test_a_cache_that_is_scanned_is_copied():
    compiled = decode_loop("scan")
    step = hlo.traffic(compiled, trips={}, loop=STEP)
    # Keys and values are taken out and put back, read and written both times, and read in between.
    assert step.read + step.written > 4 * (CACHE + WEIGHTS), str(step)
    assert len(hlo.large_writes(compiled, LAYER, loop=STEP)) == 4


@pytest.mark.tpu
def test_a_cache_that_is_not_donated_is_copied_before_the_loop():
    compiled = decode_loop("not donated")
    assert [a.written for a in hlo.large_writes(compiled, LAYER, loop=None)] == [CACHE // 2] * 2
    assert hlo.large_writes(compiled, LAYER, loop=STEP) == []
