"""Rejection sampling by the shipped cold start: what is kept, counted, resumed and refused."""

import contextlib
import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from cir_jax import cli
from cir_jax import config as configs
from cir_jax.collect import rejection
from cir_jax.collect.rejection import Request, choose, collect
from cir_jax.config import ConfigError
from cir_jax.data import curriculum
from cir_jax.data.curriculum import Answers
from cir_jax.records import Author, Problem, Score, Trajectory
from cir_jax.reward.score import Grader
from cir_jax.rollout.engine import Engine
from cir_jax.sandbox.pool import Sandbox
from cir_jax.tokenizer import Tokenizer
from cir_jax.train import rollouts, transcripts
from cir_jax.train.display import Display

ROOT = Path(__file__).parent.parent
MODEL = "package:quickstart/cold_start"
OVERRIDES = (
    "rollout.prompts_per_step=5",
    "rollout.samples_per_prompt=4",
    "rollout.slots=20",
    "rl.minibatch_prompts=5",
    "sandbox.num_workers=1",
)


@pytest.fixture(scope="module", autouse=True)
def one_device_and_sandbox():
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts.meshes, "make_mesh", lambda cfg: mesh)
        # One for all: its start takes seconds.
        with Sandbox(num_workers=1) as sandbox:
            shared = contextlib.nullcontext(sandbox)
            patch.setattr(rollouts, "open_store", lambda cfg, record_dir, process: shared)
            yield


def load(*overrides):
    return configs.load(ROOT / "configs/quickstart.toml", (*OVERRIDES, *overrides))


def asked(out, **changes):
    """Two rounds of five problems, one of each of the ten tasks."""
    request = Request(MODEL, out, "rl", num_problems=10, per_problem=2, per_task=70)
    return dataclasses.replace(request, **changes)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    request = asked(tmp_path_factory.mktemp("collect") / "first.jsonl")
    rollout, steps = Engine.rollout, []

    def noted(self, *args, step, **kwargs):
        steps.append(step)
        return rollout(self, *args, step=step, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "rollout", noted)
        state = collect(load(), request, Display())
    # Each round has random numbers of its own.
    assert steps == [0, 1]
    return request, state


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(request):
    return request.out.read_bytes(), request.answers.read_bytes()


def test_what_is_kept_and_counted(first):
    request, state = first
    kept, answers = lines(request.out), lines(request.answers)
    cfg = load()
    assert [row["problem_id"] for row in answers] == [f"{task}/rl/0" for task in cfg.data.tasks]
    assert {row["num_answers"] for row in answers} == {4}
    assert state.num_answers == 40 and state.rounds == 2
    assert state.num_correct == sum(row["num_correct"] for row in answers) > 0
    for row in answers:
        own = [line for line in kept if line["problem_id"] == row["problem_id"]]
        # Correct answers that were cut, or equal to another, are counted but not kept.
        assert len(own) <= min(2, row["num_correct"])
        assert row["num_correct"] == row.get("graded/correct", 0)
        assert len({json.dumps(line["segments"]) for line in own}) == len(own)
    assert len(kept) == sum(state.kept.values()) > 0
    assert any(line["calls"] for line in kept) and not all(line["calls"] for line in kept)
    tokenizer = Tokenizer(configs.asset_dir(cfg.tokenizer))
    with Grader() as grader:
        for line in kept:
            assert line["correct"] and line["reason"] == "correct" and line["stop_reason"] == "eos"
            texts = [s["text"] for s in line["segments"] if s["author"] == "model"]
            problem = Problem("p", line["task"], line["question"], line["answer"], "math")
            assert grader.submit(problem, texts).result(60).value == 1.0
            for call, segment in zip(line["calls"], line["segments"][1::2], strict=True):
                assert f"```output\n{call['output']}\n```" in segment["text"]
            for segment in line["segments"]:
                text = tokenizer.decode(segment["ids"]).removesuffix("<|endoftext|>")
                assert text == segment["text"]


def test_what_is_kept_can_be_trained_on(first):
    request, state = first
    cfg = load(f"sft.data={request.out}")
    recorded, counts = transcripts.load(cfg, Tokenizer(configs.asset_dir(cfg.tokenizer)))
    assert len(recorded) == sum(state.kept.values()) and set(counts.values()) == {0, len(recorded)}


def test_counts_become_a_curriculum(first, tmp_path):
    request, state = first
    by_task = curriculum.read_answers([request.answers], "task")
    assert sum(by_task[task].correct for task in by_task) == state.num_correct
    out = tmp_path / "curriculum.json"
    assert cli.main(["curriculum", str(request.answers), "--out", str(out)]) == 0
    drawn = curriculum.read(out).at(10_000)[1]
    assert sorted(drawn) == sorted(row["problem_id"] for row in lines(request.answers))
    easy = by_task["larger"]  # one problem of four answers
    assert easy == Answers(4, lines(request.answers)[0]["num_correct"])


def test_killed_it_goes_on_with_the_same_result(first, tmp_path, monkeypatch):
    """Between the two files of the second round; a line may then be half there."""
    request = asked(tmp_path / first[0].out.name)
    append, count = rejection._append, [0]

    def dying(path, rows):
        count[0] += 1
        append(path, rows)
        if count[0] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(rejection, "_append", dying)
    with pytest.raises(KeyboardInterrupt):
        collect(load(), request, Display())
    monkeypatch.setattr(rejection, "_append", append)
    with open(request.out, "a", encoding="utf-8") as file:
        file.write('{"half')
    state = collect(load(), request, Display())
    assert files(request) == files(first[0])
    assert dataclasses.asdict(state) == dataclasses.asdict(first[1])


def test_done_it_asks_for_nothing_more(first, monkeypatch):
    monkeypatch.setattr(rejection, "open_rollouts", None)
    before = files(first[0])
    assert collect(load(), first[0], Display()) == first[1]
    assert files(first[0]) == before


@pytest.mark.parametrize(
    ("changes", "overrides", "words"),
    [
        ({"per_problem": 3}, [], "begun with per_problem=2, now it is 3"),
        ({"split": "sft"}, [], "begun with split='rl', now it is 'sft'"),
        ({}, ["rollout.temperature=0.5"], "config.rollout.temperature=1.0, now it is 0.5"),
        ({}, ["rollout.max_calls=0"], "config.rollout.max_calls="),
    ],
)
def test_another_request_is_refused(first, changes, overrides, words):
    before = files(first[0])
    with pytest.raises(ConfigError) as caught:
        collect(load(*overrides), dataclasses.replace(first[0], **changes), Display())
    assert words in str(caught.value)
    assert files(first[0]) == before


def test_what_only_training_looks_at_may_change(first, monkeypatch):
    monkeypatch.setattr(rejection, "open_rollouts", None)
    assert collect(load("rl.steps=7", "name=other"), first[0], Display()) == first[1]


def test_files_of_others_are_left_alone(tmp_path):
    request = asked(tmp_path / "mine.jsonl")
    request.out.write_text("precious\n")
    with pytest.raises(ConfigError, match="mine.jsonl is there already"):
        collect(load(), request, Display())
    assert request.out.read_text() == "precious\n"


def test_messages_before_the_question_are_not_lost(tmp_path, monkeypatch):
    """Trajectories hold the question alone."""
    problem = Problem("p", "sum", "Why?", "1", "math", context=(("system", "Be brief."),))
    monkeypatch.setattr(rejection.pipeline, "first_problems", lambda *args: [problem])
    request = asked(tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="problem p: has messages before the question"):
        collect(load(), request, Display())
    assert request.out.read_text() == ""


def test_choice():
    """The first correct, whole and distinct ones, at most so many."""
    problem = Problem("p", "sum", "?", "0", "math")

    def answer(token, stop_reason="eos"):
        author = np.array([Author.PROMPT, Author.MODEL], np.int8)
        ids = np.array([0, token], np.int32)
        return Trajectory(problem, 0, ids, author, np.zeros(2, np.float32), (), stop_reason)

    group = [answer(1), answer(2), answer(3, "context"), answer(2), answer(4), answer(5)]
    scores = [Score(-1.0, "wrong")] + [Score(1.0, "correct")] * 5
    for most, expected in [(0, []), (1, [2]), (2, [2, 4]), (9, [2, 4, 5])]:
        assert [int(t.ids[1]) for t, _ in choose(group, scores, most)] == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([MODEL, "--out", "a.jsonl"], "holds weights alone; --config"),
        (["nowhere", "--out", "a.jsonl"], "RUN_DIR='nowhere': no such file"),
        ([MODEL, "--out", "a.json", "--config", "configs/quickstart.toml"], "must end in .jsonl"),
        (
            [MODEL, "rl.stesp=1", "--out", "a.jsonl", "--config", "configs/quickstart.toml"],
            "rl.stesp=1: unknown key; nearest valid key: rl.steps",
        ),
    ],
)
def test_bad_command_lines(capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(ROOT)
    assert cli.main(["collect", *arguments, "--problems", "1"]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1
