"""The sandbox elsewhere: programs run at a SandboxFusion-compatible service, by HTTP.

The protocol is one request: POST /run_code with "code", "language" and "run_timeout", answered by
"status", "message" and, of the command that was run, "run_result" with "status", "return_code",
"stdout" and "stderr" (https://bytedance.github.io/SandboxFusion). What is sent as code is a script
of ours (guest.py) around the program, so that results are those of the sandbox here: trailing
expressions, random numbers, the order of sets, tracebacks, limits on time, memory and output, both
ends of a long one. A script that does not come to its end is sent again; then the program is to
blame, if another one does.

What the service has to see to: that programs reach nothing they should not, and are gone when they
end; that nobody else hears the requests. No attack of canary.py is tried there. Its python (from
3.10 on, on Linux) needs numpy and sympy, and may start processes; results are as good as their
versions are equal.

What differs from here: libraries are imported within the program's own time; the working folder is
the service's, and need not be empty; outputs are cut at 2^18 bytes; whether the kernel ended a
program for want of memory cannot be told (it is "crashed"); `allow_processes`, `scratch_bytes`,
`num_tasks` and other limits of Limits that guest.py does not name are the service's affair; the
program can deceive the script around it, so as to end as it likes: about itself alone.

An answer is text of a stranger's: bounded, checked, and nothing but a status, a time and two
texts is taken from it. Threads of this process wait for answers, one for each request in flight;
http.client does, so there is nothing to install, and this process never forks.
"""

import base64
import contextlib
import functools
import http.client
import json
import logging
import math
import queue
import random
import socket
import threading
import time
import urllib.parse
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

from cir_jax.records import ExecResult
from cir_jax.sandbox import guest, program
from cir_jax.sandbox.environment import ENVIRONMENT
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.outcome import Tally, as_text, last_line, outcome
from cir_jax.sandbox.text import ERROR_TEXTS

logger = logging.getLogger(__name__)

# What the service gets on top of a program's time to start the two interpreters.
_START_S = 10.0
# Services keep the first 2^20 bytes of an output: what is sent back has to fit, as base64.
_MAX_OUTPUT_BYTES = 2**18
_MAX_BODY_BYTES = 2**22
_MAX_EXCERPT = 200
# So often a script has to be lost before its program is to blame (if others are not lost).
_MAX_LOSSES = 2
_CHECKS = 2
_MAX_BACKOFF_S = 30.0
_VERSIONS = """\
import platform, numpy, sympy
print("python", platform.python_version(), "numpy", numpy.__version__, "sympy", sympy.__version__)
"""


class _Unavailable(Exception):
    """The service gave no answer that can be used.

    Args:
      reason: in one line.
      final: whether it will not do any better.
    """

    def __init__(self, reason: str, *, final: bool = False):
        super().__init__(" ".join(reason.split()))
        self.final = final


class _Lost(Exception):
    """The script ended, or was ended, before it could say what came of the program.

    Args:
      status: the program's, if it is to blame.
      reason: in one line.
    """

    def __init__(self, status: Literal["timeout", "crashed"], reason: str):
        super().__init__(" ".join(reason.split()))
        self.status = status


class RemoteSandbox:
    """Runs programs at a service; the same results as Sandbox.

    Args:
      url: of the service: http or https, host, and what goes before /run_code in a path.
      limits: of each program; see above which.
      max_requests: in flight at once, and threads of this process.
      grace_s: how much later than the service should an answer is given up.
      num_attempts: requests for a program until it is "infra".
      backoff_s: between the first two of them; it doubles from each to the next.

    Raises:
      SandboxError: the service does not answer, or does not run programs as needed.
    """

    def __init__(
        self,
        url: str,
        limits: Limits | None = None,
        *,
        max_requests: int,
        grace_s: float = 15.0,
        num_attempts: int = 6,
        backoff_s: float = 1.0,
    ):
        self.url = url
        self.limits = limits or Limits()
        self._host, self._port, self._secure, self._path = _parse(url)
        self._run_timeout_s = self.limits.timeout_s + _START_S
        self._answer_s = self._run_timeout_s + grace_s
        self._num_attempts, self._backoff_s = num_attempts, backoff_s
        self._tally = Tally()
        self._lock = threading.Lock()
        self._counts = {"jobs": 0, "retries": 0}
        self._closing = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._queue: queue.SimpleQueue[tuple[str, int, Future[ExecResult]] | None]
        self._queue = queue.SimpleQueue()
        # What, besides limits, program and seed, may decide what programs print.
        self.description = {"rung": "remote", "versions": self._check()}
        self._threads = [
            threading.Thread(target=self._serve, name=f"{url} {i}", daemon=True)
            for i in range(max_requests)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, code: str, *, seed: int = 0) -> Future[ExecResult]:
        """As Sandbox's. A service that cannot be reached makes the result "infra"."""
        future: Future[ExecResult] = Future()
        with self._lock:
            if self._closing.is_set():
                raise RuntimeError(_CLOSED)
            self._queue.put((code, seed, self._tally.watch(future)))
        return future

    def stats(self) -> dict[str, Any]:
        """Counts of jobs answered and of retries; "rung", "url" and "versions" (of the service's
        libraries); "statuses", "run_s", "queue_s" as Sandbox's."""
        with self._lock:
            counts = dict(self._counts)
        return counts | self._tally.stats() | self.description | {"url": self.url}

    def close(self) -> None:
        """Gives up all requests; programs without a result get a RuntimeError."""
        with self._lock:
            self._closing.set()
            sockets = list(self._sockets)
            for _ in self._threads:
                self._queue.put(None)
        for connected in sockets:
            _hang_up(connected)
        for thread in self._threads:
            thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def _check(self) -> str:
        """Runs a program before any other; returns the service's versions."""
        for _ in range(_CHECKS):
            try:
                result = _result(self._exchange(self._payload(_VERSIONS, seed=0)))
                break
            except (_Unavailable, _Lost) as error:
                result = ExecResult("infra", error=str(error))
        if result.status != "ok":
            raise SandboxError(f"sandbox.url={self.url!r}: {result.error}")
        versions = result.stdout.strip()[:_MAX_EXCERPT]
        logger.info("programs run at %s with %s", self.url, versions)
        return versions

    def _works(self) -> bool:
        try:
            self._check()
        except SandboxError:
            return False
        return True

    # -- threads --

    def _serve(self) -> None:
        while (item := self._queue.get()) is not None:
            code, seed, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = self._run(code, seed)
            except BaseException as error:
                future.set_exception(error)
                continue
            with self._lock:
                self._counts["jobs"] += 1
            future.set_result(result)

    def _run(self, code: str, seed: int) -> ExecResult:
        payload = self._payload(code, seed)
        losses = 0
        for attempt in range(self._num_attempts):
            if attempt:
                with self._lock:
                    self._counts["retries"] += 1
            if self._closing.wait(self._pause_s(attempt)):
                break
            try:
                return _result(self._exchange(payload))
            except _Unavailable as error:
                reason = str(error)
                if error.final:
                    break
            except _Lost as error:
                reason, losses = str(error), losses + 1
                if losses >= _MAX_LOSSES and self._works():
                    return ExecResult(error.status, error=ERROR_TEXTS[error.status])
        if self._closing.is_set():
            raise RuntimeError(_CLOSED)
        logger.warning("%s could not run a program: %s", self.url, reason)
        return ExecResult("infra", error=reason)

    def _payload(self, code: str, seed: int) -> bytes:
        request = {
            "code": script(code, seed, self.limits),
            "language": "python",
            "run_timeout": self._run_timeout_s,
        }
        return json.dumps(request).encode()

    def _pause_s(self, attempt: int) -> float:
        """Before an attempt; at random, so that not all come back at once."""
        if not attempt:
            return 0.0
        longest = min(_MAX_BACKOFF_S, self._backoff_s * 2 ** (attempt - 1))
        return longest * _jitter.uniform(0.5, 1.0)

    def _exchange(self, payload: bytes) -> bytes:
        """The body of the answer to a request.

        Raises:
          _Unavailable: there was none, or not 200, or none in time.
        """
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        deadline = time.monotonic() + self._answer_s
        connection = kind(self._host, self._port, timeout=self._answer_s)
        try:
            with contextlib.closing(connection), self._connect(connection, deadline):
                headers = {"Content-Type": "application/json", "Connection": "close"}
                connection.request("POST", self._path, payload, headers)
                body = _body(connection.getresponse())
        except (OSError, ValueError, http.client.HTTPException) as error:
            body, fault = b"", repr(error)
        else:
            fault = ""
        # To hang up may look like the end of an answer.
        if time.monotonic() >= deadline:
            fault = f"no answer within {self._answer_s:g} s"
        if fault:
            raise _Unavailable(fault)
        return body

    @contextlib.contextmanager
    def _connect(self, connection: http.client.HTTPConnection, deadline: float):
        """Hangs up at the deadline, whatever the service does till then, and when closed."""
        connection.connect()
        connected = connection.sock
        watch = threading.Timer(max(0.0, deadline - time.monotonic()), _hang_up, [connected])
        watch.daemon = True
        try:
            with self._lock:
                self._sockets.add(connected)
                if self._closing.is_set():
                    raise OSError(_CLOSED)
            watch.start()
            yield
        finally:
            watch.cancel()
            with self._lock:
                self._sockets.discard(connected)


_CLOSED = "the sandbox is closed"
_jitter = random.Random()


def script(code: str, seed: int, limits: Limits) -> str:
    """What is sent as code for a program; ASCII, whatever the program holds."""
    job = {
        "seed": seed,
        "env": ENVIRONMENT,
        "timeout_s": limits.timeout_s,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "output_bytes": min(limits.output_bytes, _MAX_OUTPUT_BYTES),
    }
    before, text = _sources()
    return f"{before}\n\nmain({text}, {code.encode(errors='surrogatepass')!r}, {job!r})\n"


@functools.cache
def _sources() -> tuple[str, str]:
    """guest.py, and program.py as a literal."""
    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in (guest, program)]
    return texts[0], ascii(texts[1])


def _parse(url: str) -> tuple[str, int | None, bool, str]:
    """Host, port, whether by TLS, and the path of /run_code."""
    parts = urllib.parse.urlsplit(url)
    path = parts.path.rstrip("/").removesuffix("/run_code") + "/run_code"
    return parts.hostname or "", parts.port, parts.scheme == "https", path


def _hang_up(connected: socket.socket) -> None:
    # Not the method of TLS sockets, which is not for use beside a thread that reads.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _body(response: http.client.HTTPResponse) -> bytes:
    body = b""
    while chunk := response.read1(2**16):
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise _Unavailable(f"an answer of more than {_MAX_BODY_BYTES} bytes")
        if response.status != 200 and len(body) > _MAX_EXCERPT:
            break
    if response.status != 200:
        # Too much to do, or a fault that may pass; what else is wrong stays wrong.
        may_pass = response.status >= 500 or response.status in (408, 429)
        excerpt = as_text(body[:_MAX_EXCERPT])
        raise _Unavailable(f"HTTP status {response.status}: {excerpt}", final=not may_pass)
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return body


def _result(body: bytes) -> ExecResult:
    """The result that an answer holds.

    Raises:
      _Unavailable: it is malformed, or tells of a fault of the service's.
      _Lost: it holds no result of a program.
    """
    try:
        answer = json.loads(body)
        if answer["status"] == "SandboxError":
            raise _Unavailable(f"SandboxError: {str(answer['message'])[-_MAX_EXCERPT:]}")
        run = answer["run_result"]
        status, exit_code = run["status"], run.get("return_code")
        stdout, stderr = (str(run.get(name) or "") for name in ("stdout", "stderr"))
    except _MALFORMED as error:
        excerpt = as_text(body[:_MAX_EXCERPT])
        raise _Unavailable(f"a malformed answer ({error!r}): {excerpt}") from error
    if status == "TimeLimitExceeded":
        raise _Lost("timeout", "its script was not ready in time")
    try:
        return _said(json.loads(stdout))
    except _MALFORMED as error:
        reason = f"its script ended ({status}, {exit_code}): {(stderr or stdout)[-_MAX_EXCERPT:]}"
        raise _Lost("crashed", reason) from error


_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


def _said(said: dict) -> ExecResult:
    """The result as guest.py has told it."""
    exit_code, in_time, wall_s = said["exit_code"], said["in_time"], said["wall_s"]
    if not isinstance(exit_code, int) or not isinstance(in_time, bool):
        raise ValueError(f"exit_code {exit_code!r}, in_time {in_time!r}")
    if not isinstance(wall_s, float) or not (math.isfinite(wall_s) and wall_s >= 0):
        raise ValueError(f"{wall_s!r} seconds")
    stdout, stderr = (base64.b64decode(said[k], validate=True) for k in ("stdout", "stderr"))
    return outcome(
        exit_code, as_text(stdout), last_line(stderr), wall_s, in_time=in_time, oom_killed=False
    )
