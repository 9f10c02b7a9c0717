"""HBM traffic of loops: how often they run, told from their counters."""

import pytest
from hlo_text import bytes_of, loop_of

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
