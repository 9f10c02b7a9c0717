"""Which seed a program gets, and that equal programs of a group run once."""

from concurrent.futures import Future

import pytest

from cir_jax.records import ExecResult
from cir_jax.rollout.sharing import Shared, program_seed


class Pending:
    """A sandbox whose programs end when the test says so."""

    def __init__(self):
        self.runs = []

    def submit(self, code, *, seed):
        self.runs.append((code, seed, Future()))
        return self.runs[-1][2]

    def end(self, number, text="done"):
        future = self.runs[number][2]
        assert future.set_running_or_notify_cancel()
        future.set_result(ExecResult("ok", text))


@pytest.mark.parametrize(
    ("code", "draws"),
    [
        ("print(sum(range(10)))", False),
        ("from sympy import *\nprint(factorint(360))", False),
        ("import random\nprint(random.random())", True),
        ("from numpy.random import default_rng", True),
        ("import sympy\nprint(sympy.randprime(1, 100))", True),
        ("from scipy import stats\nprint(stats.norm.rvs(3))", True),
        ("import networkx as nx\nnx.gnp_random_graph(5, 0.5)", True),
        ("import networkx as nx\nnx.erdos_renyi_graph(5, 0.5)", True),
    ],
)
def test_only_what_draws_has_a_seed_for_each_call(code, draws):
    calls = [(sample, number) for sample in range(4) for number in range(2)]
    seeds = {program_seed(code, (0, "rl", 3, 7), call) for call in calls}
    assert len(seeds) == (8 if draws else 1)
    assert all(0 <= seed < 2**32 for seed in seeds)
    others = {program_seed(code, (0, "rl", 3, problem), (0, 0)) for problem in range(8)}
    assert len(others) == 8


def test_equal_programs_run_once():
    sandbox = Pending()
    shared = Shared(sandbox)
    futures = [shared.submit("a", 1) for _ in range(3)]
    others = [shared.submit("a", 2), shared.submit("b", 1)]
    assert [(code, seed) for code, seed, _ in sandbox.runs] == [("a", 1), ("a", 2), ("b", 1)]
    assert shared.num_shared == 2
    sandbox.end(0)
    late = shared.submit("a", 1)  # after its end
    assert [f.result(0).stdout for f in [*futures, late]] == ["done"] * 4
    assert len(sandbox.runs) == 3 and shared.num_shared == 3
    assert not any(f.done() for f in others)


def test_a_failure_of_the_sandbox_reaches_all():
    sandbox = Pending()
    shared = Shared(sandbox)
    futures = [shared.submit("a", 1) for _ in range(2)]
    sandbox.runs[0][2].set_exception(RuntimeError("the pool is closed"))
    for future in futures:
        with pytest.raises(RuntimeError, match="the pool is closed"):
            future.result(0)


def test_a_program_is_cancelled_once_nobody_waits_for_it():
    sandbox = Pending()
    shared = Shared(sandbox)
    one, other = shared.submit("a", 1), shared.submit("a", 1)
    one.cancel()
    assert not sandbox.runs[0][2].cancelled() and not other.done()
    other.cancel()
    assert sandbox.runs[0][2].cancelled()
    anew = shared.submit("a", 1)
    sandbox.end(1)
    assert anew.result(0).stdout == "done"


def test_one_that_runs_already_goes_on_and_is_shared():
    sandbox = Pending()
    shared = Shared(sandbox)
    gone = shared.submit("a", 1)
    sandbox.runs[0][2].set_running_or_notify_cancel()
    gone.cancel()
    late = shared.submit("a", 1)
    sandbox.runs[0][2].set_result(ExecResult("ok", "done"))
    assert late.result(0).stdout == "done" and len(sandbox.runs) == 1
