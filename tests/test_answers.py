r"""Which answers are equal: the table of pairs, the benchmarks' own answers, hard cases."""

import json
import re
import time
from pathlib import Path

import pytest
from answer_pairs import EQUAL, HARD, UNEQUAL

from cir_jax.records import Problem
from cir_jax.reward.answer import math_verdict
from cir_jax.reward.boxes import last_boxed
from cir_jax.reward.plans import CHECKERS
from cir_jax.reward.score import Grader
from cir_jax.reward.verifiers import choice_verdict, exact_verdict

BENCHMARKS = Path(__file__).parents[2] / "shared/data/benchmarks"
benchmark_files = pytest.mark.skipif(not BENCHMARKS.is_dir(), reason=f"{BENCHMARKS} is not there")


@pytest.mark.parametrize("topic", EQUAL)
def test_equal_answers(topic):
    found = {pair: math_verdict(*pair) for pair in EQUAL[topic]}
    assert {pair: verdict for pair, verdict in found.items() if verdict != "correct"} == {}


@pytest.mark.parametrize("topic", UNEQUAL)
def test_unequal_answers(topic):
    found = {pair: math_verdict(*pair) for pair in UNEQUAL[topic]}
    assert {pair: verdict for pair, verdict in found.items() if verdict == "correct"} == {}


def test_the_table_is_large():
    count = sum(len(pairs) for table in (EQUAL, UNEQUAL) for pairs in table.values())
    assert count + len(HARD) >= 450


@pytest.mark.slow
def test_hard_answers_end_in_time():
    """The grader's limit holds, nothing crashes, and nothing of it is called correct."""
    limit_s = 2.0
    with Grader(num_workers=2, timeout_s=limit_s) as grader:
        assert grader.submit(_math("1"), [r"<<<1>>>\boxed{1}"]).result(60).value == 1.0
        for answer, truth in HARD:
            started = time.monotonic()
            future = grader._pool.submit({"verifier": "math", "answer": answer, "truth": truth})
            reason = future.result(60).reason
            assert reason in (
                "wrong",
                "unparsable",
                "timeout",
                "error:RecursionError",
                "error:MemoryError",
            ), (answer[:40], reason)
            assert time.monotonic() - started < limit_s + 3, answer[:40]


def _math(truth):
    return Problem("id", "task", "question", truth, "math")


def truths():
    for path in sorted(BENCHMARKS.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            yield row.get("answer") or row["solution"]


def rewritten(truth):
    """As a model may write it."""
    boxed = last_boxed([truth])
    truth = truth if boxed is None else boxed
    yield f"${truth}$"
    yield f" {truth} "
    yield f"{truth}."
    yield r"\boxed{" + truth + "}"
    yield truth.replace(r"\frac", r"\dfrac")
    yield truth.replace(r"\left", "").replace(r"\right", "")
    yield truth.replace(" ", "") if "text" not in truth and "\\" not in truth else truth
    if re.fullmatch(r"\d{4,}", truth):
        yield f"{int(truth):,}"
        yield f"{int(truth):,}".replace(",", r"{,}")
    if re.fullmatch(r"-?\d+", truth):
        yield f"{truth}.0"
        yield f"x = {truth}"
        yield rf"{truth}\text{{ units}}"


@benchmark_files
def test_every_benchmark_answer_equals_itself():
    found = [
        truth
        for truth in truths()
        if math_verdict(*[last_boxed([truth]) or truth] * 2) != "correct"
    ]
    assert found == []


@benchmark_files
@pytest.mark.slow
def test_every_benchmark_answer_equals_its_rewritings():
    failed = []
    for truth in set(truths()):
        failed += [
            (a, truth[-60:]) for a in rewritten(truth) if math_verdict(a, truth) != "correct"
        ]
    assert failed == []


@pytest.mark.parametrize(
    ("answer", "truth", "verdict"),
    [
        ("True", "True", "correct"),
        (" true. ", "True", "correct"),
        (r"\text{valid}", "valid", "correct"),
        ('"a  b"', "a b", "correct"),
        ("invalid", "valid", "wrong"),
        ("] ] )", "] ] )", "correct"),
        ("] )", "] ] )", "wrong"),
        ("", "x", "unparsable"),
        (" . ", "x", "unparsable"),
    ],
)
def test_exact(answer, truth, verdict):
    assert exact_verdict(answer, truth) == verdict


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("B", "correct"),
        ("b", "correct"),
        ("(B)", "correct"),
        ("B.", "correct"),
        ("B) six", "correct"),
        (r"\textbf{(B)}", "correct"),
        (r"\text{B}", "correct"),
        ("Option B", "correct"),
        ("six", "correct"),
        ("Six.", "correct"),
        ("A", "wrong"),
        ("five", "wrong"),
        ("seven", "wrong"),
        ("A or B", "wrong"),
        ("", "unparsable"),
    ],
)
def test_choices(answer, verdict):
    assert choice_verdict(answer, "(B)", {"A": "five", "B": "six"}) == verdict


GRID = {
    "height": 3,
    "width": 3,
    "start": [0, 0],
    "goals": [[2, 0]],
    "obstacles": [[1, 0]],
}
STACKS = {"stacks": [["A", "B"], ["C"]], "goal": [["C", "B", "A"]]}


@pytest.mark.parametrize(
    ("checker", "metadata", "answer", "expected"),
    [
        ("game24", {"numbers": [4, 7, 8, 8], "target": 24}, "(7 - 8/8) * 4", True),
        (
            "game24",
            {"numbers": [4, 7, 8, 8], "target": 24},
            r"\left(7-\frac{8}{8}\right)\times4",
            True,
        ),
        ("game24", {"numbers": [4, 7, 8, 8], "target": 24}, "(7 - 8/8) * 4 = 24", True),
        ("game24", {"numbers": [4, 7, 8, 8], "target": 24}, "(7 - 8/8) * 3", False),
        ("game24", {"numbers": [4, 7, 8, 8], "target": 24}, "4 * 6", False),
        ("game24", {"numbers": [4, 7, 8, 8], "target": 24}, "24", False),
        ("game24", {"numbers": [2, 2, 2, 3], "target": 24}, "2**3 * 3", ValueError),
        ("game24", {"numbers": [1, 1, 1, 1], "target": 24}, "1/(1-1)+1", ZeroDivisionError),
        ("game24", {"numbers": [1], "target": 24}, "__import__('os')", ValueError),
        ("game24", {"numbers": [1], "target": 24}, "(" * 400, ValueError),
        ("partition", {"numbers": [1, 2, 3, 4]}, "1, 4 | 2, 3", True),
        ("partition", {"numbers": [1, 2, 3, 4]}, "[1, 4] | [3, 2]", True),
        ("partition", {"numbers": [1, 2, 3, 4]}, "5 | 5", False),
        ("partition", {"numbers": [1, 2, 3, 4]}, "1, 2 | 3, 4", False),
        ("partition", {"numbers": [1, 2, 3, 4]}, "1, 2, 3, 4", ValueError),
        ("queens", {"size": 4, "placed": {"0": 1}, "blocked": []}, "1, 3, 0, 2", True),
        ("queens", {"size": 4, "placed": {"0": 2}, "blocked": []}, "1, 3, 0, 2", False),
        ("queens", {"size": 4, "placed": {}, "blocked": [[1, 3]]}, "1, 3, 0, 2", False),
        ("queens", {"size": 4, "placed": {}, "blocked": []}, "0, 1, 2, 3", False),
        ("gridworld", GRID, "right, down, down, left", True),
        ("gridworld", GRID, "Right; Down; Down; Left", True),
        ("gridworld", GRID, "down, down", False),
        ("gridworld", GRID, "left, right", False),
        ("gridworld", GRID, "right, down", False),
        ("gridworld", GRID, "jump", ValueError),
        ("blocksworld", STACKS, "B -> C, A -> B", True),
        ("blocksworld", STACKS, "Move B onto C\nMove A onto B", True),
        ("blocksworld", STACKS, "B -> table, B -> C, A -> B.", True),
        ("blocksworld", STACKS, "A -> B, B -> C", False),
        ("blocksworld", STACKS, "B -> C", False),
        ("blocksworld", STACKS, "B -> B, B -> C, A -> B", False),
        ("blocksworld", STACKS, "do it", ValueError),
        ("lights", {"grid": [[1, 1], [1, 0]]}, "(0, 0)", True),
        ("lights", {"grid": [[1, 1], [1, 0]]}, "(0, 0), (1, 1), (1, 1)", True),
        ("lights", {"grid": [[1, 1], [1, 0]]}, "(1, 1)", False),
        ("lights", {"grid": [[1, 1], [1, 0]]}, "(0, 5)", False),
        ("lights", {"grid": [[1, 1], [1, 0]]}, "1", ValueError),
        ("coloring", {"num": 3, "colors": 2, "edges": [[0, 1], [1, 2]]}, "1, 2, 1", True),
        ("coloring", {"num": 3, "colors": 2, "edges": [[0, 1], [1, 2]]}, "1, 1, 2", False),
        ("coloring", {"num": 3, "colors": 2, "edges": [[0, 1], [1, 2]]}, "1, 3, 1", False),
        ("knapsack", {"weights": [2, 3], "values": [5, 4], "capacity": 4, "best": 5}, "0", True),
        ("knapsack", {"weights": [2, 3], "values": [5, 4], "capacity": 4, "best": 5}, "1", False),
        (
            "knapsack",
            {"weights": [2, 3], "values": [5, 4], "capacity": 4, "best": 5},
            "0, 1",
            False,
        ),
        (
            "knapsack",
            {"weights": [2, 3], "values": [5, 4], "capacity": 4, "best": 5},
            "0, 0",
            False,
        ),
    ],
)
def test_plans(checker, metadata, answer, expected):
    check, needed = CHECKERS[checker]
    assert set(needed) == set(metadata)
    if isinstance(expected, bool):
        assert check(answer, **metadata) == expected
    else:
        with pytest.raises(expected):
            check(answer, **metadata)
