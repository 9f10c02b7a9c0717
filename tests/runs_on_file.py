"""Run directories written as training writes them, without training."""

import functools
import json
from pathlib import Path

import numpy as np
from models_table import TINY_RUN

from cir_jax import config as configs
from cir_jax.evals.samples import DESCRIPTION, Fork, Parts, Setting, sample_of
from cir_jax.metrics import MetricsWriter, Outcome
from cir_jax.records import Author, Call, ExecResult, Problem, Score, Trajectory
from cir_jax.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
TASKS = ("sum", "chain", "larger")


def tiny(run_dir: Path, *overrides: str) -> configs.Config:
    extra = (f"run_dir={str(run_dir)!r}", *overrides)
    return configs.load(ROOT / "configs/quickstart.toml", TINY_RUN + extra)


def trajectory(
    tokenizer: Tokenizer,
    problem: Problem,
    sample: int,
    parts: list[tuple[Author, str]],
    calls: tuple[Call, ...] = (),
    stop_reason: str = "eos",
) -> Trajectory:
    """parts: text and who wrote it, encoded apart; log-probabilities fall along the response."""
    encoded = [(who, tokenizer.encode(text)) for who, text in parts]
    ids = np.array([i for _, part in encoded for i in part], np.int32)
    author = np.array([who for who, part in encoded for _ in part], np.int8)
    logp = np.where(author == Author.MODEL, -np.arange(len(ids)) / 20, 0).astype(np.float32)
    return Trajectory(problem, sample, ids, author, logp, calls, stop_reason)


def parts_of(question: str, code: str, put: str, answer: str) -> list[tuple[Author, str]]:
    return [
        (Author.PROMPT, question + "\n"),
        (Author.MODEL, f"Let me compute.\n```python\n{code}\n```"),
        (Author.TOOL, f"\n```output\n{put}\n```\n"),
        (Author.MODEL, f"So it is \\boxed{{{answer}}}."),
    ]


def write_run(
    run_dir: Path,
    tokenizer: Tokenizer,
    *overrides: str,
    steps: int = 4,
    groups: int = 3,
    samples: int = 2,
) -> Path:
    """Every third response has no program, every fourth program fails, every second answer is
    right; the budget rises at step 3. Problems depend on step and group alone."""
    run_dir.mkdir(parents=True)
    configs.save_run(tiny(run_dir, *overrides), run_dir)
    (run_dir / "sandbox.json").write_text(json.dumps({"rung": "namespaces", "python": "3.11"}))
    writer = MetricsWriter(run_dir)
    figures = {f"accuracy/{task}": 0.5 for task in TASKS} | {"accuracy": 0.25, "code_share": 0.5}
    writer.write("eval", 0, {"stage": "before RL"} | figures, {"wall_s": 1.0})
    for step in range(1, steps + 1):
        budget = 1 if step < 3 else 2
        row = {"reward": step / 10, "max_calls": budget, "entropy": 1 / step} | figures
        writer.write("rl", step, row, {"rollout_s": 1.0, "update_s": 2.0})
        for n in range(groups * samples):
            write_response(writer, tokenizer, step, n // samples, n % samples, budget)
    writer.write("eval", steps, {"stage": "after RL"} | figures | {"accuracy": 0.75}, {})
    return run_dir


def write_evaluation(folder: Path, tokenizer: Tokenizer, forks: bool = True) -> Path:
    """Two samples of each of three problems, with tools, and forks of the first of each."""
    parts, samples = Parts(folder), []
    setting = Setting("code", 2)
    for p, task in enumerate(TASKS):
        problem = Problem(f"{task}/eval/{p}", task, f"What is {p} and {p}?", str(2 * p), "math")
        call = Call("print(1)", ExecResult("ok", str(2 * p)), 4)
        for n in range(2):
            said = parts_of(problem.question, f"print({p} * 2)", str(2 * p), str(2 * p + n))
            t = trajectory(tokenizer, problem, n, said, (call,))
            score = Score(-1.0, "wrong") if n else Score(1.0, "correct")
            keep = functools.partial(
                sample_of, t, score, tokenizer, index=p, setting=setting, vote=n
            )
            samples.append(keep())
            if forks and n == 0:
                samples += [keep(fork=Fork(0, 0, branch)) for branch in ("on", "off", "corrupted")]
    parts.write(0, samples)
    parts.merge(1)
    config = configs.to_tree(tiny(folder))
    about = {"model": "quickstart/001", "stage": "after RL", "left_out": {}}
    about["asked"] = {"config": config}
    (folder / DESCRIPTION).write_text(json.dumps(about))
    return folder


def write_response(writer, tokenizer, step: int, group: int, sample: int, budget: int) -> None:
    n = step * 100 + group * 10 + sample
    task = TASKS[group % len(TASKS)]
    question = f"What is {n // 10} plus {step}?"
    is_right, fails = sample % 2 == 0, n % 4 == 0
    put = "ZeroDivisionError: division by zero" if fails else str(n)
    parts = parts_of(question, f"print({n} + {step})", put, str(n) if is_right else "none")
    calls = (Call("print(1)", ExecResult("error", "", put) if fails else ExecResult("ok", put), 4),)
    if n % 3 == 0:
        parts, calls = [parts[0], (Author.MODEL, f"At a guess \\boxed{{{n}}}.")], ()
    problem = Problem(f"{task}/rl/{n // 10}", task, question, str(n), "math")
    t = trajectory(tokenizer, problem, sample, parts, calls)
    value = 1.0 if is_right else -1.0
    advantage = np.full(len(t.ids), value / 2, np.float32)
    outcome = Outcome(step, group, budget, value - 0.25, advantage)
    score = Score(value, "correct" if is_right else "wrong")
    writer.write_sample(t, score, outcome, tokenizer.decode(t.ids))
