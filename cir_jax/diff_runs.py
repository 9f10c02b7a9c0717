"""`cir-jax diff-runs A B`: where two runs first differ, from what they wrote down.

Line by line of the metrics, as far as both go. Of the first RL step whose lines differ, rollouts/
has the rows: the first of these that is not the same in both, its first token that is not, and
what of it differs. Where all rows are the same, the update made the difference.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cir_jax import config as configs
from cir_jax import metrics
from cir_jax.config import ConfigError
from cir_jax.records import Author

# Keys of a metrics line that follow from its others, or tell of all of them at once.
_HASHES = ("chain", "batch_digest", "params_digest")
_OF_TOKENS = {"ids": "token", "author": "author", "logp": "log-probability"}
_OF_ROWS = ("problem", "sample", "length", "stop", "reward")


class Difference(NamedTuple):
    """The first one. step: "rl 12". row, token: None where it is not in one. quantity: what
    differs, with both values."""

    step: str
    row: str | None
    token: int | None
    quantity: str


def add(commands) -> None:
    diff = commands.add_parser(
        "diff-runs",
        help="where two runs first differ",
        description="Names the first step, row, token and quantity in which two runs differ, from "
        "their metrics.jsonl and rollouts/. What one of them has not come to yet does not count. "
        "The exit status is 0 if they do not differ, 1 if they do.",
    )
    diff.add_argument("one", metavar="RUN_A", type=Path)
    diff.add_argument("other", metavar="RUN_B", type=Path)
    diff.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    runs = (args.one, args.other)
    for name, key in zip(runs, ("RUN_A", "RUN_B"), strict=True):
        if not (name / metrics.METRICS).is_file():
            raise ConfigError(f"{key}={str(name)!r}: no run: it has no {metrics.METRICS}")
    for line in _config_lines(*runs):
        print(line)
    lines = [_lines(run_dir) for run_dir in runs]
    for run_dir, own in zip(runs, lines, strict=True):
        if (at := metrics.broken_link(own)) is not None:
            print(f"{run_dir}: line {at + 1} of {metrics.METRICS} is not as it was written")
    found = difference(runs, lines)
    count = min(map(len, lines))
    if found is None:
        ends = "both end there" if len(lines[0]) == len(lines[1]) else "one goes on"
        last = _name(lines[0][count - 1]) if count else "nothing"
        print(f"no difference in {count} lines, up to {last}; {ends}")
        return 0
    print(f"first difference: {found.step}")
    if found.row is not None:
        print(f"row: {found.row}")
    if found.token is not None:
        print(f"token: {found.token}")
    print(f"quantity: {found.quantity}")
    return 1


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return metrics.read(run_dir)
    except ValueError as error:
        raise ConfigError(f"{run_dir / metrics.METRICS}: not lines of JSON: {error}") from error


def _config_lines(one: Path, other: Path) -> Iterator[str]:
    if configs.holds_run(one) and configs.holds_run(other):
        for key, (a, b) in configs.differences(
            configs.load_run(one), configs.load_run(other)
        ).items():
            if key not in ("run_dir", "resume"):
                yield f"config: {key}={a!r} and {b!r}"


def difference(runs: tuple[Path, Path], lines: list[list[dict[str, Any]]]) -> Difference | None:
    """lines: of each run's metrics. None if they are the same as far as both go."""
    for a, b in zip(*lines, strict=False):
        if _name(a) != _name(b):
            return Difference(_name(a), None, None, f"the other run comes to {_name(b)}")
        differ = [k for k in {**a, **b} if k != "chain" and not _same(a.get(k), b.get(k))]
        if not differ:
            continue
        if a["kind"] == "rl":
            rows = [_step(run_dir, a["step"]) for run_dir in runs]
            if all(rows):
                if found := _first_row(_name(a), *rows):
                    return found
                return Difference(_name(a), None, None, _in_update(a, b, differ, *rows))
        return Difference(_name(a), None, None, _values(a, b, differ))
    return None


def _name(line: Mapping[str, Any]) -> str:
    stage = f" ({line['stage']})" if "stage" in line else ""
    return f"{line['kind']} step {line['step']}{stage}"


def _same(a: Any, b: Any) -> bool:
    return a == b or (a != a and b != b)  # NaN is as good as NaN


def _values(a: Mapping[str, Any], b: Mapping[str, Any], differ: list[str]) -> str:
    named = [k for k in differ if k not in _HASHES] or differ
    more = f", and {len(named) - 1} more" if len(named) > 1 else ""
    return f"{named[0]}: {a.get(named[0])} and {b.get(named[0])}{more}"


def _in_update(a, b, differ: list[str], one, other) -> str:
    """All rows are the same."""
    leaves = [
        name.decode()
        for name, x, y in zip(one["leaf"], one["digest"], other["digest"], strict=True)
        if x != y
    ]
    text = f"{_values(a, b, differ)}; all rows are the same"
    if leaves:
        text += f"; parameters after the update: {len(leaves)} leaves differ, first {leaves[0]}"
    return text


def _step(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    """A step's arrays, all processes' one after the other; empty if they were not kept."""
    # On demand: jax, which it holds, takes seconds.
    from cir_jax.train import trace

    parts = []
    for path in trace.files_of(run_dir, step):
        with np.load(path) as file:
            parts.append({name: file[name] for name in file.files})
    if not parts:
        return {}
    of_leaves = {name: parts[0][name] for name in ("leaf", "digest")}
    rows = {k: np.concatenate([part[k] for part in parts]) for k in parts[0] if k not in of_leaves}
    return rows | of_leaves


def _first_row(step: str, one: dict[str, np.ndarray], other: dict) -> Difference | None:
    starts = [np.concatenate([[0], np.cumsum(run["length"])]) for run in (one, other)]
    for row in range(min(len(one["length"]), len(other["length"]))):
        own = [slice(start[row], start[row + 1]) for start in starts]
        name = f"{row} (problem {_text(one['problem'][row])}, sample {one['sample'][row]})"
        if found := _first_token({k: (one[k][own[0]], other[k][own[1]]) for k in _OF_TOKENS}):
            token, quantity = found
            return Difference(step, name, token, quantity)
        for key in _OF_ROWS:
            a, b = one[key][row], other[key][row]
            if not _same(a, b):
                return Difference(step, name, None, f"{key}: {_text(a)} and {_text(b)}")
    if len(one["length"]) != len(other["length"]):
        counts = f"{len(one['length'])} and {len(other['length'])}"
        return Difference(step, None, None, f"number of rows: {counts}")
    return None


def _first_token(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> tuple[int, str] | None:
    """Where a row first differs, and in what; at one token, its id counts first."""
    n = min(len(x) for x in pairs["ids"])
    firsts = {}
    for key, (a, b) in pairs.items():
        differs = a[:n] != b[:n]
        if differs.any():
            firsts[key] = int(np.argmax(differs))
    if not firsts:
        return None
    token = min(firsts.values())
    key = next(k for k in pairs if firsts.get(k) == token)
    a, b = (x[token] for x in pairs[key])
    by = Author(int(pairs["author"][0][token])).name.lower()
    if key == "author":
        a, b = (Author(int(x)).name.lower() for x in (a, b))
    return token, f"{_OF_TOKENS[key]} (written by: {by}): {a} and {b}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
