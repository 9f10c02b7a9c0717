"""Weights alone, without a run: imported from Hugging Face, kept by orbax.

A directory of imported weights holds `config.json` (the model), `params/` (orbax) and
`tokenizer/` (tokenizer and generation files, ready for a config's `tokenizer` key).
"""

import contextlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax.config import CONFIG_FILE, PARAMS_DIR, MeshConfig, ModelConfig
from cir_jax.models import hf, qwen

TOKENIZER = "tokenizer"


def import_hf(source: str, out: Path, dtype: str) -> None:
    """Writes a Hugging Face directory's or hub id's weights as a directory of imported weights.

    Raises ValueError naming what is wrong with the source, or if `out` has contents.
    """
    # Refused before anything is downloaded and read.
    with hf.write_aside(out) as aside:
        directory = hf.fetch(source)
        cfg = hf.read_config(directory)
        params = hf.load(directory, cfg, _all_devices(), jnp.dtype(dtype))
        with contextlib.closing(_checkpointer(cfg)) as checkpointer:
            checkpointer.save((aside / PARAMS_DIR).absolute(), args=ocp.args.PyTreeSave(params))
        (aside / CONFIG_FILE).write_text(json.dumps(cfg.model_dump(), indent=1) + "\n")
        (aside / TOKENIZER).mkdir()
        hf.copy_companions(directory, aside / TOKENIZER)


def export_hf(directory: Path, out: Path) -> None:
    """Imported weights as a Hugging Face directory, bit by bit what they were imported as."""
    cfg = _model(directory)
    hf.export(_restore(directory, cfg, _all_devices(), None), cfg, out, directory / TOKENIZER)


def load(directory: Path, cfg: ModelConfig, mesh: Mesh) -> qwen.Params:
    """Float32 parameters of a Hugging Face directory or of imported weights.

    Raises ValueError naming what does not fit the model.
    """
    if not configs.holds_weights(directory):
        return hf.load(directory, cfg, mesh)
    stored = _model(directory)
    for field in ModelConfig.model_fields:
        ours, theirs = getattr(cfg, field), getattr(stored, field)
        # These two change what is computed, not what is stored.
        if ours != theirs and field not in ("max_positions", "yarn"):
            raise ValueError(f"{directory}: {field}={theirs}, but model.{field}={ours}")
    return _restore(directory, cfg, mesh, jnp.dtype(jnp.float32))


def _model(directory: Path) -> ModelConfig:
    return ModelConfig.model_validate_json((directory / CONFIG_FILE).read_text(encoding="utf-8"))


def _restore(directory: Path, cfg: ModelConfig, mesh: Mesh, dtype: jnp.dtype | None) -> qwen.Params:
    """dtype: of the result; None: as stored."""
    path = (directory / PARAMS_DIR).absolute()
    with contextlib.closing(_checkpointer(cfg)) as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
        target = jax.tree.map(
            lambda x, s, m: jax.ShapeDtypeStruct(x.shape, dtype or m.dtype, sharding=s),
            qwen.abstract_params(cfg),
            qwen.param_shardings(cfg, mesh),
            stored,
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        return checkpointer.restore(
            path, args=ocp.args.PyTreeRestore(target, restore_args=restore_args)
        )


def _checkpointer(cfg: ModelConfig) -> ocp.Checkpointer:
    """Moves no more between devices and disk at a time than about one stacked parameter."""
    leaves = jax.tree.leaves(qwen.abstract_params(cfg))
    limit = 1 + max(x.size * x.dtype.itemsize for x in leaves) // 2**30
    return ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(
            save_concurrent_gb=limit,
            restore_concurrent_gb=limit,
            save_device_host_concurrent_gb=limit,
        )
    )


def _all_devices() -> Mesh:
    return meshes.make_mesh(MeshConfig(fsdp=jax.device_count()))
