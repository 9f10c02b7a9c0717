"""What Ctrl-C and SIGTERM do: Ctrl-C ends a run after its step, SIGTERM as soon as can be.

A machine that is about to be taken away sends SIGTERM, and may not wait for a step. Between two
updates the parameters are those of the last one: rollouts under way are dropped, and sampled anew,
the same to the bit, when the run goes on.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator


class Interrupted(Exception):
    """A signal asked for the end: what there was to save is saved, `resume=true` goes on."""

    def __init__(self, signum: int = signal.SIGINT):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Stopper:
    """Asked to stop, or not. note: is told when a signal comes; end: called before the process
    ends at a second one."""

    def __init__(self, note: Callable[[str], None], end: Callable[[], None]):
        self._note, self._end = note, end
        self.signum = 0
        self._may_drop = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signal handlers are these meanwhile."""
        before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextlib.contextmanager
    def droppable(self) -> Iterator[None]:
        """SIGTERM raises Interrupted in here, in the middle: nothing that counts is changed."""
        if self.signum == signal.SIGTERM:
            raise Interrupted(self.signum)
        self._may_drop = True
        try:
            yield
        finally:
            self._may_drop = False

    def _ask(self, signum: int, frame) -> None:
        if self.signum:
            self._end()
            os._exit(128 + signum)
        self.signum = signum
        if signum == signal.SIGTERM:
            self._note("SIGTERM: saving, then ending")
            if self._may_drop:
                raise Interrupted(signum)
        else:
            self._note("stopping after this step; once more to stop at once")
