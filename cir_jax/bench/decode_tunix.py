"""The contender of `bench decode` that trains in JAX too: Tunix's Sampler.

Imports nothing of this package that needs more than the standard library: Tunix lives in an
environment of its own.
"""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType
from tunix.generate.sampler import CacheConfig, Sampler

from cir_jax.bench.ceiling import seconds
from cir_jax.bench.contest import Figures, serve

_CLASSES = {"qwen2": "Qwen2", "qwen3": "Qwen3"}
# No token's id: nothing is padding, and nothing ends a row before its last token.
_NO_ID = -1


class _Numbers:
    """A tokenizer of texts that are ids in decimal."""

    def encode(self, text: str) -> list[int]:
        return [int(number) for number in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        """None is put before a prompt."""

    def eos_id(self) -> int:
        return _NO_ID

    def pad_id(self) -> int:
        return _NO_ID


def start(
    *,
    config: dict[str, Any],
    directory: str,
    slots: int,
    prompt: int,
    new: int,
    dtype: str,
    top_p: float,
) -> Callable[[], Figures]:
    """config: a config.json; directory: of the weights, "" for random ones."""
    model = _model(config, directory, dtype)
    cache = CacheConfig(
        cache_size=prompt + new,
        num_layers=config["num_hidden_layers"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
    )
    sampler = Sampler(model, _Numbers(), cache)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (slots, prompt))
    texts = [" ".join(map(str, row)) for row in ids]

    def generate() -> None:
        out = sampler(
            texts,
            max_generation_steps=new,
            max_prompt_length=prompt,
            temperature=1.0,
            top_p=top_p,
            seed=0,
        )
        lengths = {len(tokens) for tokens in out.tokens}
        if lengths != {new}:
            raise RuntimeError(f"rows of {lengths} new tokens")

    return lambda: {"seconds": seconds(generate)}


def _model(config: dict[str, Any], directory: str, dtype: str) -> nnx.Module:
    if "rope_scaling" in config:
        raise ValueError("rope_scaling: not supported by Tunix")
    kind = config["model_type"]
    module = importlib.import_module(f"tunix.models.{kind}.model")
    cfg = module.ModelConfig(
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        embed_dim=config["hidden_size"],
        hidden_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        num_kv_heads=config["num_key_value_heads"],
        rope_theta=config["rope_theta"],
        norm_eps=config["rms_norm_eps"],
        use_tied_embedding=config["tie_word_embeddings"],
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(dtype),
    )
    if directory:
        loader = importlib.import_module(f"tunix.models.{kind}.params")
        mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
        return loader.create_model_from_safe_tensors(directory, cfg, mesh, jnp.dtype(dtype))
    return getattr(module, _CLASSES[kind])(cfg, rngs=nnx.Rngs(params=0))


if __name__ == "__main__":
    serve(start)
