"""Equal programs of a group run once: which seed a program gets, and who else waits for it.

A program's output is a function of its text and its seed, so programs share a run if both are
equal. Those that draw random numbers get a seed of their own for each sample and call, as plain
python would give them other numbers each time; all others get their group's, which they have no
use for. Which of the two is decided by the text alone: neither order nor worker can change an
output. A program that draws without saying so (by a library's doing, or on purpose) is as
deterministic; its numbers are those of its group.
"""

import dataclasses
import functools
import hashlib
import re
import threading
from concurrent.futures import Future

from cir_jax.records import ExecResult
from cir_jax.sandbox.executor import Submitter

# random, numpy.random, sympy's randprime and randMatrix, scipy's rvs, sympy.stats, networkx's
# random graphs.
_DRAWS = re.compile(r"rand|\brvs\b|\bstats\b|_graph\b", re.IGNORECASE)


def program_seed(code: str, group: tuple, call: tuple) -> int:
    """The seed, under 2^32, of a program.

    Args:
      group: what names the group: the run's seed, phase, step, problem.
      call: what names the call within it: sample, number of the call.
    """
    place = (*group, *call) if _DRAWS.search(code) else group
    return int.from_bytes(hashlib.blake2b(repr(place).encode(), digest_size=4).digest())


@dataclasses.dataclass(eq=False)
class _Run:
    future: Future[ExecResult]
    num_waiting: int = 0


class Shared:
    """Submits each pair of program and seed once; everyone who asks has a future of their own.

    Cancelling one cancels the program if nobody else waits for it.
    """

    def __init__(self, sandbox: Submitter):
        self._sandbox = sandbox
        self._runs: dict[tuple[str, int], _Run] = {}
        self._lock = threading.Lock()
        self.num_shared = 0
        """Calls that were answered by another one's run."""

    def submit(self, code: str, seed: int) -> Future[ExecResult]:
        key = (code, seed)
        with self._lock:
            run = self._runs.get(key)
            if run is None:
                run = self._runs[key] = _Run(self._sandbox.submit(code, seed=seed))
            else:
                self.num_shared += 1
            run.num_waiting += 1
        own: Future[ExecResult] = Future()
        own.add_done_callback(functools.partial(self._leave, key, run))
        run.future.add_done_callback(functools.partial(_pass_on, own))
        return own

    def _leave(self, key: tuple[str, int], run: _Run, own: Future[ExecResult]) -> None:
        if not own.cancelled():
            return
        with self._lock:
            run.num_waiting -= 1
            # What runs already goes on, and may still be asked for.
            if run.num_waiting == 0 and run.future.cancel():
                del self._runs[key]


def _pass_on(own: Future[ExecResult], run: Future[ExecResult]) -> None:
    if run.cancelled() or not own.set_running_or_notify_cancel():
        return
    if error := run.exception():
        own.set_exception(error)
    else:
        own.set_result(run.result())
