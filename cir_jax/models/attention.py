"""Grouped-query attention: of packed rows by the back end that a platform runs best, and of
tokens that continue a cache."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

from cir_jax import mesh as meshes
from cir_jax.config import ComputeConfig
from cir_jax.models.cache import Cache

# What remat policies know the packed attention's result by.
RESULT = "attention"
# The score of keys that a query does not see: exp of it is 0, and so is its difference to itself.
_UNSEEN = -1e30
# Splash attention's tiles are square, of at most this many positions, and of a multiple of LANES.
MAX_BLOCK = 1024
LANES = 128


def backend(compute: ComputeConfig) -> str:
    """xla, splash or cudnn: the one that the config names, or the best for the mesh's devices."""
    if compute.attention != "auto":
        return compute.attention
    if meshes.platform() == "tpu":
        return "splash"
    # cuDNN's kernels have no float32.
    return "cudnn" if meshes.platform() == "gpu" and compute.dtype == "bfloat16" else "xla"


def attend_packed(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"],
    backend: str,
) -> Float[Array, "B T N H"]:
    """Causal attention within each segment of packed rows; N/K query heads share a key head.

    A segment is a run of equal ids; padding is one too. backend: a key of BACKENDS.
    """
    out = BACKENDS[backend](q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    return checkpoint_name(out, RESULT)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    mask_BTS: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """softmax(q k^T / sqrt(H)) v, in float32; N/K query heads share a key/value head.

    A query that may see no key gets the mean of all values (it is padding, and is masked later).
    """
    B, T, N, H = q_BTNH.shape
    K, S = k_BKSH.shape[1:3]
    R = N // K
    # One product per key/value head: the queries that share it lie one after the other.
    q_BKRTH = q_BTNH.reshape(B, T, K, R, H).transpose(0, 2, 3, 1, 4)
    q_BKQH = q_BKRTH.reshape(B, K, R * T, H)
    scores = jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k_BKSH, preferred_element_type=jnp.float32)
    scores = scores.reshape(B, K, R, T, S) * H**-0.5
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype).reshape(B, K, R * T, S)
    out_BKQH = jnp.einsum("BKQS,BKSH->BKQH", weights, v_BKSH)
    return out_BKQH.reshape(B, K, R, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def attend_cached(
    q_BTNH: Float[Array, "B T N H"],
    cache: Cache,
    layer: Int[Array, ""],
    rows_B: Int[Array, " B"] | None,
    positions_BT: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """A query at position p attends to the cache's entries 0..p of its row.

    Block by block up to the longest row's, with a running maximum and sum. Blocks beyond a row's
    own end change nothing, not even by rounding: its numbers do not depend on its neighbours.
    Positions outside the cache are padding's, whose results mean nothing.
    Source: arXiv:1805.02867, algorithm 3; FlashAttention, arXiv:2205.14135, algorithm 1.
    """
    B, T, N, H = q_BTNH.shape
    K = cache.shape[2]
    q_BKRTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    last = jnp.max(jnp.where(positions_BT < cache.length, positions_BT, 0))
    scales = cache.scales(layer, rows_B)

    def scaled(x_BKRTS, which, number):
        """What is multiplied with stored vectors, by their scales: cheaper than the vectors."""
        if scales is None:
            return x_BKRTS
        start = number * cache.block
        scale_BKS = jax.lax.dynamic_slice_in_dim(scales[which], start, cache.block, axis=2)
        return x_BKRTS * scale_BKS[:, :, None, None]

    def block(number, carry):
        top, total, sums = carry
        k_BKSH, v_BKSH = (x.astype(q_BTNH.dtype) for x in cache.read(layer, rows_B, number))
        scores = jnp.einsum(
            "BKRTH,BKSH->BKRTS", q_BKRTH, k_BKSH, preferred_element_type=jnp.float32
        )
        # Of the scores' shape, for a TPU makes a small array in as long a time as these.
        at = number * cache.block + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 4)
        scores = scaled(scores * H**-0.5, 0, number)
        scores = jnp.where(at <= positions_BT[:, None, None, :, None], scores, _UNSEEN)
        # Each row sees the first position, so that what it does not see weighs nothing.
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - new_top)
        added_total = jnp.sum(weights, axis=-1, keepdims=True)
        weights = scaled(weights, 1, number).astype(v_BKSH.dtype)
        # Stored: v5p, which has no room for scores in VMEM, would read them twice.
        weights, added_total = jax.lax.optimization_barrier((weights, added_total))
        added = jnp.einsum("BKRTS,BKSH->BKRTH", weights, v_BKSH, preferred_element_type=jnp.float32)
        before = jnp.exp(top - new_top)
        return new_top, total * before + added_total, sums * before + added

    shape = (B, K, N // K, T)
    start = (
        jnp.full((*shape, 1), _UNSEEN),
        jnp.zeros((*shape, 1)),
        jnp.zeros((*shape, H)),
    )
    _, total, sums = jax.lax.fori_loop(0, last // cache.block + 1, block, start)
    out_BKRTH = (sums / total).astype(q_BTNH.dtype)
    return out_BKRTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def packed_mask(segment_ids_BT: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Causal within each segment of a packed row."""
    T = segment_ids_BT.shape[1]
    same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    return same & jnp.tri(T, dtype=bool)[None]


def _xla(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    return attend(q_BTNH, k_BKTH, v_BKTH, packed_mask(segment_ids_BT))


def _cudnn(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    """cuDNN's flash attention, which has no float32."""
    mask_B1TS = packed_mask(segment_ids_BT)[:, None]
    return jax.nn.dot_product_attention(
        q_BTNH, k_BTKH, v_BTKH, mask=mask_B1TS, implementation="cudnn"
    )


def _splash(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT):
    """Pallas splash attention; interpreted, and so very slow, where there is no TPU.

    Heads are shared over the mesh axis `tensor`, rows over the others.
    """
    T = q_BTNH.shape[1]
    pad = (0, -T % LANES)
    q_BTNH, k_BTKH, v_BTKH = (
        jnp.pad(x, ((0, 0), pad, (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), pad), constant_values=-1)
    heads, rows = ("batch", "heads", "length", "head_dim"), ("batch", "length")
    kv_heads = ("batch", "kv_heads", "length", "head_dim")
    kernel = meshes.over_auto(_splash_local, (heads, kv_heads, kv_heads, rows), heads)
    q_BNTH, k_BKTH, v_BKTH = (x.swapaxes(1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
    out_BNTH = kernel(q_BNTH * q_BNTH.shape[-1] ** -0.5, k_BKTH, v_BKTH, segment_ids_BT)
    return out_BNTH.swapaxes(1, 2)[:, :T]


def _splash_local(q_BNTH, k_BKTH, v_BKTH, segment_ids_BT):
    _, N, T, _ = q_BNTH.shape
    block = max(b for b in range(LANES, MAX_BLOCK + 1, LANES) if T % b == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv")
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([splash.CausalMask((T, T))] * N),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=True),
        residual_checkpoint_name=RESULT,
        interpret=meshes.platform() != "tpu",
    )
    segments = splash.SegmentIds(segment_ids_BT, segment_ids_BT)
    return jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments)


BACKENDS = {"xla": _xla, "splash": _splash, "cudnn": _cudnn}
