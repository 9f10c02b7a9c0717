"""What MODEL of `cir-jax chat` is: a run, or a directory of weights, and what comes with it."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from cir_jax import config as configs
from cir_jax.config import ConfigError, DataConfig, ModelConfig, RolloutConfig, SandboxConfig
from cir_jax.config.errors import missing_file
from cir_jax.models import hf, qwen
from cir_jax.models.hf_config import read_config
from cir_jax.train.loop import newest_params

# Programs per answer of a model that says nothing about it (CIR's evaluation).
_MAX_CALLS = 5


@dataclasses.dataclass(frozen=True)
class Source:
    """A model, and the settings that an answer has where the command line gives none.

    template: of a question's text. may_chat: the tokenizer's chat template goes around that, if
    it has one. load: reads the parameters; ValueError or OSError if they cannot be.
    """

    model: ModelConfig
    rollout: RolloutConfig
    sandbox: SandboxConfig
    max_calls: int
    dtype: str
    tokenizer: Path
    template: str
    chat_template: str
    may_chat: bool
    load: Callable[[Mesh], qwen.Params]


def find_source(name: str) -> Source:
    """A run's is used as its evaluation does, its kind of prompts included.

    Raises ConfigError if there is no such directory or nothing in it, ValueError if its files
    are damaged.
    """
    path = configs.asset_dir(name)
    if not path.is_dir():
        raise ConfigError(missing_file("MODEL", path))
    if configs.holds_weights(path):
        model = read_config(path)
        return Source(
            model=model,
            rollout=RolloutConfig(),
            sandbox=SandboxConfig(),
            max_calls=_MAX_CALLS,
            dtype="float32",
            tokenizer=path,
            template=DataConfig.model_fields["template"].default,
            chat_template="{question}",
            may_chat=True,
            load=lambda mesh: hf.load(path, model, mesh),
        )
    if not configs.holds_run(path):
        raise ConfigError(f"MODEL={name!r}: holds neither a run nor weights")
    cfg = configs.load_run(path)
    return Source(
        model=cfg.model,
        rollout=cfg.rollout,
        sandbox=cfg.sandbox,
        max_calls=configs.eval_max_calls(cfg),
        dtype=cfg.compute.dtype,
        tokenizer=configs.asset_dir(cfg.tokenizer),
        template=cfg.data.template,
        chat_template=cfg.data.template,
        may_chat=cfg.data.chat,
        load=lambda mesh: newest_params(cfg, path, mesh),
    )
