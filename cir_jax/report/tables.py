"""What of runs is shown in words and numbers: cards at the top, and tables."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from cir_jax import config as configs
from cir_jax.evals.samples import DESCRIPTION
from cir_jax.report.source import SANDBOX_FILE, Material, Source

# Columns of the evaluations' table: metric -> title; shares are shown in per cent.
_EVAL = {
    "accuracy": "correct",
    "code_share": "use code",
    "needed_code_share": "where needed",
    "programs_ok_share": "programs run",
    "correct_after_failure_share": "correct after a failed one",
    "cut_share": "cut",
}
_EVAL_NUMBERS = {"calls_per_response": "programs", "response_tokens": "tokens"}
_BY_TASK = "accuracy/"


@dataclasses.dataclass(frozen=True)
class Table:
    """rows: cells as they are shown; the first of each is its name."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Card:
    """A source in short. figures: (name, value), the large ones. facts: (name, value).

    files: what is there to be unfolded, by name, as JSON.
    """

    name: str
    directory: str
    kind: str
    figures: list[tuple[str, str]]
    facts: list[tuple[str, str]]
    files: dict[str, str]


def percent(share: Any) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def short(value: Any) -> str:
    """A number as a person reads it; anything else as JSON."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def card(source: Source) -> Card:
    config = source.config
    figures = []
    evaluations = source.of_kind("eval")
    if evaluations:
        first, last = evaluations[0], evaluations[-1]
        if first is not last:
            figures.append((f"correct {first['stage']}", percent(first["accuracy"])))
        figures.append((f"correct {last['stage']}", percent(last["accuracy"])))
    steps = source.of_kind("rl")
    if steps:
        figures.append(("RL steps", f"{steps[-1]['step']} of {config['rl']['steps']}"))
        figures.append(("last reward", f"{steps[-1]['reward']:.3f}"))
        figures.append(("use of code", percent(steps[-1]["code_share"])))
    if source.kind == "evaluation":
        correct = [row["score"] > 0 for row in source.samples if not row.get("fork")]
        figures.append(("samples", str(len(correct))))
        if correct:
            figures.append(("correct", percent(sum(correct) / len(correct))))
        if forks := len(source.samples) - len(correct):
            figures.append(("counterfactual samples", str(forks)))
    files = {configs.CONFIG_FILE: config} | source.about
    return Card(
        source.name,
        str(source.directory),
        "training run" if source.kind == "run" else "evaluation",
        figures,
        [(name, value) for name, value in _facts(source) if value],
        {name: json.dumps(tree, indent=1, ensure_ascii=False) for name, tree in files.items()},
    )


def _facts(source: Source) -> list[tuple[str, str]]:
    config = source.config
    model, rollout, mesh = (config.get(key, {}) for key in ("model", "rollout", "mesh"))
    data = config.get("data", {})
    sandbox = source.about.get(SANDBOX_FILE, {})
    packages = ", ".join(f"{k} {v}" for k, v in sandbox.get("versions", {}).items())
    about = source.about.get(DESCRIPTION, {})
    facts = [
        ("evaluated", ", ".join(str(about[k]) for k in ("model", "stage") if k in about)),
        (
            "model",
            f"{model.get('num_layers')} layers, width {model.get('width')}, "
            f"{model.get('vocab_size')} tokens",
        ),
        ("problems", ", ".join(data.get("tasks") or data.get("files") or ())),
        ("seed", str(config.get("seed", ""))),
    ]
    if source.kind == "run":
        rl = config["rl"]
        facts += [
            (
                "each RL step",
                f"{rollout['prompts_per_step']} problems × {rollout['samples_per_prompt']} samples",
            ),
            ("advantage", f"{rl['advantage']}, learning rate {rl['optim']['learning_rate']:g}"),
            ("budget", _budget(rollout["max_calls"])),
            ("devices", " × ".join(f"{k} {v}" for k, v in mesh.items() if v and v > 1) or "1"),
            ("time", _duration(source)),
        ]
    isolation = [sandbox.get("rung"), sandbox.get("python") and f"python {sandbox['python']}"]
    facts.append(("programs run in", ", ".join(filter(None, [*isolation, packages]))))
    return facts


def _budget(budget: Any) -> str:
    if isinstance(budget, int):
        return f"{budget} programs"
    return ", ".join(f"{calls} from step {step}" for step, calls in budget)


def _duration(source: Source) -> str:
    """Seconds that stages took, all steps together."""
    stages = ("data_s", "rollout_s", "reward_s", "update_s", "wall_s", "held_out_s")
    total = sum(row.get(key, 0) for row in source.timings for key in stages)
    if not total:
        return ""
    minutes, seconds = divmod(round(total), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def tables(material: Material) -> list[Table]:
    made = [_evaluations(material.sources), _tasks(material.sources)]
    made += [
        Table(f"Ablation, {name}", rows[0], rows[1:])
        for name, rows in material.tables.items()
        if rows
    ]
    made.append(_differences(material.sources))
    made.append(_last(material.sources))
    return [table for table in made if table.rows]


def _stages(sources: Sequence[Source]) -> list[tuple[str, dict]]:
    """Each evaluation of a run with its name, which has the run's where there are several."""
    several = len({s.name for s in sources if s.of_kind("eval")}) > 1
    return [
        (f"{source.name}, {row['stage']}" if several else row["stage"], row)
        for source in sources
        for row in source.of_kind("eval")
    ]


def _evaluations(sources: Sequence[Source]) -> Table:
    rows = [
        [name]
        + [percent(row.get(key)) for key in _EVAL]
        + [f"{row[key]:.2f}" if key in row else "" for key in _EVAL_NUMBERS]
        for name, row in _stages(sources)
    ]
    return Table(
        "Evaluations during training",
        ["stage", *_EVAL.values(), *_EVAL_NUMBERS.values()],
        rows,
        "Held-out problems, greedy; programs and tokens per response.",
    )


def _tasks(sources: Sequence[Source]) -> Table:
    stages = _stages(sources)
    tasks = dict.fromkeys(k for _, row in stages for k in row if k.startswith(_BY_TASK))
    rows = [
        [task.removeprefix(_BY_TASK), *(percent(row.get(task)) for _, row in stages)]
        for task in sorted(tasks)
    ]
    return Table("Correct by task", ["task", *(name for name, _ in stages)], rows)


def _differences(sources: Sequence[Source]) -> Table:
    """Keys in which configs of runs differ, besides names and places."""
    runs = [source for source in sources if source.kind == "run"]
    keys = dict.fromkeys(
        key
        for run in runs[1:]
        for key in configs.tree_differences(runs[0].config, run.config)
        if key not in ("name", "run_dir", "resume")
    )
    rows = [[key, *(short(_at(run.config, key)) for run in runs)] for key in keys]
    return Table("Configs differ in", ["key", *(run.name for run in runs)], rows)


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _last(sources: Sequence[Source]) -> Table:
    """Every metric of the last RL step."""
    last = {s.name: rows[-1] for s in sources if (rows := s.of_kind("rl"))}
    keys = dict.fromkeys(
        key for row in last.values() for key, value in row.items() if isinstance(value, int | float)
    )
    rows = [[key, *(short(row.get(key, "")) for row in last.values())] for key in keys]
    return Table("All metrics of the last step", ["metric", *last], rows)
