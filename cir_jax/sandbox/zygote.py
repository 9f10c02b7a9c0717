"""The sandbox's worker: a process with numpy and sympy loaded that forks once for each program.

Importing sympy takes longer than most programs run, and much of it is imported only on first use,
so it is loaded and exercised once, here. This process has one thread and never runs or parses
model code. What it says of a program is its wait status and times; it never looks at what the
program wrote, which lies in memory files of the trainer's.
"""

import gc
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

from cir_jax.channel import Channel
from cir_jax.sandbox import isolation as isolation_lib
from cir_jax.sandbox import linux, program
from cir_jax.sandbox.limits import Limits


def main(argv: Sequence[str]) -> None:
    """Args: rung, limits as JSON, and the number of the socket's descriptor."""
    started = time.monotonic()
    if linux.fix_addresses():
        # So that orders and texts that follow from objects' addresses are the same in all workers.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    limits = Limits(**json.loads(argv[1]))
    isolation = isolation_lib.enter(argv[0], limits)
    channel = Channel(int(argv[2]))
    warm_up()
    program.prepare("/" if isolation.rung == "landlock" else "/tmp")
    _hide_package()
    gc.collect()
    gc.freeze()
    seconds = round(time.monotonic() - started, 3)
    channel.send({"ready": {"mode": isolation.rung, "start_s": seconds}})
    supervisor = Supervisor(isolation, limits)
    while (message := channel.receive()) is not None:
        files = channel.take_files()
        reply = supervisor.run(files, message["job"]["seed"])
        for fd in files:
            os.close(fd)
        is_clear = isolation.clear_up()
        channel.send({"id": message["id"], "reply": reply, "last": not is_clear})


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
    """Runs one program after the other."""

    def __init__(self, isolation: isolation_lib.Isolation, limits: Limits):
        self._isolation = isolation
        self._timeout_s = limits.timeout_s
        # A program's process says on it that it has begun, and closes it before any model code.
        self._begun, self._say_begun = os.pipe()
        os.set_blocking(self._begun, False)

    def run(self, files: Sequence[int], seed: int) -> dict[str, Any]:
        """Args: descriptors of the code, stdout and stderr; and the program's seed.

        Returns: "wait_status", "in_time", "wall_s", "cpu_s" of all its processes that were waited
          for, and "delay_s", for which a program out of time had been ready but had no core; or
          "failed" with a reason that has nothing to do with the program.
        """
        program.seed(seed)
        started = time.monotonic()
        try:
            pid = self._isolation.fork()
        except OSError as error:
            return {"failed": repr(error)}
        if pid == 0:
            self._start_program(files)
        pidfd = os.pidfd_open(pid)
        try:
            in_time = self._wait(pidfd, started + self._timeout_s)
            delay_s = 0.0
            if not in_time:
                delay_s = _run_delay_s(pid)
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)
        _, wait_status, usage = os.wait4(pid, 0)
        try:
            os.read(self._begun, 1)
        except BlockingIOError:
            return {"failed": "the program's process could not be confined"}
        return {
            "wait_status": wait_status,
            "in_time": in_time,
            "wall_s": time.monotonic() - started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "delay_s": delay_s,
        }

    def _start_program(self, files: Sequence[int]) -> None:
        """In the new process; does not return."""
        try:
            code = os.pread(files[0], os.fstat(files[0]).st_size, 0)
            os.dup2(files[1], 1)
            os.dup2(files[2], 2)
            os.dup2(self._say_begun, 3)
            os.closerange(4, 2**16)
            self._isolation.confine()
            os.write(3, b"x")
            os.close(3)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        program.run(code)

    def _wait(self, pidfd: int, deadline: float) -> bool:
        """Whether the process ended before the deadline."""
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        while (left_s := deadline - time.monotonic()) > 0:
            if poll.poll(left_s * 1000):
                return True
        return False


def _run_delay_s(pid: int) -> float:
    """Seconds for which the process's first thread had to wait for a core."""
    try:
        with open(f"/proc/{pid}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0  # not everywhere to be had
