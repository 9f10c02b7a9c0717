"""How answers are graded, by a problem's `verifier`: a job to the reason of its score.

A job has the answer and the truth; for choice, plan and gym the problem's metadata, packed, too.
"""

import re
from collections.abc import Callable
from typing import Any

from cir_jax.reward import latex
from cir_jax.reward.answer import Verdict, lenient_verdict, math_verdict
from cir_jax.reward.gym import gym_verdict
from cir_jax.reward.packing import unpack
from cir_jax.reward.plans import plan_verdict

_MARKS = re.compile(r"^[\s$'\"`]+|[\s$'\"`.]+$")


def exact_verdict(answer: str, truth: str) -> Verdict:
    r"""The same text, but for case, blanks, quotes around it, \text{...} and a full stop.

    Of True and False (BIG-Bench-Hard's valid, yes ...) nothing else counts as the same.
    """
    said = _plain(answer)
    if not said:
        return "unparsable"
    return "correct" if said == _plain(truth) else "wrong"


def _plain(text: str) -> str:
    text = latex.plain_text(text) if len(text) <= _MAX_CHARS else text
    return " ".join(_MARKS.sub("", text).split()).casefold()


_MAX_CHARS = 20_000


def choice_verdict(answer: str, truth: str, options: dict[str, str]) -> Verdict:
    """The letter of an option, however it is marked, or the text of that option alone.

    Args:
      options: texts by letter, if they are known; two with the same text are told apart by letter.
    """
    if len(answer) > _MAX_CHARS:
        return "unparsable"
    wanted = _letter(truth)
    if wanted is None:
        return exact_verdict(answer, truth)
    letter = _letter(answer)
    if letter is not None:
        return "correct" if letter == wanted else "wrong"
    meant = [key for key, text in options.items() if _plain(text) == _plain(answer)]
    if len(meant) == 1:
        return "correct" if _letter(meant[0]) == wanted else "wrong"
    return "wrong" if _plain(answer) else "unparsable"


def _letter(text: str) -> str | None:
    text = _MARKS.sub("", latex.tidy(text))
    alone = re.fullmatch(r"(?:option|choice|answer)?\s*[(\[]?([a-zA-Z])[)\].:]?", text, re.I)
    return alone[1].upper() if alone else latex.choice(text)


VERIFIERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "math": lambda job: math_verdict(job["answer"], job["truth"]),
    "lenient": lambda job: lenient_verdict(job["answer"], job["truth"]),
    "exact": lambda job: exact_verdict(job["answer"], job["truth"]),
    "choice": lambda job: choice_verdict(
        job["answer"], job["truth"], unpack(job["metadata"]).get("options") or {}
    ),
    "plan": lambda job: plan_verdict(job["answer"], unpack(job["metadata"])),
    "gym": lambda job: gym_verdict(
        job["answer"],
        question=job["question"],
        truth=job["truth"],
        metadata=unpack(job["metadata"]),
        threshold=job["threshold"],
    ),
}
