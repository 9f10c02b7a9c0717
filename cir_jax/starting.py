"""How a pool's worker processes come about: each started by exec, or as copies of one that is.

Neither forks this process, which may hold threads of an accelerator.
"""

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cir_jax.channel import ORIGIN_READY

_COPY_TIMEOUT_S = 10.0


class Process(Protocol):
    """A worker's."""

    pid: int

    def has_ended(self) -> bool: ...

    def kill(self) -> None:
        """With all that it has started and left in its process group."""
        ...

    def is_gone(self) -> bool:
        """As has_ended; nothing must be asked of it after that."""
        ...


class Starter(Protocol):
    def start(self, fd: int) -> Process:
        """Starts a worker.

        Args:
          fd: its end of a socket to the pool; the caller closes it.

        Raises:
          OSError: this machine does not let it.
        """
        ...

    def close(self) -> None: ...


class Execs:
    """Starts each worker by exec.

    Args:
      argv: command; the number of the socket's descriptor comes after it.
      env: the whole environment; None inherits.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str] | None):
        self._argv = list(argv)
        self._env = env

    def start(self, fd: int) -> "_Executed":
        process = subprocess.Popen(
            [*self._argv, str(fd)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[fd],
            env=self._env,
            cwd="/",
            # An own session: Ctrl-C in the terminal is the trainer's to handle.
            start_new_session=True,
        )
        return _Executed(process)

    def close(self) -> None:
        pass


class _Executed:
    def __init__(self, process: subprocess.Popen):
        self.pid = process.pid
        self._process = process

    def has_ended(self) -> bool:
        # Without reaping it: its number stays taken until its group is killed.
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self.pid, flags) is not None

    def kill(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            self._process.kill()

    def is_gone(self) -> bool:
        return self._process.poll() is not None


class Copies:
    """Starts a process by exec, once, that makes each worker by a fork of itself.

    It has to call channel.serve_copies, and its copies to end when it does: so they end with this
    process, too. What all workers need is loaded once.

    Args:
      argv, env: as of Execs, of that process.
      timeout_s: limit for it to become ready.
      is_cancelled: asked while a start waits for that.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None,
        *,
        timeout_s: float,
        is_cancelled: Callable[[], bool],
    ):
        self._execs = Execs(argv, env)
        self._timeout_s = timeout_s
        self._is_cancelled = is_cancelled
        self._origin: _Executed | None = None
        self._socket: socket.socket | None = None

    def start(self, fd: int) -> "_Copy":
        """Waits for the process to be ready if it is yet to be started, or has ended."""
        if self._origin is None or self._origin.has_ended():
            self.close()
            self._start_origin()
        try:
            socket.send_fds(self._socket, [b"x"], [fd])
            said, files = self._receive(_COPY_TIMEOUT_S)
        except OSError:
            self.close()
            raise
        if not files:
            raise OSError(said.decode(errors="replace"))
        return _Copy(int(said), files[0])

    def _start_origin(self) -> None:
        ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        self._socket = ours
        with theirs:
            self._origin = self._execs.start(theirs.fileno())
        try:
            said, _ = self._receive(self._timeout_s)
            if said != ORIGIN_READY:
                raise OSError(f"it said {said!r}")
        except OSError as error:
            self.close()
            raise OSError(f"the process that they are copied from did not start: {error}") from None

    def _receive(self, timeout_s: float) -> tuple[bytes, list[int]]:
        deadline = time.monotonic() + timeout_s
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        while not poll.poll(50):
            if self._is_cancelled():
                raise OSError("it is not wanted any more")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no answer after {timeout_s} s")
        said, files, _, _ = socket.recv_fds(self._socket, 1000, 1)
        if not said:
            raise OSError("it has ended; what it said is on stderr")
        return said, files

    def close(self) -> None:
        """Ends the process, and so its copies."""
        if self._socket is not None:
            self._socket.close()
        if self._origin is not None:
            self._origin.kill()
            while not self._origin.is_gone():
                time.sleep(0.001)
        self._origin = self._socket = None


class _Copy:
    def __init__(self, pid: int, pidfd: int):
        self.pid = pid
        self._pidfd = pidfd

    def has_ended(self) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def kill(self) -> None:
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def is_gone(self) -> bool:
        if ended := self.has_ended():
            os.close(self._pidfd)
        return ended
