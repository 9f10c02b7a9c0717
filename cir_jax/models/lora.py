"""Low-rank adapters as parts of the parameter tree: `q_lora_a`, `q_lora_b` beside `q`.

Source: LoRA, arXiv:2106.09685.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cir_jax.config import LoRAConfig, ModelConfig

# Suffixes of the weight's name: W + alpha / rank A B is used.
A, B = "_lora_a", "_lora_b"

Tree = dict[str, Any]


def split(params: Tree, cfg: ModelConfig) -> tuple[Tree, Tree]:
    """What is trained, and what is not: with adapters they alone are trained, else everything.

    Two trees of the same shape that hold different leaves; `join` is the inverse.
    """
    if cfg.lora is None:
        return params, {}
    return _only(params, True), _only(params, False)


def _only(tree: Tree, adapters: bool) -> Tree:
    out = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            if inner := _only(value, adapters):
                out[name] = inner
        elif name.endswith((A, B)) == adapters:
            out[name] = value
    return out


def join(trained: Tree, frozen: Tree) -> Tree:
    both = trained.keys() & frozen.keys()
    return frozen | trained | {name: join(trained[name], frozen[name]) for name in both}


def merge(params: Tree, cfg: ModelConfig) -> tuple[Tree, ModelConfig]:
    """The parameters of a model without adapters that computes the same, and that model."""
    if cfg.lora is None:
        return params, cfg
    return _merged(params, cfg.lora), cfg.model_copy(update={"lora": None})


def _merged(tree: Tree, cfg: LoRAConfig) -> Tree:
    out = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out[name] = _merged(value, cfg)
        elif name + A in tree:
            update = _product(tree[name + A], tree[name + B]) * (cfg.alpha / cfg.rank)
            out[name] = (value + update).astype(value.dtype)
        elif not name.endswith((A, B)):
            out[name] = value
    return out


@jax.vmap
def _product(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """[in..., rank] x [rank, out...], layer by layer."""
    return jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1)
