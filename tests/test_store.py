"""The record of a run's programs, and its replay."""

import json
import threading
import time
from concurrent.futures import Future

import pytest

from cir_jax.config import SandboxConfig
from cir_jax.exits import RunError
from cir_jax.records import ExecResult
from cir_jax.sandbox import store as stores
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.store import PROGRAMS, Replay, Store, open_store

LIMITS = Limits()


class Fake:
    """Answers at once: with what `answer` makes of code, seed and number of the submission."""

    def __init__(self, answer, limits=LIMITS, description=None):
        self.limits = limits
        self.description = description or {"rung": "none", "python": "3"}
        self.num_runs, self.num_restarts, self._answer = 0, 0, answer

    def submit(self, code, *, seed=0):
        self.num_runs += 1
        future = Future()
        future.set_result(self._answer(code, seed, self.num_runs))
        return future

    def stats(self):
        return {"restarts": self.num_restarts, "retries": 0}

    def close(self):
        pass


def echo(code, seed, number):
    return ExecResult("ok", f"{code} {seed} \ud800é\0", "", 0.25)


def counting(code, seed, number):
    return ExecResult("ok", str(number) if "count" in code else code)


def lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines() if line]


def record(path, programs, answer=echo, **kwargs):
    with Store(Fake(answer, **kwargs), path, recheck_share=0.0) as store:
        return [store.submit(code, seed=seed).result() for code, seed in programs]


def test_a_record_is_replayed(tmp_path):
    """Any status and text; program and seed both count; the order does not."""
    failed = ExecResult("error", "before\n", "ZeroDivisionError: division by zero", 1.5)

    def answer(code, seed, number):
        return failed if code == "1/0" else echo(code, seed, number)

    programs = [("a", 0), ("a", 1), ("b\n\ud800'\"", 1), ("1/0", 2**32 - 1)]
    results = record(tmp_path / PROGRAMS, programs, answer)
    for path in (tmp_path, tmp_path / PROGRAMS):
        with Replay(path, LIMITS) as replay:
            again = [replay.submit(code, seed=seed).result(0) for code, seed in programs[::-1]]
            assert again == results[::-1]
            assert replay.description == {"rung": "none", "python": "3"}
            assert replay.figures()["runs_error"] == 1 and replay.figures()["runs"] == 0


def test_what_is_not_on_record_is_named(tmp_path):
    record(tmp_path / PROGRAMS, [("print(1)", 5)])
    with Replay(tmp_path, LIMITS) as replay:
        for code, seed in (("print(1)", 6), ("print(2)", 5)):
            with pytest.raises(SandboxError) as caught:
                replay.submit(code, seed=seed)
            text = str(caught.value)
            assert f"sandbox.replay='{tmp_path / PROGRAMS}'" in text
            assert f"seed {seed}: {code!r}" in text


def test_other_limits_are_another_record(tmp_path):
    record(tmp_path / PROGRAMS, [("a", 0)])
    with pytest.raises(SandboxError, match="timeout_s was 5.0, is 60.0"):
        Replay(tmp_path, Limits(timeout_s=60.0))
    with pytest.raises(SandboxError, match="No such file"):
        Replay(tmp_path / "none", LIMITS)
    (tmp_path / "other").write_text("no record\n")
    with pytest.raises(SandboxError, match="not a record of this: it is none"):
        Replay(tmp_path / "other", LIMITS)


def test_a_resumed_record_goes_on(tmp_path):
    """Behind a line that a killed run left unfinished; of equal keys the last counts."""
    path = tmp_path / PROGRAMS
    record(path, [("count", 0), ("a", 0)], counting)
    with open(path, "ab") as file:
        file.write(b'{"key": "half a li')
    record(path, [("b", 0), ("count", 0)], counting)
    with Replay(path, LIMITS) as replay:
        # "count" was the first program of the first run, the second of the second one.
        texts = [replay.submit(code, seed=0).result(0).stdout for code in ("a", "b", "count")]
    assert texts == ["a", "b", "2"]


def test_a_run_resumed_on_other_packages_is_replayed_whole(tmp_path):
    path = tmp_path / PROGRAMS
    record(path, [("a", 0), ("count", 0)], counting, description={"rung": "x", "python": "1"})
    record(path, [("b", 0), ("count", 0)], counting, description={"rung": "x", "python": "2"})
    with Replay(path, LIMITS) as replay:
        texts = [replay.submit(code, seed=0).result(0).stdout for code in ("a", "b", "count")]
        assert texts == ["a", "b", "2"] and replay.description["python"] == "2"


def test_lines_of_many_threads_stay_whole(tmp_path):
    path = tmp_path / PROGRAMS
    with Store(Fake(echo), path, recheck_share=0.0) as store:

        def submit(first):
            for i in range(200):
                store.submit(f"program {first} {'x' * (i * 50)}", seed=i)

        threads = [threading.Thread(target=submit, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert store.figures()["runs"] == 800
    assert len(lines(path)) == 801  # and the settings


def test_programs_that_do_something_else_again_are_counted(tmp_path):
    fake = Fake(counting)
    with Store(fake, tmp_path / PROGRAMS, recheck_share=1.0) as store:
        for code in ("a", "count", "b", "count"):
            store.submit(code, seed=0)
        figures = store.figures()
    assert fake.num_runs == 8 and figures["runs"] == 4
    assert (figures["runs_rechecked"], figures["runs_nondeterministic"]) == (4, 2)
    again = [line for line in lines(tmp_path / PROGRAMS) if "again" in line]
    # Submissions 3, 4 and 7, 8 are those of "count".
    assert [line["stdout"] for line in again] == ["4", "8"]


def test_the_share_run_twice_is_chosen_by_key():
    """Of 1000 programs a tenth, give or take five standard deviations of 9.5; the same again."""
    picked = []
    for _ in range(2):
        runs = []
        fake = Fake(lambda code, seed, number, runs=runs: runs.append(code) or ExecResult("ok"))
        with Store(fake, None, recheck_share=0.1) as store:
            for i in range(1000):
                store.submit(str(i), seed=0)
        picked.append(sorted(code for code in set(runs) if runs.count(code) == 2))
    assert 52 < len(picked[0]) < 148 and picked[0] == picked[1]


def test_the_sandboxs_own_failures_are_not_on_record(tmp_path):
    def answer(code, seed, number):
        return ExecResult("infra", error="no memory")

    record(tmp_path / PROGRAMS, [("a", 0)], answer)
    assert len(lines(tmp_path / PROGRAMS)) == 1
    with Store(Fake(answer), None, recheck_share=1.0) as store:
        store.submit("a")
        assert store.figures()["runs_infra"] == 1 and store.figures()["runs_rechecked"] == 0


def test_figures_are_of_the_programs_since_the_last(monkeypatch):
    """100 programs of 1 to 100 s, each 0.5 s more in the queue: the median is the 51st's."""
    clock = [0.0]
    monkeypatch.setattr(stores.time, "monotonic", lambda: clock[0])

    class Slow(Fake):
        def submit(self, code, *, seed=0):
            future = Future()
            clock[0] += 0.5 + seed
            future.set_result(ExecResult("ok" if seed % 2 else "timeout", "", "", float(seed)))
            return future

    fake = Slow(None)
    fake.num_restarts = 3  # before the run
    with Store(fake, None, recheck_share=0.0) as store:
        for i in range(1, 101):
            store.submit("a", seed=i)
        fake.num_restarts = 5
        figures = store.figures()
        assert (figures["runs"], figures["runs_ok"], figures["runs_timeout"]) == (100, 50, 50)
        assert (figures["run_p50_s"], figures["run_p99_s"]) == (51.0, 100.0)
        assert figures["queue_p50_s"] == figures["queue_p99_s"] == 0.5
        assert figures["worker_restarts"] == 2
        assert set(store.figures().values()) == {0}
        assert store.figures().keys() == figures.keys()


def test_nothing_is_written_before_the_first_program(tmp_path):
    """A run that goes on where its record is not cannot be told apart from one that lost it."""
    path = tmp_path / PROGRAMS
    with Store(Fake(echo), path, recheck_share=0.0) as store:
        assert store.size() == path.stat().st_size == 0
        store.submit("a").result()
        store.truncate(0)
        store.submit("b").result()
        assert ["settings" in line for line in lines(path)] == [True, False]
    path.unlink()
    Store(Fake(echo), path, recheck_share=0.0).close()
    assert ["settings" in line for line in lines(path)] == [True]  # to be replayed, too


def test_a_full_disk_ends_the_run():
    path = stores.Path("/dev/full")
    if not path.exists():
        pytest.skip("no /dev/full")
    with Store(Fake(echo), path, recheck_share=0.0) as store:
        store.submit("a").result()
        with pytest.raises(RunError, match="/dev/full: .*No space left"):
            store.submit("b")


def test_a_sandboxs_programs_are_replayed_without_one(tmp_path, monkeypatch):
    """A program that asks the time differs from run to run, and not from its replay."""
    cfg = SandboxConfig(num_workers=1, recheck_share=1.0)
    programs = ["import time; print(time.time_ns())", "import random; print(random.random())"]
    with open_store(cfg, tmp_path) as store:
        first = [store.submit(code, seed=3).result() for code in programs]
        seen = {}
        while seen.get("runs_rechecked", 0) < 2:
            time.sleep(0.05)
            seen = {k: seen.get(k, 0) + v for k, v in store.figures().items()}
        assert seen["runs_nondeterministic"] == 1
        (settings,) = [line["settings"] for line in lines(tmp_path / PROGRAMS)[:1]]
        assert settings["rung"] == store.description["rung"] and settings["lock"]
    monkeypatch.setattr(stores, "open_sandbox", None)
    with open_store(cfg.model_copy(update={"replay": str(tmp_path)}), tmp_path / "new") as replay:
        assert [replay.submit(code, seed=3).result() for code in programs] == first
    with pytest.raises(TypeError):
        open_store(cfg, None)
