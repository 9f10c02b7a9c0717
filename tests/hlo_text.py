"""Modules made of the lines that a test writes, and the bytes counted in them."""

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
