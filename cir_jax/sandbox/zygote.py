"""The sandbox's worker: a process with numpy and sympy loaded that is copied for each program.

Importing sympy takes longer than most programs run, and much of it is imported only on first use,
so it is loaded and exercised once, here. This process has one thread and never runs or parses
model code. What is said of a program is its wait status and times; nobody here looks at what the
program wrote, which lies in memory files of the trainer's.

Each job is a supervisor's: a copy of this process that reads it, forks the program's process,
waits for that, and replies. So this process itself is the same before each job, and where a
program's objects lie (many print their address) does not tell what was run before. Only on rung
namespaces-flat, where programs can signal all but the namespace's first process, is that one the
supervisor of all of them, and addresses differ.
"""

import gc
import json
import os
import select
import signal
import struct
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from cir_jax.channel import Channel
from cir_jax.prctl import die_with_parent
from cir_jax.sandbox import isolation as isolation_lib
from cir_jax.sandbox import linux, program
from cir_jax.sandbox.limits import Limits

_TIME = struct.Struct("d")
_LAST = 3  # exit status of a supervisor after which no other job is to be done


def main(argv: Sequence[str]) -> None:
    """Args: rung, limits as JSON, and the number of the socket's descriptor."""
    started = time.monotonic()
    if linux.fix_addresses():
        # Addresses, and orders and texts that follow from them, do not depend on chance. They may
        # still differ between workers, whose starts differ in small things.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # The real one names folders of the host's.
    linux.set_command_line("cir_jax sandbox")
    limits = Limits(**json.loads(argv[1]))
    isolation = isolation_lib.enter(argv[0], limits)
    channel = Channel(int(argv[2]))
    warm_up()
    program.prepare("/" if isolation.rung == "landlock" else "/tmp")
    _hide_package()
    supervisor = Supervisor(isolation, limits)
    gc.collect()
    gc.freeze()
    seconds = round(time.monotonic() - started, 3)
    channel.send({"ready": {"mode": isolation.rung, "start_s": seconds}})
    answer = supervisor.answer if isolation.rung == "namespaces-flat" else supervisor.delegate
    while answer(channel):
        pass


def _hide_package() -> None:
    """Programs find no module of this package's, as in plain python."""
    package = __name__.partition(".")[0]
    for name in list(sys.modules):
        if name.partition(".")[0] == package:
            del sys.modules[name]


def warm_up() -> None:
    """Uses what programs use, so that it is imported, compiled and cached before the first fork."""
    import asyncio  # noqa: F401
    import cmath  # noqa: F401
    import collections  # noqa: F401
    import decimal  # noqa: F401
    import fractions  # noqa: F401
    import itertools  # noqa: F401
    import statistics  # noqa: F401

    import numpy as np
    import numpy.random  # imported by numpy only on first use
    import sympy as sp

    program.seed(0)  # sympy tries random numbers: else what it leaves would differ among workers
    np.linalg.solve(np.eye(2), np.ones(2))
    str(np.arange(6).reshape(2, 3) / 7)
    x, y = sp.symbols("x y")
    sp.solve(x**2 - 3 * x + 2, x)
    sp.solve([x + y - 3, x - y - 1], [x, y])
    sp.solve(sp.Eq(sp.sqrt(x + 1), 3), x)
    sp.solveset(x**2 - 2, x, domain=sp.S.Reals)
    sp.simplify(sp.sin(x) ** 2 + sp.cos(x) ** 2)
    sp.factor(x**3 - 1), sp.expand((x + y) ** 3), sp.apart(1 / (x * (x + 1)))
    sp.diff(sp.exp(x) * sp.sin(x), x), sp.integrate(x * sp.exp(x), (x, 0, 1))
    sp.limit(sp.sin(x) / x, x, 0), sp.series(sp.exp(x), x, 0, 3)
    sp.summation(x, (x, 1, 10)), sp.Matrix([[1, 2], [3, 4]]).inv()
    sp.factorint(360), sp.isprime(101), sp.N(sp.pi, 30), sp.nsolve(sp.cos(x) - x, 1)
    sp.latex(sp.Rational(1, 3) + sp.sqrt(2)), sp.sympify("2*x + 1")


class Supervisor:
    """Runs programs and says what came of each."""

    def __init__(self, isolation: isolation_lib.Isolation, limits: Limits):
        self._isolation = isolation
        self._timeout_s = limits.timeout_s
        self._start_timeout_s = limits.grace_s / 2
        # A program's process says on it when it began, and closes it before any model code.
        self._begun, self._say_begun = os.pipe()
        os.set_blocking(self._begun, False)

    def delegate(self, channel: Channel) -> bool:
        """As `answer`, by a copy of this process, which so stays as it is."""
        # The copy is there before the job is. No object outlives this call, and what comes last
        # goes first: so memory is free in the same order each time.
        pid = linux.fork()
        if pid == 0:
            self._answer_once(channel)
        return os.waitpid(pid, 0)[1] == 0

    def _answer_once(self, channel: Channel) -> NoReturn:
        """In the copy."""
        try:
            die_with_parent()
            os._exit(0 if self.answer(channel) else _LAST)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def answer(self, channel: Channel) -> bool:
        """Waits for a job, runs it and replies; False if no more will come."""
        message = channel.receive()
        if message is None:
            return False
        files = channel.take_files()
        reply = self.run(files, message["job"]["seed"])
        for fd in files:
            os.close(fd)
        is_clear = self._isolation.clear_up()
        channel.send({"id": message["id"], "reply": reply, "last": not is_clear})
        return is_clear

    def run(self, files: Sequence[int], seed: int) -> dict[str, Any]:
        """Args: descriptors of the code, stdout and stderr; and the program's seed.

        Returns: "wait_status", "in_time", "wall_s" from when it was isolated, "cpu_s" of all its
          processes that were waited for, and "delay_s", for which a program out of time had been
          ready but had no core (see _run_delay_s); or "failed" with a reason that has nothing to do
          with the program.
        """
        program.seed(seed)
        try:
            forked = time.monotonic()
            pid = self._isolation.fork()
        except OSError as error:
            return {"failed": repr(error)}
        if pid == 0:
            self._start_program(files)
        pidfd = os.pidfd_open(pid)
        try:
            begun, in_time = self._wait(pidfd, forked)
            delay_s = 0.0
            if not in_time:
                delay_s = _run_delay_s(pid)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
        _, wait_status, usage = os.wait4(pid, 0)
        if begun is None:
            return {"failed": "the program's process was not confined"}
        return {
            "wait_status": wait_status,
            "in_time": in_time,
            "wall_s": time.monotonic() - begun,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "delay_s": delay_s,
        }

    def _start_program(self, files: Sequence[int]) -> None:
        """In the new process; does not return."""
        try:
            code = os.pread(files[0], os.fstat(files[0]).st_size, 0)
            # Of its own: what a program sets on the worker's, the next would find.
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.dup2(files[1], 1)
            os.dup2(files[2], 2)
            os.dup2(self._say_begun, 3)
            os.closerange(4, 2**16)
            self._isolation.confine()
            os.write(3, _TIME.pack(time.monotonic()))
            os.close(3)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        program.run(code)

    def _wait(self, pidfd: int, forked: float) -> tuple[float | None, bool]:
        """When the program began (None: it did not), and whether it ended in time after that."""
        in_time = _is_ready([pidfd], forked + self._timeout_s)
        begun = self._read_begun()
        if in_time:
            return begun, True
        if begun is None:
            limit = forked + self._timeout_s + self._start_timeout_s
            _is_ready([pidfd, self._begun], limit)
            begun = self._read_begun()
        return begun, begun is not None and _is_ready([pidfd], begun + self._timeout_s)

    def _read_begun(self) -> float | None:
        try:
            return _TIME.unpack(os.read(self._begun, _TIME.size))[0]
        except BlockingIOError:
            return None


def _is_ready(fds: Sequence[int], deadline: float) -> bool:
    """Whether one of the descriptors can be read (a process's: it has ended) by the deadline."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    while (left_s := deadline - time.monotonic()) > 0:
        if poll.poll(left_s * 1000):
            return True
    return False


def _run_delay_s(pid: int) -> float:
    """Seconds for which the process's first thread had to wait for a core.

    Other threads and processes of the program do not count. Always 0 on rung landlock, and where
    /proc is not to be had.
    """
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
