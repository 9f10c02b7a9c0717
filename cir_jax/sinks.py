"""Copies of a run's metrics in TensorBoard's event files and in Weights & Biases.

metrics.jsonl and timings.jsonl are the truth. A sink is given all of their lines when a run begins
or goes on, and then the new ones: so it has each line once, whatever was written after the
checkpoint that the run goes on from, and a run that had no sink before has all its lines in it.
"""

import importlib.util
import json
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from cir_jax import config as configs
from cir_jax.config import Config, ConfigError, MetricsConfig

# The key of a line of timings.jsonl that says when it was written, seconds since 1970.
WRITTEN = "unix_s"

TENSORBOARD, WANDB, WANDB_ID = "tensorboard", "wandb", "wandb_id.json"
# Of each sink, the package that it needs and that the extra of its name brings.
_PACKAGES = {TENSORBOARD: "tensorboardX", WANDB: "wandb"}
# What a line is about, besides figures.
_HEAD = ("kind", "step", "stage")


class Sink(Protocol):
    """write: line `number`, from 0, of metrics.jsonl, and the line of timings.jsonl beside it."""

    def write(self, number: int, line: dict[str, Any], timings: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def check(cfg: MetricsConfig) -> None:
    """Raises ConfigError if a package is missing."""
    for name in cfg.sinks:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ConfigError(
                f"metrics.sinks={list(cfg.sinks)}: {name!r} needs the package {_PACKAGES[name]}: "
                f"pip install 'cir_jax[{name}]'"
            )


def open_sinks(cfg: Config, run_dir: Path) -> list[Sink]:
    """Those of the config, empty: they have to be given the lines that there are already."""
    return [_SINKS[name](cfg, run_dir) for name in cfg.metrics.sinks]


def figures(line: dict[str, Any], timings: dict[str, Any]) -> dict[str, float]:
    """The numbers of both lines by name: KIND/FIGURE, eval/STAGE/FIGURE, KIND_timings/SECONDS."""
    stage = line.get("stage")
    group = line["kind"] if stage is None else f"{line['kind']}/{stage}"
    named = {f"{group}/{k}": v for k, v in line.items() if k not in _HEAD}
    named |= {
        f"{line['kind']}_timings/{k}": v for k, v in timings.items() if k not in (*_HEAD, WRITTEN)
    }
    return {name: float(v) for name, v in named.items() if isinstance(v, int | float)}


class _TensorBoard:
    def __init__(self, cfg: Config, run_dir: Path):
        from tensorboardX import SummaryWriter

        folder = run_dir / TENSORBOARD
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._writer = SummaryWriter(str(folder))

    def write(self, number: int, line: dict[str, Any], timings: dict[str, Any]) -> None:
        for name, value in figures(line, timings).items():
            self._writer.add_scalar(name, value, line["step"], walltime=timings.get(WRITTEN))

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One run of Weights & Biases for a run directory; its steps are the numbers of lines."""

    def __init__(self, cfg: Config, run_dir: Path):
        import wandb

        is_online = cfg.metrics.mode == "online"
        if not is_online:
            # This sink is given all lines anew.
            for folder in (run_dir / WANDB).glob("offline-run-*"):
                shutil.rmtree(folder)
        settings = {"console": "off", "silent": True, "disable_git": True, "save_code": False}
        try:
            self._run = wandb.init(
                project=cfg.metrics.project,
                name="/".join(run_dir.resolve().parts[-2:]),
                id=_id(run_dir / WANDB_ID),
                dir=str(run_dir),
                mode=cfg.metrics.mode,
                resume="allow" if is_online else None,
                config=configs.to_tree(cfg),
                settings=wandb.Settings(**settings),
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(f"metrics.sinks=['wandb']: {error}") from error
        # The service has those before it: of a run that goes on, from an earlier time.
        self._first = self._run.step
        self._kinds: set[str] = set()

    def write(self, number: int, line: dict[str, Any], timings: dict[str, Any]) -> None:
        if number < self._first:
            return
        kind = line["kind"]
        axis = f"{kind}/step"
        if kind not in self._kinds:
            self._kinds.add(kind)
            self._run.define_metric(axis, hidden=True)
            for group in (kind, f"{kind}_timings"):
                self._run.define_metric(f"{group}/*", step_metric=axis)
        self._run.log(figures(line, timings) | {axis: line["step"]}, step=number)

    def close(self) -> None:
        self._run.finish()


def _id(path: Path) -> str:
    """The name of the run for Weights & Biases, which stays when the run goes on."""
    if not path.exists():
        path.write_text(json.dumps({"id": secrets.token_hex(4)}) + "\n", encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))["id"]


_SINKS: dict[str, Callable[[Config, Path], Sink]] = {TENSORBOARD: _TensorBoard, WANDB: _Wandb}
