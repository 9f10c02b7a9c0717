"""Trains the runs of an ablation that are not there yet."""

from collections.abc import Mapping
from pathlib import Path

from cir_jax import config as configs
from cir_jax import metrics
from cir_jax.ablation import report
from cir_jax.config import Config, ConfigError
from cir_jax.train.display import Display
from cir_jax.train.loop import STAGES, train


def run_all(runs: Mapping[tuple[str, int], Config], out: Path) -> str:
    """One after the other, with the report written anew after each. Returns its table.

    runs: by strategy that is off, and seed. Raises as `train` does, and ConfigError where a
    directory holds a run of another config.
    """
    display = Display()
    table = ""
    for number, cfg in enumerate(runs.values(), start=1):
        run_dir = Path(cfg.run_dir)
        is_there = configs.holds_run(run_dir)
        if is_there:
            _check_same(cfg, run_dir)
        if not (is_there and _has_ended(run_dir)):
            display.note(f"run {number} of {len(runs)}")
            train(cfg.model_copy(update={"resume": is_there}), display)
        table = report.write(_ended(runs), cfg.ablate, out)
    return table


def _has_ended(run_dir: Path) -> bool:
    if not (run_dir / metrics.METRICS).exists():
        return False
    return any(row.get("stage") == STAGES["done"] for row in metrics.read(run_dir))


def _ended(runs: Mapping[tuple[str, int], Config]) -> report.Results:
    results: dict[str, dict[int, dict]] = {}
    for (name, seed), cfg in runs.items():
        run_dir = Path(cfg.run_dir)
        if configs.holds_run(run_dir) and _has_ended(run_dir):
            results.setdefault(name, {})[seed] = report.figures_of(run_dir)
    return results


def _check_same(cfg: Config, run_dir: Path) -> None:
    held = configs.load_run(run_dir)
    for key, (there, here) in configs.differences(held, cfg).items():
        if key != "resume":
            raise ConfigError(
                f"{run_dir}: holds a run with {key}={there}, here it is {here}; "
                "--out names another directory"
            )
