"""The vocabulary head: logits of a few tokens, log-probabilities of many."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def logits(hidden_BD: Float[Array, "B D"], table_VD: Float[Array, "V D"]) -> Float[Array, "B V"]:
    """Float32 logits."""
    return jnp.einsum(
        "BD,VD->BV", hidden_BD, table_VD.astype(hidden_BD.dtype), preferred_element_type=jnp.float32
    )


def token_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V D"],
    targets_BT: Int[Array, "B T"],
    temperature: Float[Array, ""] | float,
    chunk: int = 1024,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target and entropy, of softmax(logits / temperature), float32.

    Tokens go through the head `chunk` at a time, forward and backward, so that no array of
    all tokens x vocabulary exists.
    """
    B, T, D = hidden_BTD.shape
    pad = -(B * T) % chunk
    hidden = jnp.pad(hidden_BTD.reshape(B * T, D), ((0, pad), (0, 0))).reshape(-1, chunk, D)
    targets = jnp.pad(targets_BT.reshape(B * T), (0, pad)).reshape(-1, chunk)

    @jax.checkpoint
    def one_chunk(_, inputs):
        hidden_CD, targets_C = inputs
        logp_CV = jax.nn.log_softmax(logits(hidden_CD, table_VD) / temperature, axis=-1)
        logp_C = jnp.take_along_axis(logp_CV, targets_C[:, None], axis=-1)[:, 0]
        return None, (logp_C, -jnp.sum(jnp.exp(logp_CV) * logp_CV, axis=-1))

    _, (logp, entropy) = jax.lax.scan(one_chunk, None, (hidden, targets))
    return logp.reshape(-1)[: B * T].reshape(B, T), entropy.reshape(-1)[: B * T].reshape(B, T)
