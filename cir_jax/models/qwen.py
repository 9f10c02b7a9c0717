"""Qwen2.5 and Qwen3 dense decoders, layers stacked on a leading axis and scanned.

Modules declare each parameter with its logical axes; everything outside sees plain nested
dicts (`layers/attn/q: [L, D, N, H]`).
Source: Qwen2.5 technical report, arXiv:2412.15115; Qwen3, arXiv:2505.09388.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from cir_jax import mesh as meshes
from cir_jax.config import ModelConfig, YarnConfig
from cir_jax.mesh import constrain
from cir_jax.models.attention import attend, cache_mask, packed_mask
from cir_jax.models.cache import Cache

Params = dict[str, Any]


def _normal(key: jax.Array, shape: tuple[int, ...], fan_in: int, *axes: str) -> nnx.Param:
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5, axes=axes)


def _zeros(shape: tuple[int, ...], *axes: str) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


class RMSNorm(nnx.Module):
    """x * rsqrt(mean(x^2) + eps) * scale, in float32. Source: arXiv:1910.07467."""

    def __init__(self, size: int, eps: float, axis: str):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=(axis,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.eps)
        # The scale's rank is raised by hand: implicit rank promotion is an error in the tests.
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (normed * scale).astype(x.dtype)


def rope_frequencies(
    head_dim: int, theta: float, yarn: YarnConfig | None
) -> tuple[Float[Array, " H2"], float]:
    """Radians per position of each pair i, theta^(-2i/H), and the factor on cos and sin.

    With YaRN, pairs that turn fewer than beta_slow times within original_length turn `factor`
    times slower, those of more than beta_fast turns stay, with a linear ramp between.
    The ramp is linear in i, and its ends are rounded outwards to whole pairs if `truncate`, as in
    transformers (and the authors' code); the paper's is linear in the number of turns.
    Source: RoFormer, arXiv:2104.09864, eq. 15; YaRN, arXiv:2309.00071, sections 3.2 and 3.4.
    """
    plain = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if yarn is None:
        return plain, 1.0

    def pair_of(turns: float) -> float:
        """The pair, as a real number, that turns this often within original_length."""
        length = yarn.original_length / (2 * math.pi * turns)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low, high = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001  # a step where the ends meet
    stretched = jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / width, 0, 1)
    scale = yarn.attention_factor or 0.1 * math.log(yarn.factor) + 1
    return plain * (1 - stretched) + plain / yarn.factor * stretched, scale


def rope_tables(
    positions_BT: Int[Array, "B T"], head_dim: int, theta: float, yarn: YarnConfig | None
) -> tuple[Float[Array, "B T 1 H2"], Float[Array, "B T 1 H2"]]:
    """cos and sin of position * frequency."""
    frequencies, scale = rope_frequencies(head_dim, theta, yarn)
    angles = positions_BT.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x_BTNH: Float[Array, "B T N H"],
    cos: Float[Array, "B T 1 H2"],
    sin: Float[Array, "B T 1 H2"],
) -> Float[Array, "B T N H"]:
    """Rotates the pairs (i, i + H/2), Hugging Face's order."""
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


class _Where(NamedTuple):
    """Where the tokens of a call stand: rotary angles, attention mask, cache addresses."""

    cos: Float[Array, "B T 1 H2"]
    sin: Float[Array, "B T 1 H2"]
    mask_BTS: Bool[Array, "B T S"]
    positions_BT: Int[Array, "B T"]
    rows_B: Int[Array, " B"] | None = None
    rows_BT: Int[Array, "B T"] | None = None


class Attention(nnx.Module):
    def __init__(self, cfg: ModelConfig, key: jax.Array):
        D, N, K, H = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        key_q, key_k, key_v, key_o = jax.random.split(key, 4)
        self.cfg = cfg
        self.q = _normal(key_q, (D, N, H), D, "embed", "heads", "head_dim")
        self.k = _normal(key_k, (D, K, H), D, "embed", "kv_heads", "head_dim")
        self.v = _normal(key_v, (D, K, H), D, "embed", "kv_heads", "head_dim")
        self.o = _normal(key_o, (N, H, D), N * H, "heads", "head_dim", "embed")
        if cfg.qkv_bias:
            self.q_bias = _zeros((N, H), "heads", "head_dim")
            self.k_bias = _zeros((K, H), "kv_heads", "head_dim")
            self.v_bias = _zeros((K, H), "kv_heads", "head_dim")
        if cfg.qk_norm:
            self.q_norm = RMSNorm(H, cfg.norm_eps, "head_dim")
            self.k_norm = RMSNorm(H, cfg.norm_eps, "head_dim")

    def __call__(self, x_BTD, where: _Where, cache: Cache | None, layer):
        cfg = self.cfg
        q = jnp.einsum("BTD,DNH->BTNH", x_BTD, self.q[...].astype(x_BTD.dtype))
        k = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.k[...].astype(x_BTD.dtype))
        v = jnp.einsum("BTD,DKH->BTKH", x_BTD, self.v[...].astype(x_BTD.dtype))
        if cfg.qkv_bias:
            q, k, v = (
                a + b[...].astype(a.dtype)[None, None]
                for a, b in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            )
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, where.cos, where.sin), rotate(k, where.cos, where.sin)
        q = constrain(q, "batch", "length", "heads", "head_dim")
        if cache is not None:
            cache = cache.write(layer, where.rows_BT, where.positions_BT, k, v)
            k, v = cache.read(layer, where.rows_B)
            k, v = k.astype(q.dtype), v.astype(q.dtype)
        out = attend(q, k, v, where.mask_BTS)
        return jnp.einsum("BTNH,NHD->BTD", out, self.o[...].astype(out.dtype)), cache


class MLP(nnx.Module):
    """down(silu(gate x) * up x). Source: SwiGLU, arXiv:2002.05202."""

    def __init__(self, cfg: ModelConfig, key: jax.Array):
        D, F = cfg.width, cfg.mlp_width
        key_gate, key_up, key_down = jax.random.split(key, 3)
        self.gate = _normal(key_gate, (D, F), D, "embed", "mlp")
        self.up = _normal(key_up, (D, F), D, "embed", "mlp")
        self.down = _normal(key_down, (F, D), F, "mlp", "embed")

    def __call__(self, x_BTD):
        gate, up, down = (w[...].astype(x_BTD.dtype) for w in (self.gate, self.up, self.down))
        hidden = jax.nn.silu(x_BTD @ gate) * (x_BTD @ up)
        return constrain(hidden, "batch", "length", "mlp") @ down


class Block(nnx.Module):
    def __init__(self, cfg: ModelConfig, key: jax.Array):
        key_attn, key_mlp = jax.random.split(key)
        self.attn_norm = RMSNorm(cfg.width, cfg.norm_eps, "embed")
        self.attn = Attention(cfg, key_attn)
        self.mlp_norm = RMSNorm(cfg.width, cfg.norm_eps, "embed")
        self.mlp = MLP(cfg, key_mlp)

    def __call__(self, x_BTD, where: _Where, cache: Cache | None, layer):
        out, cache = self.attn(self.attn_norm(x_BTD), where, cache, layer)
        x_BTD = constrain(x_BTD + out, "batch", "length", None)
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return constrain(x_BTD, "batch", "length", None), cache


class Qwen(nnx.Module):
    def __init__(self, cfg: ModelConfig, key: jax.Array):
        key_embed, key_layers, key_head = jax.random.split(key, 3)
        V, D = cfg.vocab_size, cfg.width
        # The embedding's scale is Qwen's initializer_range, 0.02, not a fan-in.
        self.embed = _normal(key_embed, (V, D), 2500, "vocab", "embed")
        keys = jax.random.split(key_layers, cfg.num_layers)
        self.layers = jax.vmap(lambda k: Block(cfg, k))(keys)
        self.final_norm = RMSNorm(D, cfg.norm_eps, "embed")
        if not cfg.tied_embeddings:
            self.head = _normal(key_head, (V, D), D, "vocab", "embed")

    def __call__(self, ids_BT, where: _Where, cache: Cache | None, dtype):
        x_BTD = self.embed[...].astype(dtype).at[ids_BT].get(mode="clip")
        x_BTD = constrain(x_BTD, "batch", "length", None)

        def block(carry, layer_block):
            x_BTD, cache, layer = carry
            x_BTD, cache = layer_block(x_BTD, where, cache, layer)
            return (x_BTD, cache, layer + 1), None

        # The cache travels in the carry: as scanned inputs and outputs it would exist twice.
        (x_BTD, cache, _), _ = jax.lax.scan(block, (x_BTD, cache, jnp.int32(0)), self.layers)
        return self.final_norm(x_BTD), cache


@functools.lru_cache
def _graph(cfg: ModelConfig):
    return nnx.split(nnx.eval_shape(lambda: Qwen(cfg, jax.random.key(0))))


def init(cfg: ModelConfig, key: jax.Array) -> Params:
    """Random parameters, float32, as a plain nested dict."""
    return nnx.to_pure_dict(nnx.split(Qwen(cfg, key))[1])


def abstract_params(cfg: ModelConfig) -> Params:
    """Shapes and types of the parameters, nothing allocated."""
    return nnx.to_pure_dict(_graph(cfg)[1])


def param_axes(cfg: ModelConfig) -> Params:
    """Logical axes of each parameter, in the tree of `init`."""

    def axes(path, variable: nnx.Variable):
        stacked = path[0].key == "layers"
        return (("layers",) if stacked else ()) + variable.get_metadata("axes")

    return nnx.to_pure_dict(
        jax.tree_util.tree_map_with_path(
            axes, _graph(cfg)[1], is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
    )


def param_shardings(cfg: ModelConfig, mesh: Mesh) -> Params:
    """NamedSharding of each parameter, in the tree of `init`."""
    return jax.tree.map(
        lambda axes: meshes.sharding(mesh, *axes),
        param_axes(cfg),
        is_leaf=lambda x: isinstance(x, tuple),
    )


def forward(
    params: Params,
    cfg: ModelConfig,
    ids_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    dtype=jnp.float32,
) -> Float[Array, "B T D"]:
    """Normed hidden states of packed rows; tokens attend within their segment (0: padding)."""
    model = nnx.merge(_graph(cfg)[0], nnx.State(params))
    cos, sin = rope_tables(positions_BT, cfg.head_dim, cfg.rope_theta, cfg.yarn)
    where = _Where(cos, sin, packed_mask(positions_BT, segment_ids_BT), positions_BT)
    return model(ids_BT, where, None, dtype)[0]


def forward_cached(
    params: Params,
    cfg: ModelConfig,
    ids_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    cache: Cache,
    rows_B: Int[Array, " B"] | None = None,
    dtype=jnp.float32,
) -> tuple[Float[Array, "B T D"], Cache]:
    """The same for tokens that continue cached rows; their keys and values are stored.

    rows_B: the cache's rows that the B rows of tokens belong to; None: all, in order.
    A token whose position or row lies outside the cache is padding: nothing is stored for it.
    """
    model = nnx.merge(_graph(cfg)[0], nnx.State(params))
    B, T = ids_BT.shape
    rows = jnp.arange(B) if rows_B is None else rows_B
    rows_BT = jnp.broadcast_to(rows[:, None], (B, T))
    cos, sin = rope_tables(positions_BT, cfg.head_dim, cfg.rope_theta, cfg.yarn)
    mask_BTS = cache_mask(positions_BT, cache.length)
    where = _Where(cos, sin, mask_BTS, positions_BT, rows_B, rows_BT)
    return model(ids_BT, where, cache, dtype)


def head_table(params: Params) -> Float[Array, "V D"]:
    """The output head's table: its own, or the embedding's where they are tied."""
    return params["head"] if "head" in params else params["embed"]
