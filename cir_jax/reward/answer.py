r"""Mathematical answers: finding the \boxed{} one and comparing it with the truth."""

import re
from collections.abc import Sequence
from typing import Literal

Verdict = Literal["correct", "wrong", "unparsable"]

MAX_ANSWER_CHARS = 1000
"""A longer answer is compared as text only: parsing takes more than linear time."""

_BOX = re.compile(r"\\boxed\s*\{")
_INTEGER = re.compile(r"([+-]?)0*(\d+|\d{1,3}(?:,\d{3})+)", re.ASCII)


def last_boxed(segments: Sequence[str]) -> str | None:
    r"""Content of the last \boxed{...}; None if there is none, or if it is never closed.

    An unclosed last box is not replaced by an earlier one: the last box is the answer given.

    Args:
      segments: the stretches that the model wrote, without tool output between them. A box must
        lie within one of them, so nothing that a tool printed can complete it.
    """
    for segment in reversed(segments):
        start = None
        for box in _BOX.finditer(segment):
            start = box.end()
        if start is not None:
            return _until_closed(segment, start)
    return None


def _until_closed(text: str, start: int) -> str | None:
    depth, i = 1, start
    while i < len(text):
        if text[i] == "\\":
            i += 1  # an escaped brace is a character, not a bracket
        elif text[i] == "{":
            depth += 1
        elif text[i] == "}":
            depth -= 1
            if depth == 0:
                return text[start:i]
        i += 1
    return None


def math_equal(answer: str, truth: str) -> bool:
    """Whether the answer equals the truth; see `math_verdict`."""
    return math_verdict(answer, truth) == "correct"


def math_verdict(answer: str, truth: str) -> Verdict:
    r"""Compares two LaTeX expressions by math-verify (sympy); plain integers exactly.

    There is no time limit in here: a power tower can take for ever, so call it in a process that
    can be killed. math-verify's own limits are off, as they need signals and the main thread.

    Args:
      truth: a bare answer, or a full solution with the answer in its last box.
    """
    answer, truth = answer.strip(), truth.strip()
    boxed = last_boxed([truth])
    truth = truth if boxed is None else boxed.strip()
    if not answer:
        return "unparsable"
    if answer == truth:
        return "correct"
    integers = _plain_integer(answer), _plain_integer(truth)
    if None not in integers:
        return "correct" if integers[0] == integers[1] else "wrong"
    if len(answer) > MAX_ANSWER_CHARS:
        return "unparsable"

    import sympy
    from math_verify import verify

    answers = _parse(answer)
    if not any(isinstance(x, sympy.Basic | sympy.MatrixBase) for x in answers):
        return "unparsable"
    return "correct" if verify(_parse(truth), answers, timeout_seconds=None) else "wrong"


def _plain_integer(text: str) -> tuple[bool, str] | None:
    """Sign and digits: as text, since int() refuses long ones and takes quadratic time."""
    match = _INTEGER.fullmatch(text.strip("$ "))
    if match is None:
        return None
    digits = match[2].replace(",", "")
    return match[1] == "-" and digits != "0", digits


def _parse(text: str) -> list:
    from math_verify import LatexExtractionConfig, parse

    # In a box, math-verify takes the text whole; it would search it for an answer otherwise.
    return parse(f"\\boxed{{{text}}}", [LatexExtractionConfig()], parsing_timeout=None)
