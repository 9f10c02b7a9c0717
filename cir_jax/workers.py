"""A pool of killable worker processes, shared by the sandbox and the graders.

A worker is a separate program, never a fork of this process (see starting.py): a fork of a process
that holds accelerator threads can deadlock. Each worker has its own socket and at most
one job in flight, so a job that hangs or kills its worker harms no other job: the worker is
killed at the job's deadline and replaced. Messages are length-prefixed JSON, never pickle, and a
reply is checked before it is believed, because a worker may have run hostile input.

One dispatcher thread starts, feeds and kills the workers. They ask the kernel to be killed when
the thread that started them ends (PR_SET_PDEATHSIG follows the thread, not the process), so that
thread has to live as long as the pool.

Bytes too many or too hostile for a message travel in memory files, which this process makes for
each attempt at a job and hands over with it: one with the job's data, and some to write into.
"""

import atexit
import collections
import dataclasses
import json
import logging
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Generic, Literal, TypeVar

from cir_jax.channel import HEADER, MAX_MESSAGE_BYTES, encode
from cir_jax.starting import Copies, Execs, Process, Starter

Result = TypeVar("Result")
FailureReason = Literal["died", "timeout"]

_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# `-P` keeps the current folder off the module path; the package's own folder is put there so that
# a worker imports the same files as its parent, installed or not.
_BOOT = "import sys; sys.path.insert(0, sys.argv[1]); import {module} as m; m.main(sys.argv[2:])"

logger = logging.getLogger(__name__)


class PoolError(RuntimeError):
    """The pool has failed: the machine does not let it start its workers; or it is closed."""


class TryAgain(Exception):
    """Raised by `decode`: the job deserves a second attempt.

    Args:
      result: what counts if this was the second.
    """

    def __init__(self, result: Any):
        super().__init__(result)
        self.result = result


class _Patience:
    """Failures of the machine's in a row, each followed by a pause twice as long as the last.

    Several at once count as one: what is under way when something fails often fails with it.
    """

    FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0

    def __init__(self):
        self.num_failures = 0
        self.until = 0.0
        """Monotonic time at which the pause ends."""

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.until

    def fail(self) -> None:
        if self.over:
            pause_s = min(self.LONGEST_PAUSE_S, self.FIRST_PAUSE_S * 2**self.num_failures)
            self.num_failures += 1
            self.until = time.monotonic() + pause_s

    def succeed(self) -> None:
        self.num_failures, self.until = 0, 0.0


@dataclasses.dataclass(eq=False)
class _Job:
    job_id: int
    job: dict
    data: bytes | None
    message: bytes
    timeout_s: float
    future: Future
    lost: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    """Attempts that came to nothing, by reason."""
    files: list[int] = dataclasses.field(default_factory=list)
    """Memory files of this attempt: data (if any), then the outputs."""

    def open_files(self, num_outputs: int) -> None:
        if self.data is not None:
            self.files.append(os.memfd_create("data"))
            rest = memoryview(self.data)
            while rest:
                rest = rest[os.pwrite(self.files[0], rest, len(self.data) - len(rest)) :]
        self.files += [os.memfd_create("output") for _ in range(num_outputs)]

    def close_files(self) -> None:
        while self.files:
            os.close(self.files.pop())


@dataclasses.dataclass(eq=False)
class _Worker:
    process: Process
    socket: socket.socket
    deadline: float
    """Monotonic time at which the worker is given up: of its start, later of its job."""
    info: dict | None = None
    """What the worker said when it became ready; None before."""
    job: _Job | None = None
    inbox: bytearray = dataclasses.field(default_factory=bytearray)
    outbox: bytearray = dataclasses.field(default_factory=bytearray)
    num_jobs: int = 0


class WorkerPool(Generic[Result]):
    """Runs jobs in worker processes; every job gets exactly one answer.

    Args:
      module: dotted name of the worker program; its `main(argv)` gets `args` and, last, the
        number of its socket's descriptor.
      num_workers: jobs in flight at once.
      timeout_s: host-side limit of one job, from the moment it is handed to a worker.
      grace_s: how much later than that the worker is killed.
      decode: maps (job, reply, outputs) to the job's result, outputs being descriptors of memory
        files; raises ValueError if the reply is malformed, TryAgain if another attempt is due.
      failure: the result of a job whose workers died, or that ran out of time.
      num_outputs: memory files that a worker gets to write into with each job.
      workers_keep_time: whether the workers themselves end jobs that are out of time. Then one that
        does not answer hangs, for which its job is not to blame: that gets another worker, and the
        idle ones, which may hang, too, are replaced.
      num_spares: ready workers kept besides, so that a kill costs no start-up time.
      max_jobs_per_worker: a worker is replaced after so many.
      start_timeout_s: limit for a worker to become ready.
      env: the whole environment of the workers; None inherits.
      copied: whether the program makes the workers, as copies of itself (see starting.py): then its
        `main` gets, last, the number of a socket for that.
    """

    # In a row, until the first worker is ready: then it is the program or the machine that does
    # not let them. Later ones may have been killed from outside, or resources be short for a while:
    # with the pauses in between, 20 take over two minutes.
    _MAX_FIRST_FAILURES, _MAX_FAILURES = 3, 20
    # Of a job. Hardly any can end its worker, and what ends workers may go on for a while.
    _MAX_RETRIES = {"died": 3, "timeout": 1, "again": 1}

    def __init__(
        self,
        module: str,
        args: Sequence[str] = (),
        *,
        num_workers: int,
        timeout_s: float,
        grace_s: float,
        decode: Callable[[dict, dict, Sequence[int]], Result],
        failure: Callable[[dict, FailureReason], Result],
        num_outputs: int = 0,
        workers_keep_time: bool = False,
        num_spares: int = 1,
        max_jobs_per_worker: int = 5000,
        start_timeout_s: float = 120.0,
        env: Mapping[str, str] | None = None,
        interpreter: str = sys.executable,
        copied: bool = False,
    ):
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, got {num_workers}")
        boot = _BOOT.format(module=module)
        argv = [interpreter, "-P", "-c", boot, _PACKAGE_PARENT, *args]
        env = None if env is None else dict(env)
        self._starter: Starter = Execs(argv, env)
        if copied:
            self._starter = Copies(
                argv, env, timeout_s=start_timeout_s, is_cancelled=lambda: self._closing
            )
        self._num_workers = num_workers
        self._num_processes = num_workers + num_spares
        self._timeout_s, self._grace_s = timeout_s, grace_s
        self._decode, self._failure = decode, failure
        self._num_outputs = num_outputs
        self._workers_keep_time = workers_keep_time
        self._max_jobs_per_worker = max_jobs_per_worker
        self._start_timeout_s = start_timeout_s

        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        """A worker is ready, or the pool at its end."""
        self._queue: collections.deque[_Job] = collections.deque()
        self._next_id = 2**32  # so that all messages have the same length
        self._closing = False
        self._broken = ""
        self._counts = dict.fromkeys(("jobs", "retries", "restarts", "recycled", "timeouts"), 0)

        # Only the dispatcher thread touches what follows.
        self._workers: list[_Worker] = []
        self._dying: list[Process] = []
        self._max_failures = self._MAX_FIRST_FAILURES
        self._starts, self._hand_overs = _Patience(), _Patience()
        self._selector = selectors.DefaultSelector()
        self._wake_reader, self._wake_writer = socket.socketpair()
        for end in (self._wake_reader, self._wake_writer):
            end.setblocking(False)
        self._selector.register(self._wake_reader, selectors.EVENT_READ)

        atexit.register(self.close)
        self._thread = threading.Thread(target=self._run, name=f"{module} pool", daemon=True)
        self._thread.start()

    def submit(
        self, job: dict, *, data: bytes | None = None, timeout_s: float | None = None
    ) -> Future[Result]:
        """Queues a job: JSON values, and bytes for a memory file.

        The future raises PoolError if the pool itself fails.
        """
        future: Future[Result] = Future()
        with self._lock:
            if self._closing or self._broken:
                raise PoolError(self._broken or "the pool is closed")
            self._next_id += 1
            message = encode({"id": self._next_id, "job": job})
            limit_s = self._timeout_s if timeout_s is None else timeout_s
            self._queue.append(_Job(self._next_id, job, data, message, limit_s, future))
        self._wake()
        return future

    def stats(self) -> dict[str, Any]:
        """Counts of jobs answered, retries, restarts, recycled workers and timeouts; plus what
        the workers said of themselves ("workers"), and their process ids ("pids")."""
        with self._lock:
            workers = list(self._workers)
            return dict(
                self._counts,
                workers=[w.info for w in workers if w.info is not None],
                pids=[w.process.pid for w in workers],
            )

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Waits until all workers are ready, the spare ones included.

        Raises:
          TimeoutError: they are not by then.
          PoolError: the pool itself has failed.
        """

        def is_ready() -> bool:
            if self._closing or self._broken:
                raise PoolError(self._broken or "the pool is closed")
            return sum(w.info is not None for w in self._workers) >= self._num_processes

        with self._news:
            if not self._news.wait_for(is_ready, timeout_s):
                raise TimeoutError(f"not all workers are ready after {timeout_s} s")

    def close(self) -> None:
        """Kills the workers; jobs without an answer get a PoolError. May be called twice."""
        with self._lock:
            self._closing = True
        self._wake()
        self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    # -- dispatcher thread --

    def _wake(self) -> None:
        try:
            self._wake_writer.send(b"x")
        except (BlockingIOError, OSError):
            pass  # full: it is awake anyway; closed: there is nobody to wake

    def _run(self) -> None:
        try:
            while not self._closing:
                self._start_missing()
                self._assign()
                for key, events in self._selector.select(self._wait_s()):
                    if key.data is None:
                        self._wake_reader.recv(4096)
                    else:
                        self._serve_worker(key.data, events)
                self._enforce_deadlines()
        except BaseException as error:
            logger.exception("the dispatcher of %s failed", self._thread.name)
            self._give_up(f"the dispatcher failed: {error!r}")
        finally:
            self._shut_down()

    def _wait_s(self) -> float | None:
        if self._dying:
            return 0.02
        deadlines = [w.deadline for w in self._workers if w.job is not None or w.info is None]
        deadlines += [p.until for p in (self._starts, self._hand_overs) if not p.over]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _start_missing(self) -> None:
        self._dying = [p for p in self._dying if not p.is_gone()]
        while self._starts.over and len(self._workers) < self._num_processes:
            if self._broken or self._closing:
                return
            try:
                self._start_worker()
            except OSError as error:
                if not self._closing:
                    self._fail(self._starts, f"a worker could not be started ({error})")

    def _start_worker(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = self._starter.start(theirs.fileno())
            ours = ours.detach()
        connection = socket.socket(fileno=ours)
        connection.setblocking(False)
        worker = _Worker(process, connection, time.monotonic() + self._start_timeout_s)
        with self._lock:
            self._workers.append(worker)
        self._selector.register(connection, selectors.EVENT_READ, worker)

    def _fail(self, patience: _Patience, why: str) -> None:
        """What has failed is the machine, not a job: pauses, and after too many gives up."""
        patience.fail()
        if patience.num_failures >= self._max_failures:
            self._give_up(f"{patience.num_failures} times in a row: {why}")
        else:
            logger.warning("%s; trying again", why)

    def _assign(self) -> None:
        num_busy = sum(w.job is not None for w in self._workers)
        idle = [w for w in self._workers if w.info is not None and w.job is None]
        for worker in idle:
            if worker.process.has_ended():
                self._lose(worker, "died")  # before it could cost a job one of its attempts
                continue
            can_run = num_busy < self._num_workers and self._hand_overs.over
            job = self._next_job() if can_run else None
            if job is None:
                return
            num_busy += 1
            worker.job = job
            worker.deadline = time.monotonic() + job.timeout_s + self._grace_s
            self._hand_over(worker, job)

    def _hand_over(self, worker: _Worker, job: _Job) -> None:
        sent = 0
        try:
            job.open_files(self._num_outputs)
            sent = socket.send_fds(worker.socket, [job.message], job.files)
        except (BrokenPipeError, ConnectionResetError):
            self._lose(worker, "died")
            return
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:  # no descriptor or no memory is left: not the job's doing
            worker.job = None
            self._put_back(job)
            self._fail(self._hand_overs, f"a job could not be handed over ({error})")
            return
        if sent == 0 and job.files:
            raise RuntimeError("an idle worker's socket takes no byte")
        self._hand_overs.succeed()
        worker.outbox += job.message[sent:]
        if worker.outbox:
            self._flush(worker)

    def _next_job(self) -> _Job | None:
        with self._lock:
            while self._queue:
                job = self._queue.popleft()
                # One that was put back is running already; others may have been cancelled.
                if job.future.running() or job.future.set_running_or_notify_cancel():
                    return job
        return None

    def _serve_worker(self, worker: _Worker, events: int) -> None:
        if worker not in self._workers:
            return  # was given up earlier in this round
        if events & selectors.EVENT_WRITE:
            self._flush(worker)
        if events & selectors.EVENT_READ and worker in self._workers:
            try:
                data = worker.socket.recv(2**18)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                data = b""
            worker.inbox += data
            if not data:
                self._lose(worker, "died")
            else:
                self._read_messages(worker)

    def _flush(self, worker: _Worker) -> None:
        try:
            sent = worker.socket.send(worker.outbox)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self._lose(worker, "died")
            return
        del worker.outbox[:sent]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if worker.outbox else 0)
        self._selector.modify(worker.socket, events, worker)

    def _read_messages(self, worker: _Worker) -> None:
        while len(worker.inbox) >= HEADER.size:
            size = HEADER.unpack_from(worker.inbox)[0]
            end = HEADER.size + size
            if size <= MAX_MESSAGE_BYTES and len(worker.inbox) < end:
                return
            body = bytes(worker.inbox[HEADER.size : end])
            del worker.inbox[:end]
            try:
                if size > MAX_MESSAGE_BYTES:
                    raise ValueError(f"a reply of {size} bytes")
                self._accept(worker, json.loads(body))
            except (ValueError, ArithmeticError, LookupError, TypeError, RecursionError) as error:
                logger.warning("malformed message of worker %d: %r", worker.process.pid, error)
                self._lose(worker, "died")
                return

    def _accept(self, worker: _Worker, message: dict) -> None:
        if worker.info is None:
            info = dict(message["ready"])
            self._starts.succeed()
            self._max_failures = self._MAX_FAILURES
            with self._news:
                worker.info = info
                self._news.notify_all()
            return
        job = worker.job
        if job is None or message["id"] != job.job_id:
            raise ValueError("an answer to no question")
        outputs = job.files[len(job.files) - self._num_outputs :]
        again = False
        try:
            result = self._decode(job.job, message["reply"], outputs)
        except TryAgain as error:
            result, again = error.result, self._may_retry(job, "again")
        worker.job = None
        worker.num_jobs += 1
        if again:
            self._count("retries")
            self._put_back(job)
        else:
            self._answer(job, result)
        if message.get("last") or worker.num_jobs >= self._max_jobs_per_worker:
            self._count("recycled")
            self._kill(worker)

    def _enforce_deadlines(self) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            if now >= worker.deadline and (worker.job is not None or worker.info is None):
                self._lose(worker, "timeout")

    def _lose(self, worker: _Worker, reason: FailureReason) -> None:
        """Kills a worker that is dead, too late or not to be believed; sees to its job."""
        job, worker.job = worker.job, None
        self._kill(worker)
        self._count("restarts")
        if worker.info is None:
            why = f"a worker did not start ({reason}); what it said is on stderr"
            self._fail(self._starts, why)
        if job is None:
            return
        retry = True
        if reason == "timeout":
            self._count("timeouts")
            retry = self._workers_keep_time
            if retry:
                for other in [w for w in self._workers if w.info is not None and w.job is None]:
                    self._lose(other, "timeout")
        if retry and not self._broken and self._may_retry(job, reason):
            self._count("retries")
            self._put_back(job)
        else:
            self._answer(job, self._failure(job.job, reason))

    def _may_retry(self, job: _Job, reason: str) -> bool:
        """After an attempt that came to nothing."""
        job.lost[reason] += 1
        return job.lost[reason] <= self._MAX_RETRIES[reason]

    def _put_back(self, job: _Job) -> None:
        job.close_files()
        with self._lock:
            self._queue.appendleft(job)

    def _answer(self, job: _Job, result: Result) -> None:
        job.close_files()
        self._count("jobs")
        job.future.set_result(result)

    def _kill(self, worker: _Worker) -> None:
        self._selector.unregister(worker.socket)
        worker.socket.close()
        with self._lock:
            self._workers.remove(worker)
        worker.process.kill()
        self._dying.append(worker.process)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _give_up(self, message: str) -> None:
        with self._news:
            self._broken = message
            self._news.notify_all()
            jobs = [w.job for w in self._workers if w.job is not None] + list(self._queue)
            self._queue.clear()
        for worker in self._workers:
            worker.job = None
        for job in jobs:
            job.close_files()
            if job.future.running() or job.future.set_running_or_notify_cancel():
                job.future.set_exception(PoolError(message))

    def _shut_down(self) -> None:
        self._give_up(self._broken or "the pool is closed")
        for worker in list(self._workers):
            self._kill(worker)
        deadline = time.monotonic() + 5
        while self._dying and time.monotonic() < deadline:
            self._dying = [p for p in self._dying if not p.is_gone()]
            time.sleep(0.001)
        for process in self._dying:
            logger.error("worker %d outlives SIGKILL", process.pid)
        self._starter.close()
        self._selector.close()
        self._wake_reader.close()
        self._wake_writer.close()
