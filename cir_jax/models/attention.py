"""Grouped-query attention behind one function."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v, in float32; N/K query heads share a key/value head.

    A query that may see no key gets the mean of all values (it is padding, and is masked later).
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKRH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKRH,BSKH->BKRTS", q_BTKRH, k_BSKH, preferred_element_type=jnp.float32)
    scores = jnp.where(mask_BTS[:, None, None], scores * H**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKRTS,BSKH->BTKRH", weights, v_BSKH).reshape(B, T, N, H)


def packed_mask(
    positions_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"]
) -> Bool[Array, "B T T"]:
    """Causal within each segment of a packed row; segment 0 is padding."""
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    causal = positions_BT[:, :, None] >= positions_BT[:, None, :]
    return same & causal & (segment_ids_BT > 0)[:, :, None]


def cache_mask(positions_BT: Int[Array, "B T"], cache_length: int) -> Bool[Array, "B T S"]:
    """A query at position p sees the cache's entries 0..p."""
    return jnp.arange(cache_length)[None, None, :] <= positions_BT[:, :, None]
