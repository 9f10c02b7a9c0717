r"""Mathematical answers compared with the truth.

Three ways of comparing, cheapest first: as text (`latex.py`), as exact numbers (`exact.py`), and by
math-verify (sympy), which is given one way of writing for the many that it would misread.
"""

from collections.abc import Callable
from typing import Literal

from cir_jax.reward import exact, latex
from cir_jax.reward.boxes import last_boxed, whole_box

Verdict = Literal["correct", "wrong", "unparsable"]

MAX_ANSWER_CHARS = 1000
"""A longer answer is compared as text only: parsing takes more than linear time."""

_MAX_DEPTH = 30
"""Brackets within brackets; the parser's time doubles with some of them."""

# Decimal places to which math-verify compares what is not rational: 3.14159 is not pi.
_DECIMALS = 12


def math_equal(answer: str, truth: str) -> bool:
    """Whether the answer equals the truth; see `math_verdict`."""
    return math_verdict(answer, truth) == "correct"


def math_verdict(answer: str, truth: str) -> Verdict:
    r"""Compares two LaTeX expressions; numbers exactly.

    There is no time limit in here: a power tower can take for ever, so call it in a process that
    can be killed. math-verify's own limits are off, as they need signals and the main thread.

    What counts as equal besides equal values: a unit, a percent or degree sign, a variable (x=5), a
    base (52_8) or a choice's label that only one of the two has; 50\% is both 50 and 0.5; lists and
    sets in any order, tuples in theirs; words in any case. A decimal equals nothing that it is only
    near to.

    Args:
      truth: a bare answer, or a full solution with the answer in its last box.
    """
    answer, truth = answer.strip(), truth.strip()
    boxed = last_boxed([truth])
    truth = truth if boxed is None else boxed.strip()
    while (inner := whole_box(answer)) is not None:
        answer = inner.strip()
    if not answer:
        return "unparsable"
    if answer == truth:
        return "correct"
    integers = exact.plain_integer(answer), exact.plain_integer(truth)
    if None not in integers:
        return "correct" if integers[0] == integers[1] else "wrong"
    if len(answer) > MAX_ANSWER_CHARS or latex.depth(answer) > _MAX_DEPTH:
        return "unparsable"
    answer, truth = latex.tidy(answer), latex.tidy(truth)
    if not latex.says_anything(answer):
        return "unparsable"
    return _compare(answer, truth)


def _compare(answer: str, truth: str) -> Verdict:
    if latex.spelled(answer) == latex.spelled(truth):
        return "correct"
    for comparison in _COMPARISONS:
        verdict = comparison(answer, truth)
        if verdict is not None:
            return verdict
    return _by_math_verify(latex.for_parser(answer), latex.for_parser(truth))


def _said(is_equal: bool) -> Verdict:
    return "correct" if is_equal else "wrong"


def _as_words(answer: str, truth: str) -> Verdict | None:
    if latex.is_prose(truth) or latex.is_prose(answer) and latex.words(truth) is not None:
        return _said(latex.words(answer) == latex.words(truth))
    return None


def _as_kinds(answer: str, truth: str) -> Verdict | None:
    r"""\{1,2\} is not (1,2), which math-verify takes for the same."""
    kinds = {latex.kind(answer), latex.kind(truth)}
    return "wrong" if kinds == {"set", "tuple"} else None


def _as_choices(answer: str, truth: str) -> Verdict | None:
    """Of a choice the letter or what stands behind it."""
    behind_answer, behind_truth = latex.after_label(answer), latex.after_label(truth)
    letters = latex.choice(answer), latex.choice(truth)
    if None not in letters:
        return _said(letters[0] == letters[1])
    if behind_truth and letters[0] is None:
        return _compare(answer, behind_truth)
    if behind_answer and letters[1] is None:
        return _compare(behind_answer, truth)
    return None


def _as_percentages(answer: str, truth: str) -> Verdict | None:
    of_answer, of_truth = exact.without_percent(answer), exact.without_percent(truth)
    if of_answer is None and of_truth is None:
        return None
    if of_answer is not None and of_truth is not None:
        return _compare(of_answer, of_truth)
    share = of_answer if of_truth is None else of_truth
    other = truth if of_truth is None else answer
    values = exact.rational(share), exact.rational(other)
    if None in values:
        return _compare(of_answer or answer, of_truth or truth)
    return _said(values[0] in (values[1], 100 * values[1]))


def _as_quantities(answer: str, truth: str) -> Verdict | None:
    (number, unit), (of_truth, its_unit) = exact.split_unit(answer), exact.split_unit(truth)
    if (number, of_truth) == (answer, truth):
        return None
    if unit is None or its_unit is None or unit == its_unit:
        return _compare(number, of_truth)
    values = exact.rational(number), exact.rational(of_truth)
    if unit.dimension != its_unit.dimension or None in values:
        return "wrong"
    return _said(values[0] * unit.factor == values[1] * its_unit.factor)


def _in_bases(answer: str, truth: str) -> Verdict | None:
    of_answer, of_truth = exact.in_base(answer), exact.in_base(truth)
    if of_answer is not None and of_truth is not None:
        return _said(int(*of_answer) == int(*of_truth))
    if of_truth is not None:
        return _said(latex.spelled(answer).upper() == of_truth[0])
    if of_answer is not None and exact.rational(truth) is not None:
        return _said(of_answer[0] == latex.spelled(truth))
    return None


def _as_rationals(answer: str, truth: str) -> Verdict | None:
    values = exact.rational(latex.for_parser(answer)), exact.rational(latex.for_parser(truth))
    return None if None in values else _said(values[0] == values[1])


_COMPARISONS: tuple[Callable[[str, str], Verdict | None], ...] = (
    _as_words,
    _as_kinds,
    _as_choices,
    _in_bases,
    _as_percentages,
    _as_quantities,
    _as_rationals,
)


def _by_math_verify(answer: str, truth: str) -> Verdict:
    import sympy

    answers, truths = _parse(answer), _parse(truth)
    if not any(isinstance(x, sympy.Basic | sympy.MatrixBase) for x in answers):
        return "unparsable"
    return _said(_verify(truths, answers) or _verify(_complex(truths), _complex(answers)))


def _verify(truths: list, answers: list) -> bool:
    from math_verify import verify

    return verify(
        truths,
        answers,
        float_rounding=_DECIMALS,
        numeric_precision=_DECIMALS + 3,
        allow_set_relation_comp=True,
        timeout_seconds=None,
    )


def _parse(text: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    # In a box, math-verify takes the text whole; it would search it for an answer otherwise.
    return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)


def _complex(expressions: list) -> list:
    """With the imaginary unit for every symbol i."""
    import sympy

    def of(expression):
        if not isinstance(expression, sympy.Basic | sympy.MatrixBase):
            return expression
        return expression.subs({s: sympy.I for s in expression.free_symbols if s.name == "i"})

    return [of(expression) for expression in expressions]


def lenient_verdict(text: str, truth: str) -> Verdict:
    r"""math-verify's own search of a whole response, without what is hardened above.

    The last \boxed{} anywhere, or without one the last formula or number. It is what evaluations by
    math-verify alone report, for comparison with their figures; never a reward.
    """
    from math_verify import parse, verify

    found = parse(text, parsing_timeout=None)
    boxed = last_boxed([truth])
    gold = parse(f"\\boxed{{{truth if boxed is None else boxed}}}", parsing_timeout=None)
    if not found:
        return "unparsable"
    return _said(verify(gold, found, timeout_seconds=None))
