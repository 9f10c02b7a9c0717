"""Rejection sampling: a model's correct trajectories, and how often it answered each problem right.

Problems are answered in rounds of rollout.prompts_per_step. After each of them its lines are
appended and the state, which names the files' sizes, takes the place of the one before: what was
written after it is dropped by whoever goes on. A token depends on the seed, the round and the place
in it, so that a stop changes nothing.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from cir_jax import config as configs
from cir_jax.config import Config, ConfigError, RolloutConfig
from cir_jax.data import pipeline, sources, tasks
from cir_jax.evals.suite import grade
from cir_jax.metrics import reason_counts
from cir_jax.models import qwen
from cir_jax.records import Author, Call, Problem, Score, Trajectory, author_spans
from cir_jax.rollout.sampling import Sampling
from cir_jax.sandbox.text import result_text
from cir_jax.tokenizer import Tokenizer
from cir_jax.train.display import Display
from cir_jax.train.loop import given_params
from cir_jax.train.rollouts import Rollouts, open_rollouts

# Keys that change no answer.
_WHERE_AND_HOW = (*configs.UPKEEP, "sft", "rl", "eval")


@dataclasses.dataclass(frozen=True)
class Request:
    """model: as sft.weights. At most so many trajectories are kept per problem and per task."""

    model: str
    out: Path
    split: tasks.Split
    num_problems: int
    per_problem: int
    per_task: int

    @property
    def answers(self) -> Path:
        return self.out.with_suffix(".answers.jsonl")

    @property
    def state(self) -> Path:
        return self.out.with_suffix(".state.json")


@dataclasses.dataclass
class State:
    """asked: what decides the result. sizes: bytes of the files. kept: trajectories per task."""

    asked: dict[str, Any]
    rounds: int = 0
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    kept: dict[str, int] = dataclasses.field(default_factory=dict)
    num_answers: int = 0
    num_correct: int = 0


def collect(cfg: Config, request: Request, display: Display) -> State:
    """Collects what is missing of the request; ConfigError if the files are of another one."""
    state = _resumed(request, _asked(cfg, request))
    size = cfg.rollout.prompts_per_step
    if state.rounds < -(-request.num_problems // size):
        with open_rollouts(cfg, None) as tools:
            found = (
                sources.of_tasks(cfg.data.tasks, request.split)
                if cfg.data.tasks
                else sources.train_sources(cfg.data, tools.engine.fits, display.note)
            )
            problems = pipeline.first_problems(found, request.num_problems)
            for problem in problems:
                if problem.context:
                    raise ConfigError(
                        f"problem {problem.problem_id}: has messages before the question, which "
                        "trajectories for SFT have no place for"
                    )
            params = given_params("MODEL|RUN", request.model, cfg.model, tools.mesh, cfg.seed)
            rounds = range(state.rounds, -(-len(problems) // size))
            for number in rounds:
                part = problems[number * size : (number + 1) * size]
                _round(cfg, request, state, tools, params, part)
                display.note(
                    f"round {state.rounds} of {rounds.stop}: {sum(state.kept.values())} kept, "
                    f"{state.num_correct} of {state.num_answers} answers correct"
                )
    display.note(f"kept by task: {state.kept}")
    return state


def _round(
    cfg: Config,
    request: Request,
    state: State,
    tools: Rollouts,
    params: qwen.Params,
    problems: list[Problem],
) -> None:
    rollout = cfg.rollout
    groups, _ = tools.engine.rollout(
        params,
        problems,
        samples=rollout.samples_per_prompt,
        max_calls=configs.most_calls(rollout),
        sampling=Sampling(rollout.temperature, rollout.top_p, rollout.top_k, rollout.min_p),
        phase="collect",
        step=state.rounds,
    )
    scores = iter(grade([t for group in groups for t in group], tools.grader, tools.tokenizer))
    kept, counts = [], []
    for group in groups:
        own = [next(scores) for _ in group]
        problem = group[0].problem
        num_correct = sum(score.value > 0 for score in own)
        state.num_answers += len(group)
        state.num_correct += num_correct
        counts.append(
            {
                "problem_id": problem.problem_id,
                "task": problem.task,
                "num_answers": len(group),
                "num_correct": num_correct,
            }
            | reason_counts(own)
        )
        room = request.per_task - state.kept.get(problem.task, 0)
        chosen = choose(group, own, min(request.per_problem, room))
        state.kept[problem.task] = state.kept.get(problem.task, 0) + len(chosen)
        kept += [line(t, score, tools.tokenizer, rollout) for t, score in chosen]
    state.rounds += 1
    for path, lines in ((request.out, kept), (request.answers, counts)):
        _append(path, lines)
        state.sizes[path.name] = path.stat().st_size
    _write_state(request.state, state)


def choose(
    group: list[Trajectory], scores: list[Score], most: int
) -> list[tuple[Trajectory, Score]]:
    """The first of a problem's trajectories that are correct, ended by themselves and differ."""
    seen: set[bytes] = set()
    chosen = []
    for trajectory, score in zip(group, scores, strict=True):
        ids = trajectory.ids.tobytes()
        if len(chosen) < most and score.value > 0 and trajectory.stop_reason == "eos":
            if ids not in seen:
                chosen.append((trajectory, score))
            seen.add(ids)
    return chosen


def line(
    trajectory: Trajectory, score: Score, tokenizer: Tokenizer, cfg: RolloutConfig
) -> dict[str, Any]:
    """A trajectory as train/transcripts.py reads it, and what else is known of it."""
    problem = trajectory.problem
    return {
        "id": f"{problem.problem_id}#{trajectory.sample}",
        "problem_id": problem.problem_id,
        "task": problem.task,
        "question": problem.question,
        "answer": problem.answer,
        "correct": score.value > 0,
        "reason": score.reason,
        "stop_reason": trajectory.stop_reason,
        "tokenizer": tokenizer.fingerprint,
        "segments": [
            {
                "author": author.name.lower(),
                "text": tokenizer.decode([i for i in ids if i not in tokenizer.end_ids]),
                "ids": ids,
            }
            for author, ids in _segments(trajectory)
        ],
        "calls": [_call(call, cfg) for call in trajectory.calls],
    }


def _segments(trajectory: Trajectory) -> list[tuple[Author, list[int]]]:
    spans = author_spans(trajectory.author)
    return [(who, trajectory.ids[at].tolist()) for who, at in spans if who != Author.PROMPT]


def _call(call: Call, cfg: RolloutConfig) -> dict[str, str]:
    result = call.result
    return {
        "code": call.code,
        "status": result.status,
        "output": result_text(result, cfg.result),
        "stdout": result.stdout,
        "error": result.error,
    }


# --- files


def _asked(cfg: Config, request: Request) -> dict[str, Any]:
    tree = configs.to_tree(cfg)
    for key in _WHERE_AND_HOW:
        del tree[key]
    directory = configs.asset_dir(request.model)
    files = configs.weights_in(directory)
    fields = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
    fields |= {"out": request.out.name, "model": str(directory.resolve()), "weights": files}
    return fields | {"config": tree}


def _resumed(request: Request, asked: dict[str, Any]) -> State:
    """The state that was left, none at first, and the files as they were then."""
    if not request.state.exists():
        for path in (request.out, request.answers):
            if path.exists():
                raise ConfigError(f"--out {str(request.out)!r}: {path} is there already")
        sizes = {path.name: 0 for path in (request.out, request.answers)}
        _write_state(request.state, State(asked, sizes=sizes))
    try:
        state = State(**json.loads(request.state.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{request.state}: {error}") from error
    now = json.loads(json.dumps(asked))
    for key, (was, is_now) in configs.tree_differences(state.asked, now).items():
        raise ConfigError(
            f"--out {str(request.out)!r}: was begun with {key}={was!r}, now it is {is_now!r}; "
            "another file, or the same request"
        )
    for name, size in state.sizes.items():
        path = request.out.with_name(name)
        path.touch()
        if path.stat().st_size < size:
            raise ConfigError(f"{path}: must hold the {size} bytes that {request.state} knows of")
        os.truncate(path, size)
    return state


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in lines)
        file.flush()
        os.fsync(file.fileno())


def _write_state(path: Path, state: State) -> None:
    aside = path.with_name(path.name + ".new")
    aside.write_text(json.dumps(dataclasses.asdict(state)) + "\n", encoding="utf-8")
    os.replace(aside, path)
