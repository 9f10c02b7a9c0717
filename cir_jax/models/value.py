"""The value head of PPO's critic: one number per token from the hidden states.

A critic is a model with tied embeddings (no head of its own is needed) and this head beside it,
under the key "value" of its parameters.
Source: PPO, arXiv:1707.06347, section 5; a linear head on a language model, arXiv:2203.02155.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from cir_jax import mesh as meshes
from cir_jax.config import ComputeConfig, ModelConfig
from cir_jax.models import lora, qwen

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


# --- the critic: a model and this head, with the same functions of its tree as the model's


def critic_model(cfg: ModelConfig) -> ModelConfig:
    """The model within the critic of a policy."""
    return cfg.model_copy(update={"tied_embeddings": True, "lora": None})


def critic(policy: qwen.Params, cfg: ModelConfig, key: jax.Array) -> qwen.Params:
    """A critic's first parameters: the policy's, adapters merged, and a fresh head."""
    params, _ = lora.merge(policy, cfg)
    return {k: v for k, v in params.items() if k != "head"} | {"value": init(cfg, key)}


def forward(
    params: qwen.Params,
    cfg: ModelConfig,
    ids_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    compute: ComputeConfig,
) -> Float[Array, "B T"]:
    """Values of packed rows, each before its token's successor is drawn."""
    model = {k: v for k, v in params.items() if k != "value"}
    hidden = qwen.forward(model, cfg, ids_BT, positions_BT, segment_ids_BT, compute)
    return values(params["value"], hidden)


def abstract_params(cfg: ModelConfig) -> qwen.Params:
    head = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    return qwen.abstract_params(cfg) | {"value": head}


def param_axes(cfg: ModelConfig) -> qwen.Params:
    return qwen.param_axes(cfg) | {"value": AXES}


def param_shardings(cfg: ModelConfig, mesh: Mesh) -> qwen.Params:
    head = {name: meshes.sharding(mesh, *axes) for name, axes in AXES.items()}
    return qwen.param_shardings(cfg, mesh) | {"value": head}
