"""The six strategies of CIR, and how each is switched off.

Source: CIR, arXiv:2505.24480, on stabilising training.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cir_jax import config as configs
from cir_jax.config import Config, ConfigError, most_calls

ALL_ON = "all_on"


class Strategy(NamedTuple):
    """title: what the figure calls a run without it. off: the keys that switch it off."""

    title: str
    off: Callable[[Config], dict[str, Any]]


# KL and entropy with the weights that veRL's scripts use. The budget is fixed at what it would
# come to in training, so that all runs end with the same.
STRATEGIES = {
    ALL_ON: Strategy("all six", lambda cfg: {}),
    "stop_word": Strategy(
        "stop word, not the fence", lambda cfg: {"rollout.boundary": "stop_word"}
    ),
    "tool_tokens": Strategy("tool output trained on", lambda cfg: {"rl.train_tool_tokens": True}),
    "entropy_bonus": Strategy("entropy bonus 0.001", lambda cfg: {"rl.entropy_coef": 0.001}),
    "fixed_budget": Strategy(
        "fixed budget",
        lambda cfg: {
            "rollout.max_calls": most_calls(cfg.rollout),
            "rollout.raise_calls_above": None,
        },
    ),
    "kl": Strategy("KL 0.001", lambda cfg: {"rl.kl_coef": 0.001}),
    "symmetric_clip": Strategy("symmetric clip", lambda cfg: {"rl.clip_high": cfg.rl.clip_low}),
}


def without(cfg: Config, name: str, seed: int, run_dir: Path) -> Config:
    """The config of a run with this strategy off, and with what `ablate` of the config adds.

    Raises ConfigError where the strategy is off already, or there would be nothing to compare.
    """
    for key, value in (("rl.steps", cfg.rl.steps), ("eval.num_problems", cfg.eval.num_problems)):
        if not value:
            raise ConfigError(f"{key}=0: must be above 0, to compare runs")
    unknown = sorted(set(cfg.ablate) - set(STRATEGIES))
    if unknown:
        raise ConfigError(f"ablate.{unknown[0]}: no strategy; there are {', '.join(STRATEGIES)}")
    off = STRATEGIES[name].off(cfg)
    run = configs.with_values(cfg, off)
    if off and run == cfg:
        key, value = next(iter(off.items()))
        raise ConfigError(f"ablate: {key}={value}: {name} is off in the config itself")
    more = {"seed": seed, "run_dir": str(run_dir), "resume": False}
    return configs.with_values(run, cfg.ablate.get(name, {}) | more)
