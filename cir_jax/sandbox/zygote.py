"""The sandbox's workers: processes with numpy and sympy loaded that are copied for each program.

Importing sympy takes longer than most programs run, and much of it is imported only on first use,
so it is loaded and exercised once, in a process that workers are copies of (see starting.py). A
worker is two processes. One takes jobs and gives results, see supervisor.py. The other, in here,
has one thread and never sees a job: it makes a copy of itself, waits for its end, reports that, and
makes the next one. The copy shuts itself away, and only then takes its job from a socket. So what
is copied is the same each time, and where a program's objects lie (many print their address) does
not tell what was run before.
"""

import gc
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from importlib.machinery import PathFinder
from typing import NoReturn

from cir_jax.channel import Channel, serve_copies
from cir_jax.prctl import die_with_parent
from cir_jax.sandbox import isolation as isolation_lib
from cir_jax.sandbox import linux, memory, program, runtime
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.supervisor import BEGUN, READY, Supervisor

_JOB_BYTES = 2**16
_NUM_REHEARSALS = 3


def main(argv: Sequence[str]) -> None:
    """Makes workers for a pool. Args: rung, limits as JSON, and the number of the socket's
    descriptor."""
    if linux.fix_addresses():
        # Addresses, and orders and texts that follow from them, do not depend on chance.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    die_with_parent()
    # The real one names folders of the host's.
    linux.set_command_line("cir_jax sandbox")
    isolation_lib.give_way()
    limits = Limits(**json.loads(argv[1]))
    libraries = runtime.find()
    libraries.use(moved=False)
    warm_up()
    program.prepare()
    # Where programs will find them; from here on this process imports nothing.
    libraries.use(moved=argv[0] != "landlock")
    _hide_package()
    gc.collect()
    gc.freeze()
    if argv[0] == "landlock":
        memory.move_to_file()  # its workers have no /proc
    serve_copies(int(argv[2]), lambda channel: _work(argv[0], limits, libraries, channel))


def _work(
    rung: isolation_lib.Rung, limits: Limits, libraries: runtime.Runtime, channel: int
) -> NoReturn:
    """A worker. Args: channel: descriptor of its socket to the pool."""
    started = time.monotonic()
    jobs, programs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    reports, writer = os.pipe()

    def supervise(_: int, outside: isolation_lib.Outside) -> NoReturn:
        _keep_files(channel, jobs.fileno(), reports, *outside.files)
        Supervisor(jobs, reports, outside, limits).serve(Channel(channel))

    isolation = isolation_lib.enter(rung, limits, libraries, supervise)
    for fd in (channel, jobs.detach(), reports):
        os.close(fd)
    program.settle("/" if rung == "landlock" else "/tmp")
    PathFinder.find_spec("of_no_module")  # where to look for modules is looked into once
    template = Template(isolation, programs, writer)
    gc.freeze()
    # Not before, though it would be one file for all workers: the page table of what a worker has
    # looked at or written to since then would be copied for each program.
    memory.move_to_file()
    isolation.set_limits()
    _rehearse(isolation)
    os.write(writer, READY.pack(time.monotonic() - started))
    try:
        while True:
            template.run_one()
    except BrokenPipeError:
        os._exit(0)  # nobody is left to report to


def _rehearse(isolation: isolation_lib.Isolation) -> None:
    """Makes processes for no program: the first leaves things in memory that later ones find."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    ours.close()
    with theirs, open("/dev/null", "wb") as nowhere:
        template = Template(isolation, theirs, nowhere.fileno())
        for _ in range(_NUM_REHEARSALS):
            template.run_one()


def _keep_files(*kept: int) -> None:
    """Closes all descriptors but those of the standard streams and these."""
    first = 3
    for fd in (*sorted(kept), 2**16):
        os.closerange(first, fd)
        first = fd + 1


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


class Template:
    """Makes a process for each program.

    Args:
      jobs: socket from which a program's process takes its job.
      reports: descriptor to report each one's end on.
    """

    def __init__(self, isolation: isolation_lib.Isolation, jobs: socket.socket, reports: int):
        self._isolation = isolation
        self._jobs = jobs
        self._reports = reports
        self._end = linux.End()

    def run_one(self) -> None:
        """Runs the next program. Leaves the process's memory as it was, whatever the program."""
        pid = self._isolation.fork()
        if pid == 0:
            self._start_program()
        self._isolation.wait(pid, self._end)
        os.write(self._reports, self._end.memory)

    def _start_program(self) -> NoReturn:
        """In the new process: shuts it away, takes a job and runs it."""
        number, trouble = self._shut_away()
        try:
            text, files, _, _ = socket.recv_fds(self._jobs, _JOB_BYTES, 3)
            if not text:
                os._exit(0)  # there will be none
            os.dup2(files[1], 1)
            os.dup2(files[2], 2)
            if trouble:
                raise trouble
            num_others, seed = map(int, text.split())
            self._isolation.limit_tasks(num_others)
            code = os.pread(files[0], os.fstat(files[0]).st_size, 0)
            program.seed(seed)
            begun = BEGUN.pack(time.monotonic(), number)
            socket.send_fds(self._jobs, [begun], [os.pidfd_open(os.getpid())])
            os.closerange(3, 2**16)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        program.run(code)

    def _shut_away(self) -> tuple[int, BaseException | None]:
        """Returns: its number in /proc, and what has failed, for the stderr of the job to come."""
        number = 0
        try:
            # Of its own: what a program sets on the worker's, the next would find.
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            _keep_files(self._jobs.fileno())
            number = _number_in_proc()
            self._isolation.confine()
        except BaseException as error:
            return number, error
        return number, None


def _number_in_proc() -> int:
    """This process's number there; 0 if there is none."""
    try:
        return int(os.readlink("/proc/self"))
    except OSError:
        return 0
