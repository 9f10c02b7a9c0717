"""A thread that notices when a step takes far longer than the others, and shows what holds it up.

A thread that hangs cannot say so itself: the stacks of all of them are printed instead. Past a
limit the process ends, with the code that says that the same command may go on.
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from typing import TextIO

from cir_jax import exits
from cir_jax.config import WatchdogConfig

_NUM_REMEMBERED = 32
# Before there is a median: programs are compiled in the first steps.
_FIRST_FACTOR = 10


class Watchdog:
    """Watches steps, one at a time.

    Args:
      out: where stacks go; a file with a descriptor.
    """

    def __init__(self, cfg: WatchdogConfig, out: TextIO | None = None):
        self._cfg, self._out = cfg, out or sys.stderr
        self._news = threading.Condition()
        self._what = self._kind = ""
        self._began = 0.0
        self._is_closed = False
        self._spent: dict[str, deque[float]] = {}
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def begin(self, kind: str, number: int) -> None:
        """A step; it lasts until the next one, or `end`. Those of one kind are expected to take
        about as long as each other."""
        self.end()
        with self._news:
            self._what, self._kind, self._began = f"{kind} {number}", kind, time.monotonic()
            self._news.notify()

    def end(self) -> None:
        with self._news:
            if self._what:
                spent = self._spent.setdefault(self._kind, deque(maxlen=_NUM_REMEMBERED))
                spent.append(time.monotonic() - self._began)
            self._what = ""
            self._news.notify()

    def close(self) -> None:
        with self._news:
            self._is_closed = True
            self._news.notify()
        self._thread.join()

    def _patience_s(self) -> float:
        spent = self._spent.get(self._kind)
        if not spent:
            return self._cfg.min_s * _FIRST_FACTOR
        return max(self._cfg.min_s, self._cfg.factor * statistics.median(spent))

    def _watch(self) -> None:
        with self._news:
            while not self._is_closed:
                if not self._what:
                    self._news.wait()
                    continue
                began, patience_s = self._began, self._patience_s()
                while self._what and self._began == began and not self._is_closed:
                    limit_s = self._cfg.limit_s
                    left_s = began + min(patience_s, limit_s) - time.monotonic()
                    if left_s > 0:
                        self._news.wait(left_s)
                        continue
                    self._show(time.monotonic() - began)
                    if time.monotonic() - began >= limit_s:
                        self._end(limit_s)
                    patience_s *= 2

    def _show(self, spent_s: float) -> None:
        others = self._spent.get(self._kind)
        usual = (
            f"the median of {len(others)} is {statistics.median(others):.1f} s"
            if others
            else ("there is none to compare with")
        )
        print(
            f"cir-jax: {self._what} has taken {spent_s:.0f} s, {usual}; what all threads do:",
            file=self._out,
            flush=True,
        )
        faulthandler.dump_traceback(self._out, all_threads=True)

    def _end(self, limit_s: float) -> None:
        print(
            f"cir-jax: {self._what} took longer than watchdog.limit_s={limit_s:g}: ended; "
            "resume=true goes on from the last checkpoint",
            file=self._out,
            flush=True,
        )
        os._exit(exits.AGAIN)
