"""The sandbox as the trainer sees it: programs in, ExecResults out, in any order.

What holds on every rung (see isolation.py): a program gets a fresh process, working directory and
module namespace; limits on time, memory, files and output; no network, no process but its own (if
any), no descriptor of the trainer's, and an environment without the trainer's variables. It can
read the interpreter and /usr. Its processes and files are gone before its result comes back. It
cannot end or block the trainer by crashing, hanging or flooding, and cannot forge its status: that
follows from the wait status as its worker reports it, never from what the program writes. (That
it failed, and how, the program may well make up, as any program can.)

What is NOT covered:

- faults of the kernel that a program without capabilities can use through the calls that the
  filter leaves it;
- reading what any user of the machine may read under /usr, but for other interpreters' packages,
  and in the folders of its own interpreter and packages: keep secrets out of those;
- side channels: timing, load, shared caches;
- names of the host's folders that a program's mounts are views of, in /proc/self/mountinfo;
- with `allow_processes`: the memory of all of a program's processes together;
- on `namespaces-flat`: a program can signal its worker (in vain) and see that it exists; its
  process number says how many have been before it;
- on `landlock`: see landlock.py.

A program that runs out of time because it waited for a core runs once more. How long it waited is
known of its first thread only, and not at all on `landlock` and where there is no /proc.

One thread of this process feeds the workers, which are copies of a process that is started by exec:
this process never forks. A process apart for that would keep the workers busier while python code
holds this interpreter's lock (if that code never pauses, a third of the throughput of trivial
programs is lost), but would be one more thing that can die. No deadline depends on the thread: the
workers enforce it.
"""

import dataclasses
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from cir_jax.config import SandboxConfig
from cir_jax.records import ExecResult
from cir_jax.sandbox import canary, packages, probe
from cir_jax.sandbox.environment import ENVIRONMENT
from cir_jax.sandbox.isolation import Rung, cpu_limit_s
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.outcome import Tally, as_text, last_line, outcome
from cir_jax.sandbox.remote import RemoteSandbox
from cir_jax.sandbox.text import ERROR_TEXTS
from cir_jax.workers import FailureReason, TryAgain, WorkerPool

logger = logging.getLogger(__name__)


class Sandbox:
    """Runs programs in `num_workers` worker processes.

    Args:
      limits: of each program.
      num_workers: programs at once; by default one for each core this process may use. More than
        the cores set aside makes programs run out of time that would not have alone.
      isolation: the rung; instead of "namespaces" it may become "namespaces-flat", with a warning.
      attack: whether to run the attacks of canary.py first, and fail unless all are held off.
      interpreter: the python of the programs; it needs numpy and sympy.
      facts: about it, for `description`.

    Raises:
      SandboxError: the machine does not allow this isolation, or it does not hold.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        num_workers: int | None = None,
        *,
        isolation: Rung = "namespaces",
        attack: bool = True,
        interpreter: str = sys.executable,
        facts: Mapping[str, Any] | None = None,
    ):
        self.limits = limits or Limits()
        if isolation == "landlock" and self.limits.allow_processes:
            raise ValueError("allow_processes needs namespaces, which isolation='landlock' has not")
        self.rung = probe.choose_rung(isolation, interpreter)
        self.description = {"rung": self.rung} | dict(facts or {})
        self._num_oom_kills = _count_oom_kills()
        self._tally = Tally()
        self._pool = WorkerPool(
            "cir_jax.sandbox.zygote",
            [self.rung, json.dumps(dataclasses.asdict(self.limits))],
            num_workers=num_workers or len(os.sched_getaffinity(0)),
            timeout_s=self.limits.timeout_s,
            grace_s=self.limits.grace_s,
            decode=self._decode,
            failure=_failure,
            num_outputs=2,
            workers_keep_time=True,
            env=ENVIRONMENT,
            interpreter=interpreter,
            copied=True,
        )
        try:
            if attack:
                canary.check(self._queue, self.limits, self.rung)
        except BaseException:
            self.close()
            raise

    def submit(self, code: str, *, seed: int = 0) -> Future[ExecResult]:
        """Queues a program. `seed` is for its random numbers.

        The future raises workers.PoolError if no worker can be started.
        """
        return self._tally.watch(self._queue(code, seed))

    def attack(self) -> list[canary.Outcome]:
        """Runs the attacks of canary.py, which do not count among the programs of `stats`."""
        return canary.attack(self._queue, self.limits, self.rung)

    def _queue(self, code: str, seed: int = 0) -> Future[ExecResult]:
        return self._pool.submit({"seed": seed}, data=code.encode(errors="surrogatepass"))

    def stats(self) -> dict[str, Any]:
        """Counts of jobs, retries, restarts, recycled workers and host-side timeouts; "workers":
        mode and start-up time of each ready worker; "pids"; "rung"; "statuses": programs by
        status; "run_s" and "queue_s": [median, 99 %] of the last programs' seconds."""
        return self._pool.stats() | self._tally.stats() | {"rung": self.rung}

    def wait_until_ready(self) -> None:
        """Waits for all workers, the spare one included, to be ready; errors as WorkerPool's."""
        self._pool.wait_until_ready()

    def close(self) -> None:
        """Ends all workers and programs. May be called twice."""
        self._pool.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _decode(self, job: dict, reply: dict, outputs: Sequence[int]) -> ExecResult:
        if "failed" in reply:
            reason = f"{reply['failed']}: {_last_line(outputs[1])}"
            logger.warning("the sandbox could not run a program: %s", reason)
            raise TryAgain(ExecResult("infra", error=reason))
        wait_status, in_time = reply["wait_status"], reply["in_time"]
        wall_s, cpu_s, delay_s = (reply[key] for key in ("wall_s", "cpu_s", "delay_s"))
        if not isinstance(wait_status, int) or not 0 <= wait_status < 2**16:
            raise ValueError(f"wait_status {wait_status!r}")
        if not isinstance(in_time, bool):
            raise ValueError(f"in_time {in_time!r}")
        for seconds in (wall_s, cpu_s, delay_s):
            if not isinstance(seconds, float) or not (math.isfinite(seconds) and seconds >= 0):
                raise ValueError(f"{seconds!r} seconds")
        stdout = self._read(outputs[0])
        exit_code = os.waitstatus_to_exitcode(wait_status)
        in_time = in_time and not self._is_out_of_cpu_time(exit_code, cpu_s)
        result = outcome(
            exit_code,
            stdout,
            _last_line(outputs[1]),
            wall_s,
            in_time=in_time,
            oom_killed=exit_code < 0 and in_time and self._was_oom_kill(exit_code),
        )
        if not in_time and delay_s > self.limits.timeout_s / 2:
            raise TryAgain(result)  # it had less than half a core: ours to answer for
        return result

    def _is_out_of_cpu_time(self, exit_code: int, cpu_s: float) -> bool:
        if exit_code == -signal.SIGXCPU:
            return True
        return exit_code == -signal.SIGKILL and cpu_s >= cpu_limit_s(self.limits) - 0.5

    def _was_oom_kill(self, exit_code: int) -> bool:
        before, self._num_oom_kills = self._num_oom_kills, _count_oom_kills()
        return exit_code == -signal.SIGKILL and self._num_oom_kills > before

    def _read(self, fd: int) -> str:
        # Each call lets go of the interpreter's lock, and may have to wait for it: mostly one will
        # do.
        limit = self.limits.output_bytes
        data = os.pread(fd, limit + 1, 0)
        if len(data) <= limit:
            return as_text(data)
        size = os.fstat(fd).st_size
        head, tail = limit - limit // 2, limit // 2
        cut = b"\n... %d bytes cut ...\n" % (size - limit)
        return as_text(os.pread(fd, head, 0) + cut + os.pread(fd, tail, size - tail))


def open_sandbox(cfg: SandboxConfig) -> Sandbox | RemoteSandbox:
    """The sandbox that a config asks for, here or elsewhere.

    Errors as Sandbox, RemoteSandbox and packages.find.
    """
    if cfg.url:
        return RemoteSandbox(cfg.url, limits_of(cfg), max_requests=cfg.max_requests)
    found = packages.find(cfg.runtime)
    return Sandbox(
        limits_of(cfg),
        num_workers=cfg.num_workers,
        isolation=cfg.isolation,
        interpreter=found.interpreter,
        facts=found.describe(),
    )


def limits_of(cfg: SandboxConfig) -> Limits:
    return Limits(
        timeout_s=cfg.timeout_s,
        memory_bytes=cfg.memory_bytes,
        allow_processes=cfg.allow_processes,
    )


_LAST_LINE_BYTES = 2**16


def _last_line(fd: int) -> str:
    size = os.fstat(fd).st_size
    start = max(0, size - _LAST_LINE_BYTES)
    return last_line(os.pread(fd, size - start, start))


def _count_oom_kills() -> int:
    """Processes that the kernel has killed for want of memory, on the whole machine."""
    try:
        with open("/proc/vmstat") as file:
            fields = dict(line.split() for line in file)
    except OSError:
        return 0
    return int(fields.get("oom_kill", 0))


def _failure(job: dict, reason: FailureReason) -> ExecResult:
    """Worker after worker was lost with this program: that is the program's doing."""
    status = "timeout" if reason == "timeout" else "crashed"
    return ExecResult(status, error=ERROR_TEXTS[status])
