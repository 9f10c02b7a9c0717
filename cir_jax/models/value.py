"""The value head of PPO's critic: one number per token from the hidden states.

A critic is a model with tied embeddings (no head of its own is needed) and this head beside it.
Source: PPO, arXiv:1707.06347, section 5; a linear head on a language model, arXiv:2203.02155.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cir_jax.config import ModelConfig

Params = dict[str, Float[Array, "..."]]

# Logical axes of each parameter: too small to share.
AXES = {"weight": (None,), "bias": ()}


def init(cfg: ModelConfig, key: jax.Array) -> Params:
    """Random weight of scale 1 / (D + 1), so that first values are near 0; no bias."""
    scale = 1 / (cfg.width + 1)
    return {
        "weight": jax.random.normal(key, (cfg.width,), jnp.float32) * scale,
        "bias": jnp.zeros((), jnp.float32),
    }


def values(params: Params, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """The value before each token's successor is drawn, float32."""
    return (
        jnp.einsum("BTD,D->BT", hidden_BTD.astype(jnp.float32), params["weight"]) + params["bias"]
    )
