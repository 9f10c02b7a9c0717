"""The section of a config that says where metrics go besides the run directory."""

from typing import Literal

import pydantic

from cir_jax.config.base import Section


class MetricsConfig(Section):
    """Copies of the metrics, beside metrics.jsonl, for other programs to show."""

    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """tensorboard: event files in the run directory; wandb: Weights & Biases. Each needs the extra
    of its name: pip install 'cir_jax[wandb]'."""
    project: str = "cir_jax"
    """Project of Weights & Biases that the run belongs to."""
    mode: Literal["offline", "online"] = "offline"
    """Weights & Biases: offline keeps its files in the run directory, for `wandb sync`; online
    sends them to the service, whose key `wandb login` asks for."""

    @pydantic.field_validator("sinks", mode="before")
    @classmethod
    def _one_sink(cls, value):
        return (value,) if isinstance(value, str) else value

    @pydantic.field_validator("sinks")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("must name each at most once")
        return value

    @pydantic.field_validator("project")
    @classmethod
    def _named(cls, value: str) -> str:
        if not value.strip() or set(value) & set("/\\#?%:"):
            raise ValueError("must be a name without / \\ # ? % :")
        return value
