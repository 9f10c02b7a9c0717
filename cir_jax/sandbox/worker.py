"""The sandbox's worker: a process with numpy and sympy loaded that forks once for each program.

Importing sympy takes longer than most programs run, and much of it is imported only on first use,
so it is loaded and exercised once, here. This process has one thread and never runs model code;
what it says of a program rests on the wait status and on the two memory files that stand for
stdout and stderr, never on anything the program claims.
"""

import gc
import json
import mmap
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from cir_jax.sandbox import isolation as isolation_lib
from cir_jax.sandbox import program
from cir_jax.sandbox.limits import Limits
from cir_jax.workers import Channel, serve


def main(argv: Sequence[str]) -> None:
    """Args: the limits as JSON, and the number of the socket's descriptor."""
    started = time.monotonic()
    limits = Limits(**json.loads(argv[0]))
    isolation = isolation_lib.enter(limits)
    channel = Channel(int(argv[1]))
    warm_up()
    _hide_package()
    gc.collect()
    gc.freeze()
    info = {"mode": isolation.mode, "start_s": round(time.monotonic() - started, 3)}
    serve(channel, Supervisor(isolation, limits).handle, info)


def warm_up() -> None:
    """Uses what programs use, so that it is imported, compiled and cached before the first fork."""
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


def _hide_package() -> None:
    """Programs see the module path of plain python, without this package's folder in front."""
    del sys.path[0]


class Supervisor:
    """Runs one program after the other and clears up behind each."""

    def __init__(self, isolation: isolation_lib.Isolation, limits: Limits):
        self._isolation = isolation
        self._limits = limits
        self._num_oom_kills = _count_oom_kills()

    def handle(self, job: dict[str, Any]) -> dict[str, Any]:
        try:
            return self._run(job["code"], job["seed"])
        except OSError as error:
            # No process, memory or file to be had: this says nothing about the program.
            self._isolation.sweep()
            return _reply("infra", b"", repr(error), 0.0)

    def _run(self, code: str, seed: int) -> dict[str, Any]:
        folder = self._isolation.make_folder()
        outputs = [os.memfd_create(name) for name in ("stdout", "stderr")]
        shared = mmap.mmap(-1, mmap.PAGESIZE)
        try:
            started = time.monotonic()
            pid = os.fork()
            if pid == 0:
                self._start_program(code, seed, folder, outputs, memoryview(shared))
            in_time = self._wait(pid, started + self._limits.timeout_s)
            _, wait_status = os.waitpid(pid, 0)
            wall_s = time.monotonic() - started
            self._isolation.sweep()
            stdout, stderr = (self._read(fd) for fd in outputs)
            status = self._status(in_time, os.waitstatus_to_exitcode(wait_status), shared[0])
            error = ""
            if status == "error":
                error = _last_line(stderr) or f"SystemExit: {os.WEXITSTATUS(wait_status)}"
            return _reply(status, stdout, error, wall_s)
        finally:
            for fd in outputs:
                os.close(fd)
            shared.close()
            self._isolation.wipe()

    def _start_program(self, code, seed, folder, outputs, out_of_memory) -> None:
        """In the new process; does not return."""
        try:
            os.setsid()  # or kill(0) would reach the worker
            os.dup2(outputs[0], 1)
            os.dup2(outputs[1], 2)
            os.closerange(3, 2**16)
            os.chdir(folder)
            self._isolation.drop(self._limits)
        except BaseException:
            os.kill(os.getpid(), signal.SIGKILL)
        program.run(code, seed, folder, out_of_memory)

    def _wait(self, pid: int, deadline: float) -> bool:
        """Whether the process ended before the deadline; if not, it is killed."""
        pidfd = os.pidfd_open(pid)
        try:
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                return True
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return False
        finally:
            os.close(pidfd)

    def _status(self, in_time: bool, exit_code: int, out_of_memory: int) -> str:
        if not in_time or exit_code == -signal.SIGXCPU:
            return "timeout"
        if exit_code == -signal.SIGKILL:
            before, self._num_oom_kills = self._num_oom_kills, _count_oom_kills()
            return "oom" if self._num_oom_kills > before else "crashed"
        if exit_code < 0:
            return "crashed"
        if exit_code and out_of_memory:
            return "oom"
        return "error" if exit_code else "ok"

    def _read(self, fd: int) -> bytes:
        size, limit = os.fstat(fd).st_size, self._limits.output_bytes
        if size <= limit:
            return os.pread(fd, size, 0)
        head, tail = limit - limit // 2, limit // 2
        cut = b"\n... %d bytes cut ...\n" % (size - limit)
        return os.pread(fd, head, 0) + cut + os.pread(fd, tail, size - tail)


def _reply(status: str, stdout: bytes, error: str, wall_s: float) -> dict[str, Any]:
    return {"status": status, "stdout": _text(stdout), "error": error, "wall_s": wall_s}


def _text(data: bytes) -> str:
    return data.decode(errors="replace").replace("\0", "")


def _last_line(stderr: bytes) -> str:
    return _text(stderr).strip().rpartition("\n")[2].strip()


def _count_oom_kills() -> int:
    """Processes that the kernel has killed for want of memory, on the whole machine."""
    try:
        with open("/proc/vmstat") as file:
            fields = dict(line.split() for line in file)
    except OSError:
        return 0
    return int(fields.get("oom_kill", 0))
