"""The graders' worker: verifiers in a process that can be killed."""

import logging
import resource
import time
import warnings
from collections.abc import Sequence
from typing import Any

from cir_jax.channel import Channel, serve
from cir_jax.prctl import die_with_parent
from cir_jax.reward.answer import math_equal
from cir_jax.reward.verifiers import VERIFIERS

_MEMORY_BYTES = 4 * 2**30


def main(argv: Sequence[str]) -> None:
    """Args: the number of the socket's descriptor."""
    started = time.monotonic()
    die_with_parent()
    # Numbers can grow beyond any memory; a MemoryError here is better than a full machine.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    # math-verify warns that its time limits are off (the pool has its own), and scorers of answers
    # that are empty or no numbers.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    warm_up()
    serve(Channel(int(argv[-1])), grade, {"start_s": round(time.monotonic() - started, 3)})


def warm_up() -> None:
    """Imports and uses the libraries, so that no answer pays for it out of its time."""
    for answer, truth in (("x+1", "1+x"), ("x=\\sqrt{8}", "2\\sqrt{2}"), ("(1,2]", "(1,3]")):
        math_equal(answer, truth)
    try:
        import reasoning_gym  # noqa: F401
    except ImportError:
        pass  # only problems of that kind need it, and they will say so


def grade(job: dict[str, Any]) -> dict[str, str]:
    """Maps an answer to the reason of its score."""
    try:
        return {"reason": VERIFIERS[job["verifier"]](job)}
    except Exception as error:  # libraries raise anything on a malformed answer
        return {"reason": f"error:{type(error).__name__}"}
