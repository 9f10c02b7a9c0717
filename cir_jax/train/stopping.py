"""What signals do: Ctrl-C ends a run after its step, SIGTERM and SIGHUP as soon as can be.

A machine that is about to be taken away sends SIGTERM, and may not wait for a step; a terminal that
is closed, or a connection that is lost, SIGHUP (which nohup has ignored). Between two updates the
parameters are those of the last one: rollouts under way are dropped, and sampled anew, the same to
the bit, when the run goes on.

Of several processes any may get the signal. All drop a rollout at the same segment, whose report
says so, and look at each other where a step ends.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

from cir_jax import exits, hosts
from cir_jax.config import ConfigError
from cir_jax.exits import Interrupted, RunError
from cir_jax.sandbox.errors import SandboxError
from cir_jax.workers import PoolError

_AT_ONCE = (signal.SIGTERM, signal.SIGHUP)


class Stopper:
    """Asked to stop, or not. note: is told when a signal comes; end: called before the process
    ends at a second one."""

    def __init__(self, note: Callable[[str], None], end: Callable[[], None]):
        self._note, self._end = note, end
        self.signum = 0
        self._may_drop = False

    def agreed(self) -> int:
        """The signal that asked any process, or 0; Ctrl-C before others."""
        asked = hosts.exchange("stopping", self.signum)
        if any(asked) and not self.signum:
            who = ", ".join(str(i) for i, signum in enumerate(asked) if signum)
            self._note(f"process {who} was asked to stop")
        return signal.SIGINT if signal.SIGINT in asked else max(asked)

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Signal handlers are these meanwhile."""
        hosts.want_to_drop(False)
        kept = [s for s in _AT_ONCE if signal.getsignal(s) != signal.SIG_IGN]
        before = {s: signal.signal(s, self._ask) for s in (signal.SIGINT, *kept)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextlib.contextmanager
    def droppable(self) -> Iterator[None]:
        """What is not to wait for a step raises Interrupted in here, in the middle: nothing that
        counts is changed."""
        if (asked := self.agreed()) in _AT_ONCE:
            raise Interrupted(asked)
        self._may_drop = True
        try:
            with hosts.droppable():
                yield
        except hosts.Stopped:
            raise Interrupted(self.agreed() or signal.SIGTERM) from None
        finally:
            self._may_drop = False

    def _ask(self, signum: int, frame) -> None:
        if self.signum:
            self._end()
            os._exit(128 + signum)
        self.signum = signum
        if signum in _AT_ONCE:
            self._note(f"{signal.Signals(signum).name}: saving, then ending")
            hosts.want_to_drop(True)
            if self._may_drop and hosts.count() == 1:
                raise Interrupted(signum)
        else:
            self._note("stopping after this step; once more to stop at once")


def is_agreed(error: BaseException) -> bool:
    """Whether all processes of a run raise it at the same point, each for what all of them see."""
    return isinstance(error, Interrupted) or getattr(error, "code", None) == exits.GATE


def exit_code(error: BaseException) -> int | None:
    """After an error that its user can do something about; None after another."""
    if isinstance(error, ConfigError | SandboxError):
        return exits.USER
    if isinstance(error, Interrupted):
        return 128 + error.signum
    if isinstance(error, KeyboardInterrupt):
        return exits.INTERRUPTED
    if isinstance(error, PoolError):
        return exits.AGAIN
    if isinstance(error, OSError):
        error = exits.storage_error(error)
    return error.code if isinstance(error, RunError) else None
