"""The worker pool: every job gets one answer, whatever its worker does; no process is left."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cir_jax.workers import WorkerPool, _Patience

ROOT = Path(__file__).resolve().parent.parent

WORKER = """
import os, signal, struct, sys, time
from cir_jax.channel import Channel, serve, serve_copies
from cir_jax.prctl import die_with_parent

channel = None

def handle(job):
    kind = job["kind"]
    if kind == "echo":
        return {"value": job["value"], "pid": os.getpid()}
    if kind == "exit":
        os._exit(0)
    if kind == "exit_once" and not os.path.exists(job["marker"]):
        open(job["marker"], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(1000)
    if kind == "sleep":
        time.sleep(job["value"])
    if kind == "bad_value":
        return {"nothing": 1}
    if kind == "wrong_id":
        channel.send({"id": -1, "reply": {"value": "forged", "pid": 0}})
    if kind == "not_json":
        os.write(channel.fileno(), struct.pack(">I", 5) + b"{{{{{")
    if kind == "too_long":
        os.write(channel.fileno(), struct.pack(">I", 2**32 - 1))
    return {"value": kind, "pid": os.getpid()}

def work(fd):
    global channel
    die_with_parent()
    channel = Channel(fd)
    serve(channel, handle, {"greeting": greeting})
    os._exit(0)

def main(argv):
    global greeting
    greeting = argv[0]
    if greeting == "broken":
        sys.exit(1)
    if greeting == "slow":
        time.sleep(1000)
    if greeting == "copied":
        greeting = os.getpid()
        die_with_parent()
        serve_copies(int(argv[-1]), work)
    else:
        work(int(argv[-1]))
"""


@pytest.fixture
def make_pool(tmp_path):
    (tmp_path / "pool_test_worker.py").write_text(WORKER)
    pools = []

    def make(greeting="hello", **kwargs):
        options = dict(num_workers=2, timeout_s=0.3, grace_s=0.2, num_spares=1)
        options["decode"] = lambda job, reply, outputs: (reply["value"], reply["pid"])
        pool = WorkerPool(
            "pool_test_worker",
            [greeting],
            failure=lambda job, reason: ("failed", reason),
            env=dict(os.environ, PYTHONPATH=str(tmp_path)),
            **(options | kwargs),
        )
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close()


def run(pool, kind, value=None, **job):
    return pool.submit(dict(job, kind=kind, value=value)).result(30)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, timeout_s):
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_answers_belong_to_their_jobs(make_pool):
    pool = make_pool()
    futures = [pool.submit({"kind": "echo", "value": [i, "\ud800é"]}) for i in range(200)]
    assert [f.result(30)[0] for f in futures] == [[i, "\ud800é"] for i in range(200)]
    assert pool.stats()["jobs"] == 200
    assert {w["greeting"] for w in pool.stats()["workers"]} == {"hello"}


def test_message_larger_than_the_socket_holds(make_pool):
    pool = make_pool(timeout_s=20)
    text = "x" * 5_000_000
    assert run(pool, "echo", text)[0] == text


def test_job_of_a_dead_worker_goes_to_another(make_pool, tmp_path):
    pool = make_pool()
    assert run(pool, "exit_once", marker=str(tmp_path / "marker"))[0] == "exit_once"
    stats = pool.stats()
    assert (stats["retries"], stats["restarts"]) == (1, 1)
    assert run(pool, "exit") == ("failed", "died")
    stats = pool.stats()
    assert (stats["retries"], stats["restarts"], stats["jobs"]) == (4, 5, 2)


@pytest.mark.parametrize("kind", ["bad_value", "wrong_id", "not_json", "too_long"])
def test_malformed_replies_are_not_believed(make_pool, kind):
    pool = make_pool()
    assert run(pool, kind) == ("failed", "died")
    assert run(pool, "echo", 1)[0] == 1


def test_a_reply_out_of_range_is_not_believed(make_pool):
    def decode(job, reply, outputs):
        return os.waitstatus_to_exitcode(reply["value"]), 0  # OverflowError

    pool = make_pool(decode=decode)
    assert run(pool, "echo", 2**40) == ("failed", "died")
    assert run(pool, "echo", 0)[0] == 0


def failing(times, function, number):
    """The function, but that the first calls fail for want of something."""
    left = [times]

    def call(*args, **kwargs):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return function(*args, **kwargs)

    return call


def test_want_of_resources_passes(make_pool, monkeypatch, tmp_path):
    """Neither the pool nor a job ends because a process or a descriptor is not to be had."""
    monkeypatch.setattr(
        "cir_jax.starting.subprocess.Popen", failing(2, subprocess.Popen, errno.EAGAIN)
    )
    pool = make_pool(num_outputs=1)
    assert run(pool, "echo", 1)[0] == 1  # after pauses of 0.1 and 0.2 s
    # More than would end it at the start.
    monkeypatch.setattr(
        "cir_jax.starting.subprocess.Popen", failing(4, subprocess.Popen, errno.ENOMEM)
    )
    assert run(pool, "exit_once", marker=str(tmp_path / "marker"))[0] == "exit_once"
    before = pool.stats()["retries"]
    monkeypatch.setattr("os.memfd_create", failing(3, os.memfd_create, errno.EMFILE))
    assert run(pool, "echo", 2)[0] == 2
    assert pool.stats()["retries"] == before  # it has not been with a worker
    pool.wait_until_ready()


def test_lasting_want_of_resources_raises(make_pool, monkeypatch):
    monkeypatch.setattr(WorkerPool, "_MAX_FAILURES", 3)
    pool = make_pool(num_outputs=1)
    run(pool, "echo")
    monkeypatch.setattr("os.memfd_create", failing(10**9, os.memfd_create, errno.EMFILE))
    with pytest.raises(RuntimeError, match="3 times in a row.*Too many open files"):
        run(pool, "echo")


def test_pauses_after_failures(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("cir_jax.workers.time.monotonic", lambda: clock[0])
    patience = _Patience()
    # 0.1 s, then twice as long each time, up to 10 s: 0.1 * 2**6 = 6.4.
    for failures, pause_s in enumerate([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0], 1):
        patience.fail()
        patience.fail()  # at the same moment: counts once
        assert patience.num_failures == failures
        clock[0] += pause_s - 1e-6
        assert not patience.over
        clock[0] += 2e-6
        assert patience.over
    patience.fail()
    patience.succeed()
    assert patience.over and patience.num_failures == 0


def test_job_out_of_time_is_killed_and_holds_nothing_up(make_pool):
    pool = make_pool()
    run(pool, "echo")
    started = time.monotonic()
    hang = pool.submit({"kind": "hang"})
    assert [run(pool, "echo", i)[0] for i in range(20)] == list(range(20))
    assert not hang.done()
    assert hang.result(10) == ("failed", "timeout")
    assert 0.45 < time.monotonic() - started < 5
    assert pool.stats()["timeouts"] == 1 and pool.stats()["retries"] == 0


def test_retry_of_timeouts_and_own_limit_of_a_job(make_pool):
    pool = make_pool(workers_keep_time=True)
    assert run(pool, "hang") == ("failed", "timeout")
    assert pool.stats()["timeouts"] == 2 and pool.stats()["retries"] == 1
    slow = {"kind": "sleep", "value": 0.8}
    assert pool.submit(slow, timeout_s=20).result(30)[0] == "sleep"


@pytest.mark.parametrize("greeting", ["hello", "copied"])
def test_all_workers_hang(make_pool, monkeypatch, greeting):
    """Those with a job and the idle one, and what they are copied from: no job is to blame."""
    monkeypatch.setattr("cir_jax.starting._COPY_TIMEOUT_S", 0.5)
    pool = make_pool(greeting, copied=greeting == "copied", workers_keep_time=True, timeout_s=1)
    pool.wait_until_ready()
    futures = [pool.submit({"kind": "sleep", "value": 0.3}) for _ in range(4)]
    time.sleep(0.1)
    for pid in descendants(os.getpid()):
        os.kill(pid, signal.SIGSTOP)
    assert [future.result(30)[0] for future in futures] == ["sleep"] * 4
    assert pool.stats()["timeouts"] == 2


def test_a_job_outlives_three_of_its_workers(make_pool):
    pool = make_pool(timeout_s=20, num_workers=1, num_spares=0)
    future = pool.submit({"kind": "sleep", "value": 1})
    for num_retries in range(3):
        pool.wait_until_ready()
        os.kill(*pool.stats()["pids"], signal.SIGKILL)
        while pool.stats()["retries"] == num_retries:
            time.sleep(0.01)
    assert future.result(30)[0] == "sleep"
    assert run(pool, "kill") == ("failed", "died")
    assert pool.stats()["retries"] == 3 + 3


def test_killed_from_outside_in_mid_job(make_pool):
    pool = make_pool(timeout_s=20, num_workers=1, num_spares=0)
    victim = run(pool, "echo")[1]
    future = pool.submit({"kind": "sleep", "value": 0.5})
    time.sleep(0.2)
    os.kill(victim, signal.SIGKILL)
    assert future.result(30)[0] == "sleep"
    assert pool.stats()["retries"] == 1
    assert run(pool, "echo")[1] != victim


def test_no_more_jobs_at_once_than_workers(make_pool):
    pool = make_pool(timeout_s=20, num_workers=1, num_spares=1)
    run(pool, "echo")
    pool.wait_until_ready()
    started = time.monotonic()
    for future in [pool.submit({"kind": "sleep", "value": 0.3}) for _ in range(2)]:
        future.result(30)
    assert time.monotonic() - started >= 0.6


def test_workers_are_recycled(make_pool):
    pool = make_pool(num_workers=1, max_jobs_per_worker=3)
    pids = [run(pool, "echo")[1] for _ in range(7)]
    assert len(set(pids)) >= 3
    assert pool.stats()["recycled"] == 2 and pool.stats()["restarts"] == 0


def test_workers_that_do_not_start_raise(make_pool):
    pool = make_pool("broken")
    with pytest.raises(RuntimeError, match="did not start"):
        pool.submit({"kind": "echo"}).result(30)
    with pytest.raises(RuntimeError, match="did not start"):
        pool.wait_until_ready()
    with pytest.raises(RuntimeError, match="did not start"):
        pool.submit({"kind": "echo"})


def test_workers_are_copies_of_one_process(make_pool, tmp_path):
    pool = make_pool("copied", copied=True)
    pool.wait_until_ready()
    (origin,) = {worker["greeting"] for worker in pool.stats()["workers"]}
    pids = pool.stats()["pids"]
    assert len(set(pids)) == 3 and set(pids) <= set(descendants(origin))
    assert all(os.getsid(pid) == pid for pid in pids)
    # Each can be killed and replaced without the others.
    assert run(pool, "exit_once", marker=str(tmp_path / "marker"))[0] == "exit_once"
    assert run(pool, "hang") == ("failed", "timeout")
    pool.wait_until_ready()
    assert len(set(pids) & set(pool.stats()["pids"])) == 1
    assert {worker["greeting"] for worker in pool.stats()["workers"]} == {origin}
    # Without it they end, and there is another.
    future = pool.submit({"kind": "sleep", "value": 0.2})
    time.sleep(0.1)
    os.kill(origin, signal.SIGKILL)
    assert future.result(30)[0] == "sleep"
    pool.wait_until_ready()
    (another,) = {worker["greeting"] for worker in pool.stats()["workers"]}
    left = [another, *pool.stats()["pids"]]
    assert another != origin and all(map(is_alive, left))
    pool.close()
    assert not any(map(is_alive, [origin, *left]))


def test_copies_that_do_not_start_raise(make_pool):
    pool = make_pool("broken", copied=True)
    with pytest.raises(RuntimeError, match="did not start: it has ended"):
        pool.submit({"kind": "echo"}).result(30)
    pool = make_pool("slow", copied=True, start_timeout_s=0.3)
    with pytest.raises(RuntimeError, match="did not start: no answer after 0.3 s"):
        pool.submit({"kind": "echo"}).result(30)
    started = time.monotonic()
    pool = make_pool("slow", copied=True)
    time.sleep(0.2)
    pool.close()  # does not wait for it
    assert time.monotonic() - started < 5


def test_close_is_idempotent_and_leaves_nothing(make_pool):
    pool = make_pool(timeout_s=1000)
    run(pool, "echo")
    hang = pool.submit({"kind": "hang"})
    queued = [pool.submit({"kind": "hang"}) for _ in range(3)]
    time.sleep(0.2)
    pids = pool.stats()["pids"]
    assert len(pids) == 3 and all(map(is_alive, pids))
    pool.close()
    pool.close()
    assert not any(map(is_alive, pids))
    for future in [hang, *queued]:
        with pytest.raises(RuntimeError, match="closed"):
            future.result(1)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit({"kind": "echo"})


def test_workers_have_their_own_session(make_pool):
    """Ctrl-C reaches the terminal's foreground group, in which the workers must not be."""
    pool = make_pool()
    run(pool, "echo")
    for pid in pool.stats()["pids"]:
        assert os.getsid(pid) == pid != os.getsid(0)


def test_the_trainer_never_forks():
    script = """
import os
forks = []
os.register_at_fork(before=lambda: forks.append(1))
from cir_jax.sandbox.pool import Sandbox
from cir_jax.workers import WorkerPool
with Sandbox(num_workers=1) as sandbox:
    for i in range(5):
        assert sandbox.submit(f"print({i})").result(60).stdout == f"{i}\\n"
    os.kill(sandbox.stats()["pids"][0], 9)
    assert sandbox.submit("print(7)").result(60).stdout == "7\\n"
assert not forks
pid = os.fork()
if pid == 0:
    os._exit(0)
os.waitpid(pid, 0)
assert forks == [1]  # the count does count
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def test_imports_are_light():
    script = """
import sys
import cir_jax.sandbox.pool, cir_jax.sandbox.text, cir_jax.reward.score
heavy = {"jax", "sympy", "math_verify", "reasoning_gym", "torch"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)


def descendants(root):
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = Path(f"/proc/{name}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parents[int(name)] = int(stat.rpartition(")")[2].split()[1])
    found, todo = [], [root]
    while todo:
        todo = [pid for pid, parent in parents.items() if parent in todo]
        found += todo
    return found


@pytest.mark.parametrize("end", ["kill -9", "exit"])
def test_nothing_outlives_the_trainer(end):
    script = """
import sys, time
from cir_jax.records import Problem
from cir_jax.reward.score import Grader
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.pool import Sandbox
limits = Limits(timeout_s=100, allow_processes=True)
sandbox, grader = Sandbox(limits, 1), Grader(1, 100)
sandbox.submit("1").result(60)
problem = Problem("", "", "", "1", "math")
assert grader.submit(problem, ["\\\\boxed{1}"]).result(60).value == 1
sandbox.submit("import os, time\\nif os.fork() == 0: os.setsid()\\ntime.sleep(1000)")
grader.submit(problem, ["\\\\boxed{9^{9^{9^{9}}}}"])
time.sleep(0.5)
print("ready", flush=True)
sys.stdin.read()
"""
    trainer = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with trainer:
        assert trainer.stdout.readline() == "ready\n"
        pids = descendants(trainer.pid)
        # Two workers of each pool, the sandbox's with a process to wait for each; the program,
        # and the process that it forked.
        assert len(pids) >= 8
        if end == "exit":
            trainer.stdin.close()
        else:
            trainer.kill()
        assert trainer.wait(10) == (0 if end == "exit" else -signal.SIGKILL)
    assert wait_for(lambda: not any(map(is_alive, pids)), 2), "processes outlive the trainer"
