r"""Where a response says its answer: \boxed{answer}, or R1-Code-Interpreter's <<<answer>>>."""

import re
from collections.abc import Sequence

from cir_jax.config import AnswerFormat

_BOX = re.compile(r"\\boxed\s*\{")
_ANGLES = "<<<", ">>>"


def find_answer(segments: Sequence[str], answer_format: AnswerFormat) -> str | None:
    """The answer that a response gives in a format; None if it gives none."""
    return FINDERS[answer_format](segments)


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


def last_in_angles(segments: Sequence[str]) -> str | None:
    """Content of the last <<<...>>>, by the same rules.

    Source: R1-Code-Interpreter, arXiv:2505.21668, head prompt.
    """
    opening, closing = _ANGLES
    for segment in reversed(segments):
        start = segment.rfind(opening)
        if start >= 0:
            end = segment.find(closing, start)
            return segment[start + len(opening) : end] if end >= 0 else None
    return None


FINDERS = {"boxed": last_boxed, "angles": last_in_angles}


def whole_box(text: str) -> str | None:
    r"""Content of a \boxed{...} that is all of the text; None if it is not."""
    box = _BOX.match(text)
    if box is None:
        return None
    content = _until_closed(text, box.end())
    if content is None or text[box.end() + len(content) + 1 :].strip(" .$"):
        return None
    return content


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
