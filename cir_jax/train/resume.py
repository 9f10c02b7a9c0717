"""Going on with a run: which of its configs' keys may differ, whose directory it is."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cir_jax import config as configs
from cir_jax import exits, hosts, metrics
from cir_jax.config import CheckpointConfig, Config, ConfigError, OptimConfig
from cir_jax.exits import RunError
from cir_jax.train.checkpoint import Place

# Until a directory that one process has made is seen by the others: file systems keep a while that
# there was none.
_SHARED_S = 30.0
# Keys that change no number of a step.
FREE = (
    *configs.UPKEEP,
    "mesh",
    "sandbox.num_workers",
    "sandbox.max_requests",
    "sandbox.runtime",
    "sandbox.record",
    "sandbox.replay",
    "sandbox.recheck_share",
    "reward.num_workers",
)


def check_config(cfg: Config, saved: dict[str, Any], place: Place) -> None:
    """ConfigError naming each key in which a run would go on otherwise than it began.

    saved: the config that it began with, as plain nested values.
    """
    free = [*FREE, *cfg.resume_override]
    if place.phase not in ("rl", "done") or _may_go_on(cfg):
        free.append("rl.steps")
    if "all" in cfg.resume_override:
        return
    differ = {
        key: values
        for key, values in configs.tree_differences(saved, configs.to_tree(cfg)).items()
        if not any(key == name or key.startswith(name + ".") for name in free)
    }
    if differ:
        named = "; ".join(f"{k}={new!r}, was {old!r}" for k, (old, new) in differ.items())
        keys = " ".join(f"--override {key}" for key in differ)
        raise ConfigError(
            f"resume=true: the run was made with another config: {named}; {keys} allows it"
        )


def _may_go_on(cfg: Config) -> bool:
    """Whether RL may end at another step: learning rates do not depend on how many there are."""
    optimizers: list[OptimConfig] = [cfg.rl.optim]
    if cfg.rl.advantage == "gae":
        optimizers.append(cfg.rl.critic.optim)
    return all(o.schedule == "constant" and not o.warmup_share for o in optimizers)


def check_keys(cfg: Config) -> None:
    """ConfigError for keys about resuming that mean nothing here."""
    for key in cfg.resume_override:
        if key != "all":
            configs.check_key("resume_override", key)
    if cfg.resume_step is not None and not cfg.resume:
        raise ConfigError(f"resume_step={cfg.resume_step}: only with resume=true")


def missing(run_dir: Path, sizes: Mapping[str, int]) -> str:
    """Which of a run's growing files are not there, or empty, though they were not at a checkpoint,
    in words: a run may go on on another machine."""
    names = [name for name, size in sizes.items() if size and not _size(run_dir / name)]
    return f"not in {run_dir}, and begun anew: {', '.join(names)}" if names else ""


def shorter(run_dir: Path, sizes: Mapping[str, int]) -> str:
    """Which of a run's growing files are shorter than they were at a checkpoint, in words.

    One that is not there at all does not count (see `missing`).
    """
    found = {name: _size(run_dir / name) for name in sizes}
    return "; ".join(
        f"{name} has {size} bytes, and had {sizes[name]} then"
        for name, size in found.items()
        if 0 < size < sizes[name]
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def score(cfg: CheckpointConfig, run_dir: Path, phase: str, step: int) -> float | None:
    """What checkpoint.best goes by, from the metrics as far as they are written."""
    if phase not in ("rl", "done") or not (run_dir / metrics.METRICS).exists():
        return None
    lines = metrics.read(run_dir)
    if cfg.best == "accuracy":
        found = [r["accuracy"] for r in lines if r["kind"] == "eval" and r["step"] == step]
        return found[-1] if found and lines[-1]["kind"] == "eval" else None
    rewards = [r["reward"] for r in lines if r["kind"] == "rl"][-cfg.every :]
    return sum(rewards) / len(rewards) if rewards else None


def check_may_begin(cfg: Config, run_dir: Path) -> None:
    """Of a run without a checkpoint: RunError if it has more steps than any has before its first.

    Then its checkpoints are elsewhere, and to begin anew would lose what there is of it.
    """
    steps = hosts.of_first("steps without a checkpoint", lambda: metrics.num_steps(run_dir))
    if steps > cfg.checkpoint.every * cfg.checkpoint.max_failures:
        raise RunError(
            f"{run_dir} has {steps} RL steps, but there is no checkpoint in "
            f"{cfg.checkpoint.dir or run_dir / 'checkpoints'}: if its store is not mounted, mount "
            "it; to begin anew, take another run_dir",
            exits.DATA,
        )


def find_run_dir(cfg: Config) -> Path:
    """run_dir, or the next (to resume: the newest) number under runs/NAME. Makes it."""
    parent = Path("runs") / cfg.name
    numbers = [int(p.name) for p in parent.glob("[0-9]*") if p.name.isdigit()]
    if cfg.run_dir:
        run_dir = Path(cfg.run_dir)
    else:
        run_dir = parent / f"{max(numbers, default=0) + (not (cfg.resume and numbers)):03d}"
    if configs.holds_run(run_dir) and not cfg.resume:
        raise ConfigError(
            f"run_dir={str(run_dir)!r}: holds a run; pass resume=true to go on with it"
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_dir


def agreed_run_dir(cfg: Config) -> Path:
    """As find_run_dir, one for all processes, which have to share it."""
    run_dir = Path(hosts.of_first("run directory", lambda: str(find_run_dir(cfg))))
    deadline = time.monotonic() + _SHARED_S
    while not run_dir.is_dir() and time.monotonic() < deadline:
        time.sleep(0.1)
    if blind := [i for i, sees in enumerate(hosts.exchange("sight", run_dir.is_dir())) if not sees]:
        raise ConfigError(
            f"run_dir={str(run_dir)!r}: process {blind[0]} does not see it; it must be on storage "
            "that all processes share"
        )
    return run_dir


@contextlib.contextmanager
def alone_in(run_dir: Path) -> Iterator[None]:
    """Holds a run directory for this run; ConfigError if another does. The kernel lets go of it
    when this process ends, however it does."""
    if not hosts.is_first():
        yield
        return
    folder = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"run_dir={str(run_dir)!r}: another process trains in it; it must have ended"
            ) from None
        yield
    finally:
        os.close(folder)
