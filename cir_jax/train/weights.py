"""Weights without a run: brought in, written out again, and what a run starts from.

A directory of weights is a Hugging Face one. One made by import_hf is complete in itself (config,
tokenizer and generation files too), its tensors are those of the model and of one type.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cir_jax.config import ModelConfig
from cir_jax.models import hf, lora, qwen
from cir_jax.models.hf_config import read_config
from cir_jax.models.hf_directory import fetch, write_aside


def import_hf(source: str, out: Path, dtype: str) -> None:
    """Writes the weights of a directory or hub id as a directory, all of one type.

    Raises ValueError naming what is wrong with the source, or if `out` has contents.
    """
    # Refused before anything is downloaded and read.
    with write_aside(out) as aside:
        hf.convert(fetch(source), aside, jnp.dtype(dtype))


def export_hf(directory: Path, out: Path) -> None:
    """Writes the weights of a directory as a directory, bit by bit; errors as in import_hf."""
    with write_aside(out) as aside:
        hf.convert(directory, aside, None)


def load(directory: Path, cfg: ModelConfig, mesh: Mesh, seed: int) -> qwen.Params:
    """Float32 parameters of a directory, with fresh adapters (by the seed) if the model has some.

    Raises ValueError naming what does not fit the model.
    """
    stored = read_config(directory)
    for field in ModelConfig.model_fields:
        ours, theirs = getattr(cfg, field), getattr(stored, field)
        # These change what is computed, or what is added, not what is stored.
        if ours != theirs and field not in ("max_positions", "yarn", "lora"):
            raise ValueError(f"{directory}: {field}={theirs}, but model.{field}={ours}")
    params = hf.load(directory, cfg.model_copy(update={"lora": None}), mesh)
    if cfg.lora is None:
        return params
    shardings, _ = lora.split(qwen.param_shardings(cfg, mesh), cfg)
    adapters = jax.jit(lambda key: lora.split(qwen.init(cfg, key), cfg)[0], out_shardings=shardings)
    return lora.join(adapters(jax.random.key(seed)), params)
