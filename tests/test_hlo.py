"""HBM traffic by rule, on small texts with the bytes worked out."""

import pytest
from hlo_text import bytes_of, loop_of, module

from cir_jax.aot import hlo


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


def test_a_gather_that_is_given_its_operands_after_its_start():
    """As on the sparse cores: 3 rows of 10 are read and written, and 3 indices read."""
    looks = """
  %p = f32[100,10]{1,0} parameter(0)
  %q = s32[3]{0} parameter(1)
  ROOT %g = f32[3,10]{1,0} custom-call(%p, %q), custom_call_target="sparse"
"""
    entry = """
  %t = f32[100,10]{1,0} parameter(0)
  %i = s32[3]{0} parameter(1)
  %s = ((), (), (s32[8]{0:S(8)})) async-start(), calls=%looks, metadata={op_name="jit(f)/gather"}
  %u = ((f32[100,10]{1,0}, s32[3]{0}), f32[3,10]{1,0}, (s32[8]{0:S(8)})) async-update(%s, %t, %i)
  ROOT %d = f32[3,10]{1,0} async-done(%u)"""
    assert bytes_of(entry, ("looks (p: f32[]) -> f32[]", looks)) == (120 + 12, 120)


def test_metadata_may_have_lines_of_its_own():
    entry = """
  %x = f32[8]{0} parameter(0)
  %k = f32[8]{0} custom-call(%x), custom_call_target="k", frontend_attributes={kernel_metadata={
"block":"1024"
}}, metadata={op_name="jit(f)/kernel"}
  ROOT %n = f32[8]{0} negate(%k)"""
    assert bytes_of(entry) == (64, 64)


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
