"""Processes of one run that watch each other: they meet, agree on small things, and miss the dead.

Process 0 listens, and each other process keeps a connection to it, of which the kernel tells as
soon as either end dies. A thread of each process sends a sign of life and where its process is;
process 0 tells everyone. When a process dies, is silent, or stays in one place for too long, all
others say which one and end: a collective operation would have them wait forever, or JAX's service
abort them without a word and without a clean-up.

Messages are lines of JSON. Clocks are monotonic ones: no time is compared between hosts.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cir_jax import exits
from cir_jax.exits import RunError

# Environment variables that say where a process belongs; see hosts.py.
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
VARIABLES = (ADDRESS, COUNT, INDEX)
BIND = "JAX_COORDINATOR_BIND_ADDRESS"
# With these a process ends for a reason that is the others', too; with others, they may go on when
# all are started again.
_FOR_ALL = (exits.USER, exits.DATA, exits.IO, exits.GATE, exits.DIFFERENT)
_LEAVE = "leave"
_FLUSH_S = 1.0
_MAX_BEAT_S = 1.0
_RETRY_S = 0.2


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds, as the config section HostsConfig has them; notice_s: between two notices of who is
    missing."""

    join_s: float
    silence_s: float
    stall_s: float
    notice_s: float = 30.0

    @property
    def beat_s(self) -> float:
        """Between two signs of life."""
        return min(_MAX_BEAT_S, self.silence_s / 5, self.stall_s / 5)


@dataclasses.dataclass(frozen=True)
class Mark:
    """Where a process is, and for how long; waits: it can do nothing but wait for others."""

    phase: str
    waits: bool
    age_s: float


def differences(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """One line for each field in which processes differ from process 0, with both values."""
    lines = []
    for name in sorted({name for each in facts for name in each}):
        first = facts[0].get(name)
        for index, each in enumerate(facts):
            if each.get(name) != first:
                lines.append(
                    f"{name}: process 0 has {_shown(first)}, process {index} has "
                    f"{_shown(each.get(name))}"
                )
                break
    return lines


def _shown(value: str | None) -> str:
    return "none" if value is None else value


def check_equal(facts: Sequence[Mapping[str, str]]) -> None:
    """RunError with both sides of every difference."""
    if lines := differences(facts):
        raise RunError("the processes differ in " + "; ".join(lines), exits.DIFFERENT)


def stuck(marks: Mapping[int, Mark], stall_s: float) -> list[int]:
    """Processes that keep the others waiting: those that work on one thing for too long; or all, if
    all have waited for so long. None as long as one gets on: the others may wait for that."""
    working = [i for i, mark in marks.items() if not mark.waits]
    if working:
        return [i for i in working if marks[i].age_s > stall_s]
    return sorted(marks) if min(mark.age_s for mark in marks.values()) > stall_s else []


class _Connection:
    def __init__(self, sock: socket.socket):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self.index: int | None = None
        self.heard = time.monotonic()
        self.outbox = bytearray()
        self._inbox = bytearray()
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any], *, superseded: bool = False) -> None:
        """superseded: there will be a newer one soon; it is left out if others still wait."""
        with self._lock:
            if not (superseded and self.outbox):
                self.outbox += json.dumps(message).encode() + b"\n"
        self.flush()

    def flush(self) -> None:
        with self._lock:
            try:
                while self.outbox:
                    del self.outbox[: self.socket.send(self.outbox)]
            except BlockingIOError:
                pass
            except OSError:
                self.outbox.clear()  # that it has ended is seen when it is read from

    def receive(self) -> list[dict] | None:
        """Messages that have come in; None at the end of the connection."""
        try:
            data = self.socket.recv(2**18)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        self._inbox += data
        *lines, rest = self._inbox.split(b"\n")
        self._inbox = bytearray(rest)
        return [json.loads(line) for line in lines]


class Peers:
    """This process among the others.

    Args:
      host, port: where process 0 listens; bind: on which of its own addresses, "" for all.
      facts: what has to be equal in all processes, by name.
      offer: what process 0 tells everyone when all are there.
      say: is given lines for people.
      end: ends this process, with an exit code.
    """

    def __init__(
        self,
        index: int,
        count: int,
        host: str,
        port: int,
        *,
        bind: str,
        limits: Limits,
        facts: Mapping[str, str],
        offer: Mapping[str, Any],
        say: Callable[[str], None],
        end: Callable[[int], None] = os._exit,
    ):
        self.index, self.count = index, count
        self._host, self._port, self._bind = host, port, bind
        self._limits = limits
        self._facts = dict(facts)
        self._offer = dict(offer)
        self._say, self._exit = say, end
        self._news = threading.Condition()
        self._selector = selectors.DefaultSelector()
        self._server: socket.socket | None = None
        # By the process at the other end: all others on process 0, process 0 elsewhere.
        self._connections: dict[int, _Connection] = {}
        self._all_facts: dict[int, Mapping[str, str]] = {index: self._facts}
        self._welcome: Mapping[str, Any] | None = None
        self._failed: RunError | None = None
        self._turn = 0
        self._values: dict[int, dict[int, tuple[str, Any]]] = {}
        self._answers: dict[int, list[Any]] = {}
        self._mark = ("starting", False, time.monotonic())
        self._marks: dict[int, tuple[Mark, float]] = {}
        self._table: dict[int, Mark] = {}
        # _parting: on process 0, all leave, and some may be gone before it has told all.
        self._parting = self._leaving = self._failing = False
        self._ended = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    # --- for the main thread

    def join(self) -> Mapping[str, Any]:
        """Waits until all are there and equal; returns what process 0 offers.

        Raises:
          RunError: some are missing, or differ, or process 0 cannot listen.
        """
        if self.index == 0:
            self._listen()
        self._thread.start()
        start = time.monotonic()
        noticed = start
        with self._news:
            while self._welcome is None and self._failed is None:
                self._news.wait(_RETRY_S)
                now = time.monotonic()
                if now - start > self._limits.join_s and self._failed is None:
                    text = f"{self._missing_text()} after {self._limits.join_s:g} s"
                    self._failed = RunError(text, exits.AGAIN)
                elif now - noticed > self._limits.notice_s:
                    noticed = now
                    self._say(self._missing_text())
            failed = self._failed
        if failed is not None:
            self.fail(str(failed), failed.code)
            raise failed
        return self._welcome

    def exchange(self, name: str, value: Any) -> list[Any]:
        """The values that all processes give, in their order: all of them have to ask, by the same
        name. JSON values of some kilobytes at most."""
        before = self._mark
        self.mark(f"waiting for the others ({name})", waits=True)
        with self._news:
            turn = self._turn
            self._turn += 1
        if self.index == 0:
            self._hear(0, turn, name, value)
        else:
            self._connections[0].send({"turn": turn, "name": name, "value": value})
        with self._news:
            self._news.wait_for(lambda: turn in self._answers)
            answer = self._answers.pop(turn)
        self.mark(*before[:2])
        return answer

    def mark(self, phase: str, waits: bool = False) -> None:
        """Says where this process is now. waits: it can only wait for others, or for devices that
        may wait for them."""
        self._mark = (phase, waits, time.monotonic())

    def fail(self, text: str, code: int) -> None:
        """Tells the others that this process is about to end."""
        with self._news:
            self._failing = True
            connections = list(self._connections.values())
        for connection in connections:
            connection.send({"end": text, "code": code, "by": self.index, "own": True})
        self._leaving = True  # after the last words: the thread closes what it finds said
        self._thread.join(2 * _FLUSH_S)

    def leave(self) -> None:
        """Ends the watch, when all others do."""
        self.exchange(_LEAVE, None)
        self._thread.join(2 * _FLUSH_S)

    # --- the thread

    def _run(self) -> None:
        if self.index != 0 and not self._connect():
            return
        beat = 0.0
        while not self._leaving:
            for key, _ in self._selector.select(self._limits.beat_s / 2):
                if key.fileobj is self._server:
                    self._accept()
                else:
                    self._read(key.data)
            now = time.monotonic()
            with self._news:
                connections = list(self._connections.values())
            for connection in connections:
                connection.flush()
            if now - beat >= self._limits.beat_s:
                beat = now
                self._beat(connections, now)
        self._linger(list(self._connections.values()))
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def _listen(self) -> None:
        at = (self._bind, self._port)
        both = not self._bind and socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both or ":" in self._bind else socket.AF_INET
        try:
            self._server = socket.create_server(at, family=family, dualstack_ipv6=both)
        except OSError as error:
            raise RunError(
                f"process 0 cannot listen on {self._host}:{self._port}: {error.strerror}",
                exits.AGAIN,
            ) from error
        self._server.setblocking(False)
        self._selector.register(self._server, selectors.EVENT_READ)

    def _connect(self) -> bool:
        while not self._leaving:
            try:
                sock = socket.create_connection((self._host, self._port), timeout=5)
            except OSError:
                time.sleep(_RETRY_S)
                continue
            connection = _Connection(sock)
            connection.index = 0
            hello = {"hello": self.index, "count": self.count, "facts": self._facts}
            connection.send(hello)
            with self._news:
                self._connections[0] = connection
            self._selector.register(sock, selectors.EVENT_READ, connection)
            return True
        return False

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, _ = self._server.accept()
            self._selector.register(sock, selectors.EVENT_READ, _Connection(sock))

    def _read(self, connection: _Connection) -> None:
        try:
            messages = connection.receive()
            for message in messages or ():
                self._handle(connection, message)
        except (ValueError, LookupError, TypeError, AttributeError):
            messages = None  # somebody else's words
        if messages is None and not self._leaving:
            self._selector.unregister(connection.socket)
            connection.socket.close()
            self._lose(connection)

    def _lose(self, connection: _Connection) -> None:
        index = connection.index
        if index is None or self._connections.get(index) is not connection or self._parting:
            return
        if self._welcome is None:
            with self._news:  # it may come again
                del self._connections[index]
                self._all_facts.pop(index, None)
            if self.index != 0:
                self._fail_join(f"process 0 at {self._host}:{self._port} is gone", exits.AGAIN)
            return
        self._end_all(f"process {index} is gone: its connection has ended", exits.AGAIN)

    def _handle(self, connection: _Connection, message: dict) -> None:
        if "hello" in message:
            self._greet(connection, message)
        elif connection.index is None:
            raise ValueError("no greeting")
        elif "beat" in message:
            self._marks[connection.index] = (Mark(**message["beat"]), time.monotonic())
        elif "table" in message:
            self._table = {int(i): Mark(**mark) for i, mark in message["table"].items()}
        elif "turn" in message and self.index == 0:
            self._hear(connection.index, message["turn"], message["name"], message["value"])
        elif "turn" in message:
            self._answer(message["turn"], message["name"], message["values"])
        elif "waiting" in message:
            self._say(message["waiting"])
        elif "welcome" in message:
            with self._news:
                self._welcome = message["welcome"]
                self._news.notify_all()
        elif "end" in message:
            self._hear_of_end(message)

    def _greet(self, connection: _Connection, message: dict) -> None:
        index = int(message["hello"])
        if message["count"] != self.count:
            text = f"process 0 is one of {self.count}, process {index} one of {message['count']}"
            self._connections[index] = connection  # to be told, too
            self._fail_join(f"the processes differ in their number: {text}", exits.DIFFERENT)
            return
        if index in self._connections:
            text = f"a second process with the number {index} has come"
            connection.send({"end": text, "code": exits.AGAIN, "by": 0})
            if self._welcome is not None:  # one of the two has been started again, or left over
                self._end_all(text, exits.AGAIN)
            return
        connection.index = index
        with self._news:
            self._connections[index] = connection
            self._all_facts[index] = message["facts"]
            is_complete = len(self._connections) == self.count - 1
        if is_complete:
            self._begin()

    def _begin(self) -> None:
        """All are there."""
        try:
            check_equal([self._all_facts[i] for i in range(self.count)])
        except RunError as error:
            self._fail_join(str(error), error.code)
            return
        now = time.monotonic()
        for index, connection in self._connections.items():
            self._marks[index] = (Mark("starting", False, 0.0), now)
            connection.send({"welcome": self._offer})
        with self._news:
            self._welcome = self._offer
            self._news.notify_all()

    def _fail_join(self, text: str, code: int) -> None:
        with self._news:
            self._failed = self._failed or RunError(text, code)
            self._news.notify_all()

    def _missing_text(self) -> str:
        if self.index == 0:
            missing = sorted({*range(self.count)} - {0, *self._connections})
            text = f"waiting for {self.count} processes, missing ids {', '.join(map(str, missing))}"
            for connection in self._connections.values():
                connection.send({"waiting": text})
            return text
        if 0 not in self._connections:
            at = f"{self._host}:{self._port}"
            return f"waiting for {self.count} processes, missing ids 0 (does not answer at {at})"
        return f"waiting for {self.count} processes; process 0 knows which"

    def _hear(self, index: int, turn: int, name: str, value: Any) -> None:
        """On process 0: one process's value for an exchange."""
        with self._news:
            values = self._values.setdefault(turn, {})
            values[index] = (name, value)
            if len(values) < self.count:
                return
            del self._values[turn]
        names = {each for each, _ in values.values()}
        if len(names) > 1:
            at = ", ".join(f"process {i} at {values[i][0]!r}" for i in sorted(values))
            self._end_all(f"the processes have come apart: {at}", exits.DIFFERENT)
            return
        answer = [values[i][1] for i in range(self.count)]
        self._parting = self._parting or name == _LEAVE
        for connection in self._connections.values():
            connection.send({"turn": turn, "name": name, "values": answer})
        self._answer(turn, name, answer)

    def _answer(self, turn: int, name: str, values: list[Any]) -> None:
        with self._news:
            self._leaving = self._leaving or name == _LEAVE
            self._answers[turn] = values
            self._news.notify_all()

    def _beat(self, connections: Sequence[_Connection], now: float) -> None:
        phase, waits, since = self._mark
        own = Mark(phase, waits, now - since)
        silent = [c for c in connections if now - c.heard > self._limits.silence_s]
        if silent and self._welcome is not None:
            names = ", ".join(str(c.index) for c in silent)
            self._end_all(
                f"process {names} is gone: no sign of life for {self._limits.silence_s:g} s",
                exits.AGAIN,
            )
        elif self.index != 0:
            for connection in connections:
                connection.send({"beat": dataclasses.asdict(own)}, superseded=True)
        elif self._welcome is not None:
            self._table = {0: own} | {
                i: dataclasses.replace(mark, age_s=mark.age_s + now - at)
                for i, (mark, at) in self._marks.items()
            }
            table = {i: dataclasses.asdict(mark) for i, mark in self._table.items()}
            for connection in connections:
                connection.send({"table": table}, superseded=True)
            if names := stuck(self._table, self._limits.stall_s):
                self._end_stalled(names)

    def _end_stalled(self, stuck_ones: Sequence[int]) -> None:
        places = "; ".join(
            f"process {i} {'waits' if mark.waits else 'works'} since {mark.age_s:.0f} s: "
            f"{mark.phase}"
            for i, mark in sorted(self._table.items())
        )
        names = ", ".join(map(str, stuck_ones))
        text = f"process {names} is stuck: no progress for {self._limits.stall_s:g} s ({places})"
        self._end_all(text, exits.AGAIN, stacks=True)

    def _hear_of_end(self, message: dict) -> None:
        text, code, by = message["end"], message["code"], message["by"]
        if self._welcome is None:
            if self.index != 0:  # another one than process 0 may come again
                self._fail_join(text, code)
            return
        if message.get("own"):
            text = f"process {by} has ended: {text}"
            code = code if code in _FOR_ALL else exits.AGAIN
        self._end_all(text, code, stacks=message.get("stacks", False))

    def _end_all(self, text: str, code: int, *, stacks: bool = False) -> None:
        """Ends this process; process 0 tells the others first."""
        if self._leaving or self._failing or not self._ended.acquire(blocking=False):
            return
        if self.index == 0:
            connections = list(self._connections.values())
            for connection in connections:
                connection.send({"end": text, "code": code, "by": 0, "stacks": stacks})
        self._say(f"{text}; ending")
        if stacks:
            faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        if self.index == 0:
            self._linger(connections)
        self._exit(code)

    def _linger(self, connections: Sequence[_Connection]) -> None:
        """Until the others have had the last words: a connection that is closed before all of it
        has been read takes with it what the other end has not read."""
        deadline = time.monotonic() + _FLUSH_S
        left = list(connections)
        while left and time.monotonic() < deadline:
            for connection in list(left):
                connection.flush()
                if not connection.outbox:
                    with contextlib.suppress(OSError):
                        connection.socket.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ValueError):
                    if connection.receive() is None:
                        left.remove(connection)
            time.sleep(0.005)
