r"""The outcome reward: +1 for a correct last answer of the model's own text, else -1.

Reasons, counted in the metrics as graded/REASON:

  correct, wrong         the answer was checked
  no_box, no_answer      there is none to check: no closed last \boxed{}, or <<<>>>
  unparsable             it cannot be an answer to this problem: malformed, or too long to be read
  timeout, error:TYPE    it could not be checked: the grader took too long, raised or died

The last two say nothing about the answer; where they are more than a few, see to the problem.
"""

import concurrent.futures
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from cir_jax.config import RewardConfig
from cir_jax.records import Problem, Score
from cir_jax.reward.boxes import find_answer
from cir_jax.reward.packing import pack
from cir_jax.workers import FailureReason, WorkerPool

_REASON = re.compile(r"correct|wrong|unparsable|error:\w{1,100}", re.ASCII)


def score_of(reason: str) -> Score:
    """The score that goes with a reason."""
    return Score(1.0 if reason == "correct" else -1.0, reason)


class Grader:
    """Grades answers in worker processes, in any order.

    Args:
      num_workers, timeout_s: in place of the config's; after timeout_s an answer's worker is
        killed.
      cfg: None: the defaults.
    """

    def __init__(
        self,
        num_workers: int | None = None,
        timeout_s: float | None = None,
        *,
        cfg: RewardConfig | None = None,
    ):
        self._cfg = cfg = cfg or RewardConfig()
        self._pool = WorkerPool(
            "cir_jax.reward.worker",
            num_workers=num_workers or cfg.num_workers,
            timeout_s=timeout_s or cfg.timeout_s,
            grace_s=0.0,
            decode=_decode,
            failure=_failure,
            # A fixed hash seed: sympy's order of terms, and so its verdicts, can depend on it.
            env=dict(os.environ, PYTHONHASHSEED="0", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"),
        )

    def submit(self, problem: Problem, segments: Sequence[str]) -> Future[Score]:
        """Queues an answer.

        Args:
          segments: the stretches of text that the model wrote, in order, without tool output.

        Returns: a future that raises workers.PoolError if no worker can be started.
        """
        answer = self._answer(problem, segments)
        if answer is None:
            future: Future[Score] = Future()
            is_boxed = self._cfg.answer_format == "boxed"
            future.set_result(score_of("no_box" if is_boxed else "no_answer"))
            return future
        job = {"verifier": problem.verifier, "answer": answer, "truth": problem.answer}
        if self._is_searched(problem):
            job["verifier"] = "lenient"
        elif problem.verifier not in ("math", "exact"):
            job |= {
                "question": problem.question,
                "metadata": pack(problem.metadata),
                "threshold": self._cfg.gym_threshold,
            }
        return self._pool.submit(job)

    def results(self, futures: Sequence[Future[Score]]) -> list[Score]:
        """Of these answers, in their order; graders that hang cannot hold up more than
        reward.step_timeout_s in all. Raises as the futures do."""
        done, late = concurrent.futures.wait(futures, self._cfg.step_timeout_s)
        for future in late:
            future.cancel()
        return [f.result() if f in done else score_of("timeout") for f in futures]

    def _is_searched(self, problem: Problem) -> bool:
        return self._cfg.mode == "lenient" and problem.verifier == "math"

    def _answer(self, problem: Problem, segments: Sequence[str]) -> str | None:
        if self._is_searched(problem):
            return "".join(segments)
        return find_answer(segments, self._cfg.answer_format)

    def stats(self) -> dict[str, Any]:
        """Counts of jobs, retries, restarts, recycled workers and timeouts; "workers", "pids"."""
        return self._pool.stats()

    def close(self) -> None:
        """Ends the workers. May be called twice."""
        self._pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


def _decode(job: dict, reply: dict, outputs: Sequence[int]) -> Score:
    reason = reply["reason"]
    if not isinstance(reason, str) or not _REASON.fullmatch(reason):
        raise ValueError(f"reason {reason!r}")
    return score_of(reason)


def _failure(job: dict, reason: FailureReason) -> Score:
    return score_of("timeout" if reason == "timeout" else "error:WorkerDied")
