"""Answers to Reasoning-Gym problems, scored by the package's own functions.

Some of those give a few hundredths to a wrong answer, or to any answer at all, so a threshold
decides. What they raise on a malformed answer is for the caller to turn into a reason.
"""

import functools
import re
from typing import Any

THRESHOLD = 0.99

_TEXT = re.compile(r"\\(?:text|texttt|mathrm|mathbf|textbf)\s*\{([^{}]*)\}")


def gym_correct(
    answer: str,
    *,
    question: str,
    truth: str,
    metadata: dict[str, Any],
    threshold: float = THRESHOLD,
) -> bool:
    r"""Whether Reasoning-Gym's score of the answer reaches the threshold.

    An answer that is one whole \text{...} counts as what is in it.

    Args:
      metadata: of the Reasoning-Gym entry; `source_dataset` names the data set that scores it.
    """
    text = _TEXT.fullmatch(answer.strip())
    entry = {"question": question, "answer": truth, "metadata": metadata}
    score = _score_function(metadata["source_dataset"])(text[1] if text else answer, entry)
    return float(score) >= threshold


@functools.cache
def _score_function(name: str):
    from reasoning_gym.factory import get_score_answer_fn

    return get_score_answer_fn(name)


def pack(value: Any) -> Any:
    """Metadata as JSON that keeps tuples and keys other than text, which score functions need.

    Raises:
      TypeError: for a type that cannot be kept.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [pack(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [pack(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in value.items()]}
    raise TypeError(f"metadata of type {type(value).__name__}")


def unpack(value: Any) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, dict):
        if "tuple" in value:
            return tuple(unpack(item) for item in value["tuple"])
        return {unpack(key): unpack(item) for key, item in value["dict"]}
    return value
