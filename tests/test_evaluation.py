"""Evaluations of the shipped cold start: what is kept, also after a stop, and what is said."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from cir_jax import cli
from cir_jax import config as configs
from cir_jax.analyses import ANALYSES, load
from cir_jax.config import ConfigError
from cir_jax.evals.benchmarks import problems_of
from cir_jax.evals.samples import DESCRIPTION, Parts, Setting, from_line, read, to_line
from cir_jax.evals.suites import BENCHMARKS, PROMPTS, SUITES, find_suite, pick
from cir_jax.evaluation import run as evaluation
from cir_jax.evaluation.forks import corrupted
from cir_jax.evaluation.model import find_model
from cir_jax.evaluation.results import analyses_of, write
from cir_jax.evaluation.run import Request, evaluate
from cir_jax.metrics import SAMPLES, TIMINGS
from cir_jax.records import Author
from cir_jax.reward.answer import last_boxed
from cir_jax.reward.score import Grader
from cir_jax.sandbox.pool import Sandbox
from cir_jax.tokenizer import Tokenizer
from cir_jax.train import rollouts
from cir_jax.train.display import Display

ROOT = Path(__file__).parent.parent
CONFIG = str(ROOT / "configs/quickstart.toml")
CODE, TEXT, ONE = Setting("config", 3), Setting("config", 0), Setting("config", 1)
ASKED = Request(
    suite=None,
    data_dir=Path("."),
    tools="both",
    budgets=(1,),
    counterfactual=True,
    samples=2,
    problems=10,
    part=5,
)


@pytest.fixture(scope="module", autouse=True)
def one_device_and_workers():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts.meshes, "make_mesh", lambda cfg: mesh)
        # One for all: their start takes seconds.
        with Sandbox(num_workers=2) as sandbox, Grader() as grader:
            for name, tool in (("open_store", sandbox), ("Grader", grader)):
                shared = contextlib.nullcontext(tool)
                patch.setattr(rollouts, name, lambda *args, shared=shared, **kwargs: shared)
            yield


@pytest.fixture(scope="module")
def model():
    return find_model(CONFIG, {}, ["rollout.slots=16"], [])


@pytest.fixture(scope="module")
def first(model, tmp_path_factory):
    return evaluate(model, ASKED, tmp_path_factory.mktemp("evaluation") / "first", Display())


@pytest.fixture(scope="module")
def samples(first):
    return read(first)


def of(samples, setting, fork=False):
    return [s for s in samples if s.setting == setting and (s.fork is not None) == fork]


def test_every_sample_is_kept(first, samples):
    assert {path.name for path in first.iterdir()} == {SAMPLES, TIMINGS, DESCRIPTION}
    tokenizer = Tokenizer(configs.asset_dir("package:quickstart/tokenizer"))
    for setting in (CODE, TEXT, ONE):
        own = of(samples, setting)
        assert [(s.problem, s.sample) for s in own] == [(p, n) for p in range(10) for n in range(2)]
        assert max(len(s.calls) for s in own) <= setting.max_calls
    assert {s.correct for s in samples} == {True, False}
    assert all(s.logp.min() < -1e-3 for s in samples)
    for s in samples:
        assert "".join(span.text for span in s.spans).startswith(s.question)
        assert s.ids.shape == s.logp.shape == (s.spans[-1].end,)
        assert s.answer == last_boxed([span.text for span in s.turns])
        assert s.correct == (s.reason == "correct") == (s.score == 1.0)
        assert (s.vote is None) == (s.answer is None or s.fork is not None)
        for span in s.spans:
            told = tokenizer.decode([i for i in s.ids[span.start : span.end]])
            assert told.startswith(span.text)
            assert span.author == "model" or not s.logp[span.start : span.end].any()
        outputs = [span for span in s.spans if span.author == "tool"]
        for call, output in zip(s.calls, outputs, strict=False):
            assert call.num_tool_tokens == output.end - output.start
            assert call.result.wall_s > 0 or s.fork
            assert call.code in s.trajectory().problem.question + "".join(t.text for t in s.turns)
    votes = [s for s in of(samples, CODE) if s.correct]
    assert all(a.vote == b.vote for a in votes for b in votes if a.problem == b.problem)


def test_a_line_reads_back_as_it_was(samples):
    for s in samples[::7]:
        line, timing = json.loads(json.dumps(to_line(s)))
        again = from_line(line, timing)
        for field in dataclasses.fields(s):
            np.testing.assert_array_equal(getattr(again, field.name), getattr(s, field.name))
        t = again.trajectory()
        assert (t.author == Author.MODEL).sum() == s.num_model_tokens
        assert t.num_response_tokens == s.num_response_tokens


def test_settings_share_their_random_numbers(samples):
    """A budget changes nothing before it is used up."""
    triples = list(zip(of(samples, CODE), of(samples, ONE), of(samples, TEXT), strict=True))
    assert 0 < sum(bool(code.calls) for code, _, _ in triples) < len(triples)
    for code, one, text in triples:
        for fewer in (one, text):
            num_calls = fewer.setting.max_calls
            end = None if len(code.calls) <= num_calls else code.turns[num_calls].end
            np.testing.assert_array_equal(code.ids[:end], fewer.ids[: end or len(fewer.ids)])


def test_forks_leave_at_their_call(samples):
    whole = {(s.problem, s.sample): s for s in of(samples, CODE)}
    forks = of(samples, CODE, fork=True)
    assert len(forks) >= 3 * 2
    for s in forks:
        begun, (_, call, branch) = whole[s.problem, s.fork.sample], s.fork
        output = [span for span in begun.spans if span.author == "tool"][call]
        np.testing.assert_array_equal(s.ids[: output.start], begun.ids[: output.start])
        np.testing.assert_allclose(s.logp[: output.start], begun.logp[: output.start], atol=1e-4)
        codes = [c.code for c in begun.calls]
        # A turn goes on behind its block where the tool is off.
        own = [span for span in s.spans if span.author == "tool"][call:]
        if branch == "off":
            assert [c.code for c in s.calls] == codes[:call] and not own
        else:
            assert [c.code for c in s.calls[: call + 1]] == codes[: call + 1]
            assert len(s.calls) <= CODE.max_calls
            assert (own[0].text == output.text) == (branch == "on")
        if branch == "corrupted":
            assert s.calls[call].result.stdout in own[0].text
        room = configs.load(CONFIG).rollout.max_response_tokens
        assert s.num_response_tokens <= room
    # The three branches draw the same numbers: without the tool most go another way.
    ends = [s.ids.tobytes() for s in forks]
    assert len(set(ends)) > len(ends) // 2


@pytest.mark.parametrize(
    "text, other",
    [("12 = 19", "12 = 10"), ("x = 7.25 m", "x = 7.26 m"), ("yes", "None"), ("None", "0")],
)
def test_corrupted_outputs(text, other):
    assert corrupted(text) == other


class Killed(Exception):
    pass


def stop_after(monkeypatch, count):
    """The evaluation ends in the middle of its part number `count`."""
    done, whole = [], Parts.write

    def written(self, number, samples):
        if len(done) == count:
            raise Killed
        done.append(number)
        whole(self, number, samples)

    monkeypatch.setattr(Parts, "write", written)
    return done


def test_a_stopped_evaluation_goes_on_with_the_same_result(first, model, tmp_path, monkeypatch):
    """In other parts, and with less asked: what it has is the same, line by line."""
    out = tmp_path / "again"
    asked = dataclasses.replace(ASKED, part=4, budgets=(), tools="on", counterfactual=False)
    with monkeypatch.context() as patch:
        assert stop_after(patch, 2) == []
        with pytest.raises(Killed):
            evaluate(model, asked, out, Display())
    # What there is can be read meanwhile.
    assert len(read(out)) == 2 * 4 * 2
    with monkeypatch.context() as patch:
        rest = stop_after(patch, 100)
        assert evaluate(model, asked, out, Display()) == out
        assert rest == [2]
    lines = (first / SAMPLES).read_text().splitlines()
    wanted = [s.setting == CODE and s.fork is None for s in read(first)]
    kept = [line for line, yes in zip(lines, wanted, strict=True) if yes]
    assert (out / SAMPLES).read_text().splitlines() == kept
    assert len((out / TIMINGS).read_text().splitlines()) == len(kept)


def test_a_complete_evaluation_is_not_done_again(first, model, monkeypatch):
    monkeypatch.setattr(evaluation, "open_rollouts", None)
    before = (first / SAMPLES).stat()
    assert evaluate(model, ASKED, first, Display()) == first
    assert (first / SAMPLES).stat() == before
    other = dataclasses.replace(ASKED, samples=4)
    with pytest.raises(ConfigError, match="samples=2, now it is 4"):
        evaluate(model, other, first, Display())


def test_parts_of_two_processes_are_one_file(samples, tmp_path):
    """Each writes its share of every part; a part is there when all are."""
    own = of(samples, CODE)[:12]
    ours, theirs = (Parts(tmp_path, index, 2) for index in range(2))
    theirs.write(0, own[3:6])
    assert not ours.has(0)
    ours.write(0, own[:3])
    ours.write(1, own[6:12])
    theirs.write(1, [])
    assert ours.has(0) and theirs.has(1) and not ours.complete
    assert [s.problem for s in theirs.read(0)] == [s.problem for s in own[:6]]
    ours.merge(2)
    assert theirs.complete and not (tmp_path / "parts").exists()
    assert [to_line(s) for s in read(tmp_path)] == [to_line(s) for s in own]


def test_every_analysis_has_a_table_and_its_figure(first, tmp_path):
    saved = load([first])
    made = analyses_of(saved, ANALYSES)
    # By type: the tasks of the quickstart have none; a learning curve is a run's.
    assert set(ANALYSES) - set(made) == {"types", "learning_curve"}
    figures = {name: a.figure() for name, a in made.items() if a.figure is not None}
    assert set(figures) == {"pass_at_k", "tokens", "budgets", "failures", "counterfactual"}
    # A panel for each of ten tasks.
    assert len(figures["pass_at_k"].axes) == len(figures["budgets"].axes) == 10
    write({"tokens": made.pop("tokens")}, tmp_path / "drawn", figures=True)
    assert (tmp_path / "drawn/tokens.png").stat().st_size > 1000
    write(made, tmp_path, figures=False)
    for name, analysis in made.items():
        assert analysis.rows, name
        assert all(len(row) == len(analysis.columns) for row in analysis.rows), name
        assert f"### {analysis.title}" in (tmp_path / "analyses.md").read_text()


def test_accuracies_are_those_of_the_samples(first, samples):
    (saved,) = load([first])
    rows = {(row[1], row[2]): row for row in ANALYSES["results"]([saved]).rows}
    own = of(samples, CODE)
    for task in configs.load(CONFIG).data.tasks:
        share = np.mean([s.correct for s in own if s.task == task])
        assert rows[CODE.name, task][6] == pytest.approx(100 * share)
    # One problem of each of ten tasks, each with two samples: the mean is that of all.
    assert rows[CODE.name, "mean of tasks"][6] == pytest.approx(
        100 * np.mean([s.correct for s in own])
    )
    budgets = {row[2]: row for row in ANALYSES["budgets"]([saved]).rows if row[1] == "product"}
    assert set(budgets) == {0, 1, 3}
    assert budgets[0][4] == 0.0 and budgets[1][4] <= 1.0


def test_a_suite_on_weights(tmp_path, capsys):
    """Both prompts; problems that fill the context are left out, and that is said."""
    rows = [{"q": f"What is {n} + 2?", "a": n + 2, "kind": f"k{n % 2}"} for n in range(4)]
    rows.insert(1, {"q": "long " * 200, "a": "1"})
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.toml").write_text(
        "name = 'mine'\nmax_calls = 1\nmax_response_tokens = 40\n"
        "code_prompt = '{question}\\nUse code.'\ntext_prompt = '{question}\\n'\n"
        "[[benchmarks]]\nname = 'sums'\nfile = 'sums.jsonl'\nproblem = 'q'\nanswer = 'a'\n"
        "types = ['kind', 'level']\nsamples = 5\n"
    )
    out = tmp_path / "out"
    args = ["package:quickstart/cold_start", "rollout.slots=8", "rollout.max_context=120"]
    args += ["tokenizer=package:quickstart/tokenizer", "--suite", str(tmp_path / "mine.toml")]
    args += ["--data-dir", str(tmp_path), "--samples", "2", "--problems", "4", "--out", str(out)]
    assert cli.main(["eval", *args]) == 0
    told = capsys.readouterr().out
    assert "sums: 1 of 4 problems left out, their prompts fill the context of 120 tokens" in told
    found = read(out)
    assert {s.setting for s in found} == {Setting("code", 1), Setting("text", 0)}
    assert [(s.problem_id, s.sample) for s in found[:6]] == [
        (f"sums/{n}", sample) for n in (0, 2, 3) for sample in range(2)
    ]
    assert found[0].spans[0].text.endswith("?\\nUse code.")
    assert found[0].types == {"kind": "k0"} and found[0].truth == "2"
    titles = ("Accuracy", "Compared", "pass@k", "Accuracy against tokens", "By type of problem")
    assert "| text | sums | 3 | 1 | 2 |" in told
    for title in (*titles, "Code"):
        assert f"### {title}\n" in told
    assert cli.main(["eval", *args]) == 0
    assert "### Accuracy\n" in capsys.readouterr().out


def test_benchmark_files_hold_what_they_should(shared):
    """500, 40, 30, 30 and 100 problems, OlymMATH's hard ones apart."""
    found = {b.name: problems_of(b, shared / "data/benchmarks") for b in BENCHMARKS}
    sizes = [500, 40, 30, 30, 100, 100]
    assert list(map(len, found.values())) == sizes
    assert [b.name for b in SUITES["cir"].benchmarks] == list(found)[:5]
    assert [(b.samples, b.temperature) for b in SUITES["cir"].benchmarks] == [
        (1, 0.0),
        *[(16, 1.0)] * 4,
    ]
    assert found["math500"][0].metadata["types"] == {"subject": "Precalculus", "level": "2"}
    assert found["olymmath_en_easy"][0].metadata["types"] == {"subject": "Combinatorics"}
    assert found["amc23"][7].problem_id == "amc23/7" and found["aime24"][0].answer == "\\boxed{204}"
    assert SUITES["cir"].text_prompt.endswith("\\boxed{}.\n{question}")


OWN = """
name = "mine"
max_calls = 8
code_prompt = "instruct"
[[benchmarks]]
name = "one"
file = "one.jsonl"
samples = 4
"""


def test_a_suite_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    suite = find_suite(str(path))
    assert (suite.max_calls, suite.max_response_tokens) == (8, 16384)
    assert suite.code_prompt == PROMPTS["instruct"] and suite.benchmarks[0].top_p == 0.95
    assert [b.name for b in pick(suite, ["one", "aime25"]).benchmarks] == ["one", "aime25"]


@pytest.mark.parametrize(
    "change, error",
    [
        (("samples = 4", "sample = 4"), "benchmarks.0.sample=4: unknown key; nearest: samples"),
        (("max_calls = 8", "max_calls = -1"), "max_calls=-1: must be greater"),
        (('"instruct"', '"what?"'), "code_prompt='what\\?': must contain {question}, or be one"),
        (('file = "one.jsonl"\n', ""), "benchmarks.0.file: missing"),
        (("[[benchmarks]]", "[[benchmarks]"), "not a TOML file"),
    ],
)
def test_a_wrong_suite_is_one_line(tmp_path, change, error):
    path = tmp_path / "mine.toml"
    path.write_text(OWN.replace(*change))
    with pytest.raises(ConfigError, match=error):
        find_suite(str(path))


@pytest.mark.parametrize(
    "args, error",
    [
        ([CONFIG, "--suite", "cri"], "--suite 'cri': must be one of cir, olymmath"),
        ([CONFIG, "--suite", "cir", "--data-dir", "/no"], "file of math500='/no/math500.jsonl'"),
        ([CONFIG, "--suite", "cir", "--benchmarks", "aime42"], "nearest: aime25"),
        ([CONFIG, "--suite", "cir", "--code-prompt", "x"], "--code-prompt 'x': must be one of cir"),
        ([CONFIG, "--benchmarks", "aime24"], "--benchmarks: only with --suite"),
        ([CONFIG, "eval.num_problems=0"], "eval.num_problems=0: must be above 0"),
        ([CONFIG, "rollout.slot=3"], "nearest valid key: rollout.slots"),
        (["/no/such"], "MODEL='/no/such': no such file or directory"),
        (["package:quickstart/cold_start"], "holds weights alone; --suite says"),
        (["package:quickstart"], "holds neither a run nor weights"),
    ],
)
def test_bad_input_is_one_line(args, error, capsys, shared):
    if "--suite" in args and "--data-dir" not in args:
        args = [*args, "--data-dir", str(shared / "data/benchmarks")]
    assert cli.main(["eval", *args]) == 2
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1


def test_analyse_says_what_it_cannot_read(first, tmp_path, capsys):
    assert cli.main(["analyse", str(tmp_path)]) == 2
    assert "holds neither a run nor an evaluation" in capsys.readouterr().err
    assert cli.main(["analyse", str(first), "--only", "learning_curve"]) == 2
    assert "--only learning_curve: nothing is saved" in capsys.readouterr().err
    assert cli.main(["analyse", str(first), "--only", "code", "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("### Code") and (tmp_path / "out/analyses.md").read_text() in told
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / DESCRIPTION).write_bytes((first / DESCRIPTION).read_bytes())
    for name in (SAMPLES, TIMINGS):
        (broken / name).write_text("{}\n")
    assert cli.main(["analyse", str(broken)]) == 2
    assert "samples.jsonl, line 1: no line of samples: KeyError" in capsys.readouterr().err
