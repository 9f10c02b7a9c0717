"""The worker's first process: takes jobs, watches the programs' processes, and says what came of
them.

It is small, stays outside of the programs' process namespace (if there is one), and never runs or
parses model code: what is said of a program is its wait status and times; nobody here looks at what
the program wrote, which lies in memory files of the trainer's. The processes that run the programs
are copies of another one, see zygote.py; each waits for its job from its start on.
"""

import os
import select
import signal
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from cir_jax.channel import Channel
from cir_jax.sandbox import linux
from cir_jax.sandbox.isolation import Outside
from cir_jax.sandbox.limits import Limits

READY = struct.Struct("d")
"""What the process that is copied reports first: the seconds that its start took."""
BEGUN = struct.Struct("di")
"""What a program's process says as it begins, with a descriptor of itself: the monotonic time, and
its number in /proc, or 0."""


class Supervisor:
    """Has programs run and says what came of each.

    Args:
      jobs: socket to the program's process of the time, which takes a job from it (see zygote.py).
      reports: descriptor on which READY comes, then a linux.End of each program's process.
    """

    def __init__(self, jobs: socket.socket, reports: int, outside: Outside, limits: Limits):
        self._jobs = jobs
        self._reports = reports
        self._outside = outside
        self._timeout_s = limits.timeout_s
        self._start_timeout_s = limits.grace_s / 2
        self._used_s = 0.0
        """Processor time of the programs until now."""

    def serve(self, channel: Channel) -> NoReturn:
        """Answers the pool's jobs, until either side has gone or the worker is to be replaced."""
        os._exit(self._serve(channel))

    def _serve(self, channel: Channel) -> int:
        ready = os.read(self._reports, READY.size)
        if not ready:
            return 1  # what went wrong it has said itself
        self._outside.look()
        channel.send({"ready": {"mode": self._outside.rung, "start_s": READY.unpack(ready)[0]}})
        while True:
            # Between programs there is nothing to report, but that there is nobody to run the next.
            if self._reports in _readable([channel.fileno(), self._reports], None):
                return 1
            message = channel.receive()
            if message is None:
                return 0
            files = channel.take_files()
            reply = self.run(files, message["job"]["seed"])
            if reply is None:
                return 1
            for fd in files:
                os.close(fd)
            is_clear = "failed" not in reply and self._outside.clear_up()
            channel.send({"id": message["id"], "reply": reply, "last": not is_clear})
            if not is_clear:
                return 0

    def run(self, files: Sequence[int], seed: int) -> dict[str, Any] | None:
        """Args: descriptors of the code, stdout and stderr; and the program's seed.

        Returns: "wait_status", "in_time", "wall_s" from when it began, "cpu_s" of all its processes
          that were waited for, and "delay_s", for which a program out of time had been ready but
          had no core (see _run_delay_s); or "failed" with a reason that has nothing to do with the
          program, after which it must not be called again; or None: the process that is copied is
          lost.
        """
        text = f"{self._outside.count_tasks()} {seed}"
        socket.send_fds(self._jobs, [text.encode()], files)
        handed_over = time.monotonic()
        begun, delay_s = None, 0.0
        in_time = self._has_ended(handed_over + self._timeout_s)
        if not in_time:
            begun = self._take_begun(handed_over + self._timeout_s + self._start_timeout_s)
            if begun is None:
                return {"failed": "the program's process was not ready in time"}
            in_time = self._has_ended(begun.at + self._timeout_s)
            if not in_time:
                delay_s = _run_delay_s(begun.number)
                signal.pidfd_send_signal(begun.pidfd, signal.SIGKILL)
        report = os.read(self._reports, linux.End.NUM_BYTES)
        if not report:
            return None
        begun = begun or self._take_begun(0.0)
        if begun is None:
            return {"failed": "the program's process was not confined"}
        os.close(begun.pidfd)
        wait_status, used_s = linux.End.parse(report)
        cpu_s, self._used_s = max(0.0, used_s - self._used_s), used_s
        return {
            "wait_status": wait_status,
            "in_time": in_time,
            "wall_s": time.monotonic() - begun.at,
            "cpu_s": cpu_s,
            "delay_s": delay_s,
        }

    def _has_ended(self, deadline: float) -> bool:
        """Waits for it."""
        return bool(_readable([self._reports], deadline))

    def _take_begun(self, deadline: float) -> "_Begun | None":
        """Waits for the program to begin; None if it did not, or ended before that."""
        if self._jobs.fileno() not in _readable([self._jobs.fileno(), self._reports], deadline):
            return None
        data, files, _, _ = socket.recv_fds(self._jobs, BEGUN.size, 1)
        return _Begun(*BEGUN.unpack(data), *files)


class _Begun(NamedTuple):
    at: float
    number: int
    pidfd: int


def _readable(fds: Sequence[int], deadline: float | None) -> list[int]:
    """Which of the descriptors can be read, as soon as one can or the deadline has passed."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    if deadline is None:
        return [fd for fd, _ in poll.poll()]
    while True:
        left_s = deadline - time.monotonic()
        if (ready := poll.poll(max(0.0, left_s) * 1000)) or left_s <= 0:
            return [fd for fd, _ in ready]


def _run_delay_s(number: int) -> float:
    """Seconds for which the process's first thread had to wait for a core.

    Other threads and processes of the program do not count. Always 0 on rung landlock, and where
    /proc is not to be had.
    """
    try:
        with open(f"/proc/{number}/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0
