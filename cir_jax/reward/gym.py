r"""Answers to Reasoning-Gym problems, scored by the package's own functions, and what they miss.

Most of those give a part of the score to answers that are partly right, some hundredths to any
answer, so a threshold decides: by default the whole score. Some accept what is wrong: `STRICTER`
says what must be true besides. A scorer that raises on an answer, but not on the true one, has
called the answer malformed; any other error is the scorer's own. The table of all tasks stands in
cir_jax/data/gym.py.
"""

import functools
import json
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from cir_jax.reward.answer import Verdict

THRESHOLD = 1.0

# Scores that fall with the distance from the true number: rounding alone costs some.
_GRADUAL = ("complex_arithmetic", "polynomial_equations", "power_function")
_GRADUAL_LEAST = 0.99

_TEXT = re.compile(r"\\(?:text|texttt|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")

# A longer answer is no answer to any task; some scorers take more than linear time.
_MAX_CHARS = 100_000

Entry = dict[str, Any]


def gym_verdict(
    answer: str,
    *,
    question: str,
    truth: str,
    metadata: dict[str, Any],
    threshold: float = THRESHOLD,
) -> Verdict:
    r"""Whether Reasoning-Gym's score of the answer reaches the threshold.

    An answer that is one whole \text{...} counts as what is in it.

    Args:
      metadata: of the Reasoning-Gym entry; `source_dataset` names the data set that scores it.

    Raises:
      Whatever the scorer raises on the truth itself.
    """
    text = _TEXT.fullmatch(answer.strip())
    answer = text[1] if text else answer
    if not answer.strip() or len(answer) > _MAX_CHARS:
        return "unparsable"
    name = metadata["source_dataset"]
    entry = {"question": question, "answer": truth, "metadata": metadata}
    least = min(threshold, _GRADUAL_LEAST) if name in _GRADUAL else threshold - 1e-9
    score = _score_function(name)
    try:
        value = float(score(answer, entry))
        is_right = value >= least and STRICTER.get(name, _anything)(answer, entry)
    except Exception:
        score(truth, entry)
        return "unparsable"
    return "correct" if is_right else "wrong"


def _anything(answer: str, entry: Entry) -> bool:
    return True


def _same_text(answer: str, entry: Entry) -> bool:
    return answer.strip().casefold() == str(entry["answer"]).strip().casefold()


def _finite(answer: str, entry: Entry) -> bool:
    return not re.search("nan|inf", answer, re.I)


def _probability(answer: str, entry: Entry) -> bool:
    """As near in proportion as the scorer is in absolute terms: 0 is no small probability."""
    value = float(Fraction(answer.replace(",", "")))
    return math.isclose(value, float(entry["answer"]), rel_tol=1e-4)


def _same_number(answer: str, entry: Entry) -> bool:
    """The scorer's tolerance takes in other numbers of the question."""
    return float(answer.replace(",", "")) == float(entry["answer"])


def _same_numbers(answer: str, entry: Entry) -> bool:
    given, wanted = (json.loads(text.replace("'", '"')) for text in (answer, entry["answer"]))
    return list(map(float, given)) == list(map(float, wanted))


def _all_boxes_moved(answer: str, entry: Entry) -> bool:
    """A list of steps; the scorer lets a plan name squares that do not exist."""
    steps = json.loads(answer)
    return isinstance(steps, list) and all(isinstance(step, dict) for step in steps)


STRICTER: dict[str, Callable[[str, Entry], bool]] = {
    "game_of_life_halting": _same_text,
    "complex_arithmetic": _finite,
    "coin_flip": _probability,
    "number_format": _same_number,
    "number_sorting": _same_numbers,
    "boxnet": _all_boxes_moved,
}


@functools.cache
def _score_function(name: str):
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(name)
