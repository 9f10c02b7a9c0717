"""Weights that a golden batch is checked with."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax.config import ConfigError, MeshConfig, ModelConfig
from cir_jax.config.errors import missing_file
from cir_jax.models import hf, qwen
from cir_jax.models.hf_config import read_config
from cir_jax.parity.quantities import Weights
from cir_jax.train.loop import newest_params


@contextlib.contextmanager
def load_weights(policy: str | None, reference: str | None) -> Iterator[Weights | None]:
    """Of directories of weights or runs, over all devices, which are set for what is within.

    None if both are. Raises ConfigError if one holds neither, or both are not of one shape.
    """
    if policy is None and reference is None:
        yield None
        return
    mesh = meshes.make_mesh(MeshConfig(fsdp=jax.device_count()))
    with jax.set_mesh(mesh):
        found = [
            _load(name, key, mesh)
            for name, key in ((policy, "--model"), (reference, "--reference"))
        ]
        models = {model for model, _ in found if model is not None}
        if len(models) > 1:
            raise ConfigError(f"--reference {reference}: its shape is not that of --model {policy}")
        (model,) = models
        yield Weights(mesh, model, found[0][1], found[1][1])


def _load(name: str | None, key: str, mesh: Mesh) -> tuple[ModelConfig | None, qwen.Params | None]:
    if name is None:
        return None, None
    path = configs.asset_dir(name)
    if not path.is_dir():
        raise ConfigError(missing_file(key, Path(path)))
    if configs.holds_weights(path):
        model = read_config(path)
        return model, hf.load(path, model, mesh)
    if not configs.holds_run(path):
        raise ConfigError(f"{key} {name}: holds neither a run nor weights")
    cfg = configs.load_run(path)
    if cfg.model.lora is not None:
        raise ConfigError(f"{key} {name}: has adapters; export-hf merges them")
    return cfg.model, newest_params(cfg, path, mesh)
