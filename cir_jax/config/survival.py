"""A run's config: what is saved, and what happens when something goes wrong."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field

from cir_jax.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Section


class CheckpointConfig(Section):
    """Saved training states."""

    dir: str = ""
    """Directory of the checkpoints, a path or gs://BUCKET/PATH; empty: checkpoints in the run
    directory."""
    every: PositiveInt = 10
    """Steps between two saves (CIR: 10)."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_best: NonNegativeInt = 1
    """Best ones kept besides, by `best`."""
    best: Literal["reward", "accuracy"] = "reward"
    """Mean reward of the last `every` RL steps, or the held-out accuracy where one was measured."""
    max_failures: PositiveInt = 3
    """Saves in a row that may fail before the run ends (exit code 74); the last save of a run is
    tried so often."""

    @pydantic.field_validator("dir")
    @classmethod
    def _is_path(cls, value: str) -> str:
        scheme, colon, rest = value.partition("://")
        if colon and (scheme != "gs" or not rest.strip("/")):
            raise ValueError("must be a path, or gs://BUCKET/PATH")
        return value


GateAction = Literal["warn", "pause", "stop"]


class GatesConfig(Section):
    """When a step's numbers are not what they should be: warn says so, pause saves the step and
    ends the run, stop ends it without (exit code 76)."""

    sampler_kl: PositiveFloat = 0.1
    """Divergence of sampler and trainer (metric sampler_kl) above which `on_mismatch` applies."""
    on_mismatch: GateAction = "warn"
    """What to do then."""
    skipped_steps: PositiveInt = 3
    """RL steps in a row without any update, as no gradient was finite, after which `on_skipped`
    applies; single ones are skipped, counted (metric skipped) and said."""
    on_skipped: GateAction = "stop"
    """What to do then."""


class WatchdogConfig(Section):
    """Looks whether a step, or an evaluation, takes too long."""

    factor: Annotated[float, Field(gt=1)] = 10.0
    """Multiple of the median step's seconds after which the stacks of all threads are printed, and
    again whenever the time has doubled."""
    min_s: PositiveFloat = 60.0
    """Seconds that have to pass besides; before there is a median, ten times as many."""
    limit_s: PositiveFloat = 14400.0
    """Seconds after which the process ends (exit code 75: the same command goes on). Above
    rollout.step_timeout_s and reward.step_timeout_s, which end only what they are about."""
