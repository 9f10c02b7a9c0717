"""Analyses of hand-made samples: each figure counted by hand; and of a run's files."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from cir_jax import config as configs
from cir_jax import metrics
from cir_jax.analyses import ANALYSES, Saved
from cir_jax.analyses.code import checks_itself, holds, outcome
from cir_jax.evals.samples import Fork, Sample, Setting, Span, read
from cir_jax.records import Author, Call, ExecResult
from cir_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
CODE, TEXT = Setting("code", 5), Setting("text", 0)


def sample(
    correct=True,
    *turns,
    calls=(),
    problem=0,
    number=0,
    setting=CODE,
    task="task",
    answer="7",
    vote=None,
    length=10,
    **others,
):
    """calls: (status, output) each. turns: before and after them, of `length` tokens in all."""
    turns = turns or ("text",) * (len(calls) + 1)
    texts = [("prompt", "question")]
    for n, turn in enumerate(turns):
        texts.append(("model", turn))
        if n < len(calls):
            texts.append(("tool", f"\n```output\n{calls[n][1]}\n```\n"))
    sizes = [1] * (len(texts) - 1) + [length - len(texts) + 2]
    ends = list(itertools.accumulate(sizes))
    spans = [
        Span(who, end - size, end, text)
        for (who, text), size, end in zip(texts, sizes, ends, strict=True)
    ]
    return Sample(
        task=task,
        problem_id=f"{task}/{problem}",
        problem=problem,
        sample=number,
        setting=setting,
        question="question",
        truth="7",
        answer="7" if correct else answer,
        vote=vote,
        score=1.0 if correct else -1.0,
        reason="correct" if correct else "wrong",
        stop_reason="eos",
        spans=tuple(spans),
        calls=tuple(Call("print(7)", ExecResult(status, out), 1) for status, out in calls),
        ids=np.zeros(ends[-1], np.int32),
        logp=np.zeros(ends[-1], np.float32),
        **others,
    )


def saved(samples, *, forks=(), is_run=False, rows=(), name="model"):
    return Saved(name, None, is_run, list(samples), list(forks), list(rows))


def made(name, *what):
    analysis = ANALYSES[name](what)
    assert all(len(row) == len(analysis.columns) for row in analysis.rows)
    assert analysis.markdown().count("\n| ") == len(analysis.rows) + 1
    return [dict(zip(analysis.columns, row, strict=True)) for row in analysis.rows]


def group(problem, verdicts, setting=CODE, votes=None, **others):
    """Samples of one problem."""
    return [
        sample(
            ok,
            problem=problem,
            number=n,
            setting=setting,
            vote=votes[n] if votes else n,
            **others,
        )
        for n, ok in enumerate(verdicts)
    ]


def test_results_and_pass_at_k_by_hand():
    """Two problems with 4 samples each, 3 and 1 correct: AVG@4 = (3/4 + 1/4) / 2."""
    samples = group(0, [True, True, True, False], votes=[0, 0, 0, 1])
    samples += group(1, [True, False, False, False], votes=[0, 1, 1, 2])
    (row,) = made("results", saved(samples))
    assert (row["problems"], row["n"], row["AVG@n %"]) == (2, 4, 50.0)
    # Each resample is one of the problems twice, or both.
    assert (row["from"], row["to"]) == (25.0, 75.0)
    # Of all four: a correct one in both; the majority is right in the first alone.
    assert (row["pass@n %"], row["maj@n %"]) == (100.0, 50.0)
    rows = made("pass_at_k", saved(samples))
    assert [row["k"] for row in rows] == [1, 2, 4]
    # k=2: 1 - C(1, 2)/6 = 1 and 1 - C(3, 2)/6 = 1/2.
    assert [row["pass@k %"] for row in rows] == [50.0, 75.0, 100.0]
    # k=2: first 3 pairs of right ones, 3 ties: 3/4. Second: the right one ties with 3 others: 1/4.
    assert rows[1]["maj@k %"] == pytest.approx(50.0)


def test_compared_pairs_problems():
    """Text has 1 of 4 problems, code has 3 of them, the same one among them."""
    samples = [s for p in range(4) for s in group(p, [p < 3])]
    samples += [s for p in range(4) for s in group(p, [p == 0], setting=TEXT)]
    (row,) = made("compared", saved(samples))
    assert (row["first"], row["second"], row["problems"]) == ("text", "code, 5 calls", 4)
    assert row["difference"] == 50.0
    # Two problems gained, none lost: 2 (1/2)^2.
    assert row["McNemar p"] == 0.5
    before = saved([s for p in range(4) for s in group(p, [False])], name="before")
    rows = made("compared", before, saved(samples, name="after"))
    assert [row["first"] for row in rows] == ["text", "before: code, 5 calls"]
    assert rows[1]["difference"] == 75.0


def test_types_with_and_without_tools():
    kinds = [{"subject": "Algebra"}, {"subject": "Geometry"}]
    samples = [s for p in range(2) for s in group(p, [True, p == 0], types=kinds[p])]
    samples += [s for p in range(2) for s in group(p, [p == 1], setting=TEXT, types=kinds[p])]
    rows = {row["value"]: row for row in made("types", saved(samples))}
    assert (rows["Algebra"]["without"], rows["Algebra"]["with"]) == (0.0, 100.0)
    assert (rows["Geometry"]["without"], rows["Geometry"]["with"]) == (100.0, 50.0)
    assert (rows["Algebra"]["gain"], rows["Geometry"]["gain"]) == (100.0, -50.0)


def test_budgets_and_tokens():
    most = [sample(True, calls=[("ok", "7")] * 2, length=20), sample(False, problem=1, length=30)]
    none = [sample(p == 0, problem=p, setting=Setting("code", 0), length=10) for p in range(2)]
    less = [
        sample(True, calls=[("ok", "7")], problem=p, setting=Setting("code", 1)) for p in (0, 1)
    ]
    rows = made("budgets", saved(most + none + less))
    assert [row["budget"] for row in rows] == [0, 1, 5]
    assert [row["correct %"] for row in rows] == [50.0, 100.0, 50.0]
    assert [row["calls"] for row in rows] == [0.0, 1.0, 1.0]
    assert [row["tokens"] for row in rows] == [10.0, 10.0, 25.0]
    assert [row["used up %"] for row in rows] == [0.0, 100.0, 0.0]
    row = made("tokens", saved(most))[0]
    assert (row["tokens"], row["correct ones"], row["wrong ones"]) == (25.0, 20.0, 30.0)
    # Two tool outputs of one token each.
    assert row["by the model"] == 24.0


FAILED, RAN, OTHER = ("error", ""), ("ok", "7"), ("ok", "result: 8")


@pytest.mark.parametrize(
    "correct, calls, answer, expected",
    [
        (True, [], "7", None),
        (True, [RAN], "7", "right"),
        (True, [FAILED, RAN], "7", "recovered"),
        (False, [FAILED, OTHER], "8", "not recovered"),
        (False, [OTHER], "8", "misled"),
        (False, [OTHER], "9", "wrong otherwise"),
        # Part of a longer number.
        (False, [("ok", "88")], "8", "wrong otherwise"),
        (False, [("ok", "8")], None, "wrong otherwise"),
    ],
)
def test_what_code_did_to_a_response(correct, calls, answer, expected):
    assert outcome(sample(correct, calls=calls, answer=answer)) == expected


def test_effect_of_failed_code():
    samples = [
        sample(True, calls=[FAILED, RAN]),
        sample(False, calls=[FAILED], answer="8"),
        sample(False, calls=[RAN, FAILED], answer="8"),
        sample(False, calls=[OTHER], answer="8"),
        sample(True, calls=[RAN]),
        sample(True),
    ]
    (row,) = made("failures", saved(samples))
    assert (row["all ran"], row["right %"], row["misled %"]) == (2, 50.0, 50.0)
    assert (row["failed"], row["recovered %"]) == (3, pytest.approx(100 / 3))
    assert row["tried again %"] == pytest.approx(100 / 3)
    (row,) = made("code", saved(samples))
    assert row["with code %"] == pytest.approx(100 * 5 / 6)
    assert row["programs per response"] == pytest.approx(7 / 6)
    assert row["programs that ran %"] == pytest.approx(100 * 4 / 7)
    # Of three correct ones, one.
    assert row["correct ones with a failed program %"] == pytest.approx(100 / 3)
    assert row["how programs ended"] == "ok 4, error 3"


@pytest.mark.parametrize(
    "text, answer, expected",
    [
        ("x = 7.", "7", True),
        ("x = 7.5", "7", False),
        ("17", "7", False),
        ("$7$ it is", "$7$", True),
        ("-7", "-7", True),
        ("x7", "7", False),
        ("\\frac{1}{2}", "\\frac{1}{2}", True),
        ("7", None, False),
        ("7", " ", False),
    ],
)
def test_holds(text, answer, expected):
    assert holds(text, answer) == expected


def test_self_checking():
    program = "```python\nprint(3 + 4)\n```"
    known = sample(True, f"It is 7. {program}", "so 7", calls=[RAN])
    found = sample(True, f"Compute. {program}", "so 7", calls=[RAN])
    literal = sample(True, "```python\nprint(7)\n```", "so 7", calls=[RAN])
    twice = sample(True, "first", "again", "so", calls=[RAN, RAN])
    failed = sample(True, "It is 7.", "so", calls=[FAILED])
    checks = [checks_itself(s) for s in (known, found, literal, twice, failed)]
    assert checks == [True, False, False, True, False]
    (row,) = made("behaviours", saved([known, found, twice, sample(True)]))
    # Of the three with programs.
    assert row["self-checking %"] == pytest.approx(200 / 3)
    assert row["turns"] == pytest.approx((2 + 2 + 3 + 1) / 4)


def test_code_where_text_suffices():
    samples = [sample(True, calls=[RAN] * (p == 1), problem=p) for p in (0, 1)]
    samples += [sample(p == 0, problem=p, setting=TEXT) for p in (0, 1)]
    code, _ = made("behaviours", saved(samples))
    assert (code["code where text suffices %"], code["code elsewhere %"]) == (0.0, 100.0)
    known = [sample(True, needs_code=bool(p), calls=[RAN], problem=p) for p in (0, 1)]
    (row,) = made("behaviours", saved(known))
    assert (row["code where text suffices %"], row["code elsewhere %"]) == (100.0, 100.0)


def test_learning_curve_names_the_dip():
    """Budget 1 for ten steps at 0.5; then it falls to 0.2 and is back from the ninth step on."""
    accuracy = [0.5] * 10 + [0.2] * 5 + [0.5] * 5
    rows = [
        {"kind": "rl", "step": n + 1, "accuracy": a, "max_calls": 1 + (n >= 10)}
        for n, a in enumerate(accuracy)
    ]
    rows.append({"kind": "eval", "step": 20, "accuracy": 0.5})
    one, two = made("learning_curve", saved([], is_run=True, rows=rows))
    assert (one["from step"], one["to step"], one["before %"]) == (1, 10, None)
    assert (two["from step"], two["to step"], two["before %"]) == (11, 20, 50.0)
    assert (two["first %"], two["lowest %"], two["last %"]) == pytest.approx((20, 20, 50))
    # Means of 5 steps: that of steps 16 to 20 is the first to reach 0.5.
    assert two["recovered"] == 20
    cut = made("learning_curve", saved([], is_run=True, rows=rows[:14]))
    assert cut[1]["recovered"] == "not yet"
    figure = ANALYSES["learning_curve"]([saved([], is_run=True, rows=rows)]).figure()
    assert len(figure.axes[0].lines) == 2


def test_counterfactual_by_call_and_branch():
    whole = [sample(True, calls=[RAN], problem=p) for p in range(2)]
    forks = []
    for p in range(2):
        for branch, ok, printed, answer in (
            ("on", True, "7", "7"),
            ("off", p == 0, "7", "5"),
            ("corrupted", False, "8", "8" if p else "3"),
        ):
            fork = Fork(0, 0, branch)
            calls = [] if branch == "off" else [("ok", printed)]
            forks.append(sample(ok, calls=calls, problem=p, answer=answer, fork=fork))
    (row,) = made("counterfactual", saved(whole, forks=forks))
    assert (row["call"], row["forks"], row["as it was %"]) == (1, 2, 100.0)
    assert (row["on %"], row["off %"], row["corrupted %"]) == (100.0, 50.0, 0.0)
    assert row["taken over %"] == 50.0


def test_nothing_is_made_of_nothing():
    for name, analysis in ANALYSES.items():
        assert analysis([saved([])]) is None, name


@pytest.mark.parametrize("more", [{}, {"task": "t", "question": "q", "max_calls": 5}])
def test_a_training_runs_samples_read_the_same(tmp_path, more):
    """What its lines do not say is found in the id, the prompt and the step's metrics."""
    cfg = configs.load(ROOT / "configs/quickstart.toml")
    configs.save_run(cfg, tmp_path)
    tokenizer = Tokenizer(configs.asset_dir(cfg.tokenizer))
    parts = [
        (Author.PROMPT, "What is 3 + 4?\n"),
        (Author.MODEL, "```python\nprint(3 + 4)\n```"),
        (Author.TOOL, "\n```output\n7\n```\n"),
        (Author.MODEL, "The answer is \\boxed{7}."),
    ]
    ids = [tokenizer.encode(text) for _, text in parts]
    author = [int(who) for (who, _), part in zip(parts, ids, strict=True) for _ in part]
    line = {
        "step": 4,
        "problem_id": "sum/rl/3",
        "sample": 2,
        "answer": "7",
        "score": 1.0,
        "reason": "correct",
        "stop_reason": "eos",
        "calls": [{"code": "print(3 + 4)\n", "status": "ok", "stdout": "7"}],
        "text": "".join(text for _, text in parts),
        "ids": [i for part in ids for i in part] + [tokenizer.eos_id],
        "author": [*author, int(Author.MODEL)],
        "logp": [-0.5] * (len(author) + 1),
    }
    (tmp_path / metrics.SAMPLES).write_text(json.dumps(line | more) + "\n")
    metrics.MetricsWriter(tmp_path).write("rl", 4, {"max_calls": 2, "accuracy": 1.0}, {})
    (found,) = read(tmp_path)
    expected = ("t", "q", 5) if more else ("sum", "What is 3 + 4?\n", 2)
    assert (found.task, found.question, found.setting.max_calls) == expected
    assert (found.step, found.sample, found.answer, found.correct) == (4, 2, "7", True)
    assert [(span.author, span.text) for span in found.spans] == [
        (who.name.lower(), text) for who, text in parts
    ]
    assert found.calls[0].num_tool_tokens == len(ids[2])
    again = found.trajectory()
    assert again.ids.tolist() == line["ids"] and again.author.tolist() == line["author"]
