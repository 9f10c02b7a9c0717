"""Processes that watch each other, as threads of one: the meeting, agreement, and who is missed."""

import contextlib
import re
import socket
import threading
import time

import pytest

from cir_jax import exits
from cir_jax.exits import RunError
from cir_jax.peers import Limits, Mark, Peers, stuck

# Of a busy machine: a thread may wait for a core for seconds.
QUICK = Limits(join_s=20, silence_s=60, stall_s=60, notice_s=0.3)


class Group:
    """Some processes of one run; what each says, and the codes that they end with."""

    def __init__(self, count, limits=QUICK, facts=lambda index: {}, counts=None):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.said = [[] for _ in range(count)]
        self.codes = {}
        self.ended = threading.Condition()
        self.peers = [
            Peers(
                i,
                count if counts is None else counts[i],
                "127.0.0.1",
                port,
                bind="127.0.0.1",
                limits=limits,
                facts=facts(i),
                offer={"port": 7} if i == 0 else {},
                say=self.said[i].append,
                end=lambda code, i=i: self._end(i, code),
            )
            for i in range(count)
        ]

    def _end(self, index, code):
        with self.ended:
            self.codes[index] = code
            self.ended.notify_all()
        self.cut(index)
        time.sleep(3600)  # in a daemon thread: a process would be gone

    def each(self, ask, indices=None):
        """What each process's main thread gets, or raises."""
        found = {}

        def run(i):
            try:
                found[i] = ask(self.peers[i])
            except RunError as error:
                found[i] = error

        indices = range(len(self.peers)) if indices is None else indices
        threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return [found[i] for i in indices]

    def wait_for_end(self, *indices, timeout_s=20):
        with self.ended:
            assert self.ended.wait_for(lambda: set(indices) <= self.codes.keys(), timeout_s)
        return [self.codes[i] for i in indices]

    def cut(self, index):
        """As the kernel does when a process is killed: all at once, and it says no more of what it
        sees of the others' ends."""
        self.peers[index]._failing = True
        for connection in self.peers[index]._connections.values():
            with contextlib.suppress(OSError):
                connection.socket.shutdown(socket.SHUT_RDWR)


def joined(*args, **kwargs):
    group = Group(*args, **kwargs)
    assert group.each(Peers.join) == [{"port": 7}] * len(group.peers)
    return group


def test_they_meet_agree_and_leave():
    group = joined(3)
    for n in range(50):
        answers = group.each(lambda p, n=n: p.exchange("number", [p.index, n]))
        assert answers == [[[i, n] for i in range(3)]] * 3
    group.each(Peers.leave)
    time.sleep(0.1)
    assert group.codes == {} and group.said == [[], [], []]
    assert not any(p._thread.is_alive() for p in group.peers)


def test_a_process_that_is_told_late_that_all_leave_does_not_miss_those_who_left():
    """Process 0 comes last, and goes on only when the other has closed its connection."""
    group = joined(2)
    first, other = group.peers
    answer = first._answer

    def late(*args):
        other._thread.join(10)
        time.sleep(0.2)
        answer(*args)

    first._answer = late
    leaving = threading.Thread(target=other.leave, daemon=True)
    leaving.start()
    while not first._values:
        time.sleep(0.01)
    first.leave()
    leaving.join(10)
    assert group.codes == {} and group.said == [[], []]


def test_an_exchange_takes_less_than_a_millisecond():
    group = joined(2)
    start = time.perf_counter()
    group.each(lambda p: [p.exchange("number", n) for n in range(200)])
    assert (time.perf_counter() - start) / 200 < 5e-3  # of a busy machine
    group.each(Peers.leave)


def test_differences_are_named_with_both_values_everywhere():
    group = Group(3, facts=lambda i: {"rl.steps": "3" if i == 2 else "2", "code": "same"})
    for error in group.each(Peers.join):
        assert error.code == exits.DIFFERENT
        assert str(error) == ("the processes differ in rl.steps: process 0 has 2, process 2 has 3")


def test_different_numbers_of_processes_are_named():
    group = Group(2, counts=[2, 3])
    for error in group.each(Peers.join):
        assert error.code == exits.DIFFERENT
        assert "process 0 is one of 2, process 1 one of 3" in str(error)


def test_missing_processes_are_named_again_and_again_until_the_limit():
    group = Group(4, Limits(join_s=1.0, silence_s=5, stall_s=30, notice_s=0.3))
    first, other = group.each(Peers.join, [0, 2])
    for error, said in ((first, group.said[0]), (other, group.said[2])):
        assert error.code == exits.AGAIN
        lines = [line for line in said if "waiting for 4 processes, missing ids 1, 3" in line]
        assert len(lines) >= 2, said
    assert "missing ids 1, 3 after 1 s" in str(first)


def test_a_process_without_process_0_says_so():
    group = Group(2, Limits(join_s=0.6, silence_s=5, stall_s=30, notice_s=0.2))
    (error,) = group.each(Peers.join, [1])
    assert error.code == exits.AGAIN and "missing ids 0" in str(error)


@pytest.mark.parametrize("victim", [0, 2])
def test_a_process_that_dies_is_named_at_once(victim):
    group = joined(3, Limits(join_s=5, silence_s=60, stall_s=60))
    others = [i for i in range(3) if i != victim]
    start = time.monotonic()
    group.cut(victim)
    assert group.wait_for_end(*others) == [exits.AGAIN] * 2
    assert time.monotonic() - start < 5
    for i in others:
        assert f"process {victim} is gone" in group.said[i][-1]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_silent_process_is_named_in_time(victim, monkeypatch):
    group = joined(2, Limits(join_s=20, silence_s=1.0, stall_s=60))
    monkeypatch.setattr(group.peers[victim], "_beat", lambda connections, now: None)
    start = time.monotonic()
    (code,) = group.wait_for_end(1 - victim)
    assert code == exits.AGAIN and 0.8 < time.monotonic() - start < 10
    assert f"process {victim} is gone: no sign of life for 1 s" in group.said[1 - victim][-1]


@pytest.mark.parametrize(
    ("code", "expected"), [(1, exits.AGAIN), (exits.USER, exits.USER), (exits.IO, exits.IO)]
)
def test_a_process_that_fails_says_why(code, expected):
    for culprit in (0, 1):
        group = joined(3)
        group.peers[culprit].fail("ValueError: no", code)
        others = [i for i in range(3) if i != culprit]
        assert group.wait_for_end(*others) == [expected] * 2
        for i in others:
            assert group.said[i][-1].startswith(f"process {culprit} has ended: ValueError: no")


def test_a_stuck_process_is_named_by_all_with_its_place(capfd):
    group = joined(3, Limits(join_s=5, silence_s=60, stall_s=1.0))
    group.peers[0].mark("segment 8", waits=True)
    group.peers[1].mark("programs of step 3")
    group.peers[2].mark("segment 8", waits=True)
    start = time.monotonic()
    assert group.wait_for_end(0, 1, 2) == [exits.AGAIN] * 3
    assert 0.9 < time.monotonic() - start < 10
    for said in group.said:
        assert said[-1].startswith("process 1 is stuck: no progress for 1 s")
        assert re.search("process 1 works since [0-9]+ s: programs of step 3", said[-1])
    assert "Thread" in capfd.readouterr().err


def test_who_is_stuck():
    old, new = 100.0, 1.0
    of = {0: Mark("a", True, old), 1: Mark("b", False, old), 2: Mark("c", True, new)}
    assert stuck(of, 50) == [1]
    # Others wait for one that gets on.
    assert stuck(of | {1: Mark("b", False, new)}, 50) == []
    # All wait: for the devices.
    assert stuck({i: Mark("d", True, old) for i in range(3)}, 50) == [0, 1, 2]
    assert stuck({0: Mark("d", True, old), 1: Mark("d", True, new)}, 50) == []


def test_processes_that_come_apart_end():
    group = joined(2)
    for i, name in enumerate(("save", "stop")):
        threading.Thread(target=group.peers[i].exchange, args=(name, 0), daemon=True).start()
    assert group.wait_for_end(0, 1) == [exits.DIFFERENT] * 2
    assert "process 0 at 'save', process 1 at 'stop'" in group.said[0][-1]


def test_strangers_are_no_processes():
    group = joined(2)
    with socket.create_connection(("127.0.0.1", group.peers[0]._port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + b'{"beat": 1}\n')
        assert group.each(lambda p: p.exchange("n", p.index)) == [[0, 1]] * 2
    # One that has been started again, while the others still run.
    with socket.create_connection(("127.0.0.1", group.peers[0]._port)) as again:
        again.sendall(b'{"hello": 1, "count": 2, "facts": {}}\n')
        assert group.wait_for_end(0, 1) == [exits.AGAIN] * 2
    assert "a second process with the number 1 has come" in group.said[0][-1]
