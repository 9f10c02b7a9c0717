"""What came of programs: a result from how a process ended, and counts and times of many."""

import collections
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from cir_jax.records import ExecResult
from cir_jax.sandbox.text import ERROR_TEXTS

_NUM_TIMES = 10_000


def outcome(
    exit_code: int, stdout: str, error: str, wall_s: float, *, in_time: bool, oom_killed: bool
) -> ExecResult:
    """The result of a program whose process ended so.

    Args:
      exit_code: negative for a signal.
      error: the last line on stderr.
      in_time: whether it ended by itself.
      oom_killed: whether the kernel ended it for want of memory.
    """
    if not in_time:
        return ExecResult("timeout", stdout, ERROR_TEXTS["timeout"], wall_s)
    if exit_code == 0:
        return ExecResult("ok", stdout, "", wall_s)
    error = error or f"SystemExit: {exit_code}"
    if exit_code < 0:
        status = "oom" if oom_killed else "crashed"
    else:
        status = "oom" if _is_memory_error(error) else "error"
    return ExecResult(status, stdout, ERROR_TEXTS.get(status, error), wall_s)


def as_text(data: bytes) -> str:
    """Bytes that a program wrote: what is no UTF-8 is replaced, NULs are left out."""
    return data.decode(errors="replace").replace("\0", "")


def last_line(data: bytes) -> str:
    return as_text(data).strip().rpartition("\n")[2].strip()


def _is_memory_error(error: str) -> bool:
    name = error.partition(":")[0]
    return name.rpartition(".")[2] in ("MemoryError", "_ArrayMemoryError")


class Tally:
    """Statuses of programs, and the seconds of the last of them."""

    def __init__(self):
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._statuses: collections.Counter[str] = collections.Counter()
        self._run_s: collections.deque[float] = collections.deque(maxlen=_NUM_TIMES)
        self._queue_s: collections.deque[float] = collections.deque(maxlen=_NUM_TIMES)

    def watch(self, future: Future[ExecResult]) -> Future[ExecResult]:
        """The future of a program that is handed in now; it counts once it has a result."""
        started = time.monotonic()

        def count(done: Future[ExecResult]) -> None:
            if (result := result_of(done)) is not None:
                self.add(result, time.monotonic() - started)

        future.add_done_callback(count)
        return future

    def add(self, result: ExecResult, total_s: float) -> None:
        """Counts a program; total_s: from when it was handed in."""
        with self._lock:
            self._statuses[result.status] += 1
            self._run_s.append(result.wall_s)
            self._queue_s.append(max(0.0, total_s - result.wall_s))

    def stats(self) -> dict[str, Any]:
        """Programs by status ("statuses"), and of the last programs' seconds [median, 99 %]
        ("run_s" and "queue_s"; empty if there were none)."""
        with self._lock:
            return self._stats()

    def take(self) -> dict[str, Any]:
        """`stats` of the programs since this was last called."""
        with self._lock:
            stats = self._stats()
            self._clear()
        return stats

    def _stats(self) -> dict[str, Any]:
        return {
            "statuses": dict(self._statuses),
            "run_s": _percentiles(self._run_s),
            "queue_s": _percentiles(self._queue_s),
        }


def result_of(done: Future[ExecResult]) -> ExecResult | None:
    """What came of a program, if anything did."""
    return None if done.cancelled() or done.exception() else done.result()


def _percentiles(seconds: Sequence[float]) -> list[float]:
    ordered = sorted(seconds)
    return [ordered[len(ordered) * share // 100] for share in (50, 99)] if ordered else []
