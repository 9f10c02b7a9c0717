"""The outcome reward: +1 for a correct answer in the last box that the model wrote, else -1.

Reasons: correct, wrong, no_box (no closed last box), unparsable, timeout, error:<exception type>.
"""

import concurrent.futures
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from cir_jax.records import Problem, Score
from cir_jax.reward.answer import last_boxed
from cir_jax.reward.gym import THRESHOLD, pack
from cir_jax.workers import FailureReason, WorkerPool

_REASON = re.compile(r"correct|wrong|unparsable|error:\w{1,100}", re.ASCII)


def score_of(reason: str) -> Score:
    """The score that goes with a reason."""
    return Score(1.0 if reason == "correct" else -1.0, reason)


class Grader:
    """Grades answers in worker processes, in any order.

    Args:
      timeout_s: wall-clock limit of one answer; then its worker is killed and the answer wrong.
      batch_timeout_s: of all answers that are waited for together.
      gym_threshold: least score of Reasoning-Gym, in [0, 1], that counts as correct.
    """

    def __init__(
        self,
        num_workers: int = 1,
        timeout_s: float = 10.0,
        *,
        batch_timeout_s: float = 600.0,
        gym_threshold: float = THRESHOLD,
    ):
        self._gym_threshold = gym_threshold
        self._batch_timeout_s = batch_timeout_s
        self._pool = WorkerPool(
            "cir_jax.reward.worker",
            num_workers=num_workers,
            timeout_s=timeout_s,
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

        Returns: a future that raises RuntimeError if no worker can be started.
        """
        answer = last_boxed(segments)
        if answer is None:
            future: Future[Score] = Future()
            future.set_result(score_of("no_box"))
            return future
        job = {"verifier": problem.verifier, "answer": answer, "truth": problem.answer}
        if problem.verifier == "gym":
            job |= {
                "question": problem.question,
                "metadata": pack(problem.metadata),
                "threshold": self._gym_threshold,
            }
        return self._pool.submit(job)

    def results(self, futures: Sequence[Future[Score]]) -> list[Score]:
        """Of these answers, in their order; graders that hang cannot hold up more than
        batch_timeout_s in all. Raises as the futures do."""
        done, late = concurrent.futures.wait(futures, self._batch_timeout_s)
        for future in late:
            future.cancel()
        return [f.result() if f in done else score_of("timeout") for f in futures]

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
