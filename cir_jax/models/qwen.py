"""Qwen2.5 and Qwen3 dense decoders, layers stacked on a leading axis and scanned.

Modules declare each parameter with its logical axes; everything outside sees plain nested
dicts (`layers/attn/q: [L, D, N, H]`). To decode, queries, keys and values are one product
(`layers/attn/qkv: [L, D, K, (N/K + 2) H]`), and on a CPU each layer has arrays of its own, with a
weight's outputs first (`layers/0/attn/o: [D, N, H]`): see `for_decoding`.
Source: Qwen2.5 technical report, arXiv:2412.15115; Qwen3, arXiv:2505.09388.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from cir_jax import mesh as meshes
from cir_jax.config import ComputeConfig, ModelConfig, YarnConfig
from cir_jax.mesh import constrain
from cir_jax.models import attention, lora
from cir_jax.models.cache import Cache
from cir_jax.models.logprob import times_columns

Params = dict[str, Any]

# Plain float32, which everything else is compared with.
REFERENCE = ComputeConfig(dtype="float32", remat="none", attention="xla")

_policies = jax.checkpoint_policies


def _all_but_weights(primitive: Any, *_, **__) -> bool:
    """Keeps everything that is not quickly had again: no casts, no layer's gathered weights."""
    return primitive.name not in ("convert_element_type", "all_gather")


# What the backward pass finds of a layer's forward pass, beside the layer's input.
_KEPT = {
    "none": _all_but_weights,
    "minimal": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(attention.RESULT),
    ),
    "full": _policies.nothing_saveable,
}


def _normal(key: jax.Array, shape: tuple[int, ...], fan_in: int, *axes: str | None) -> nnx.Param:
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) * fan_in**-0.5, axes=axes)


def _zeros(shape: tuple[int, ...], *axes: str | None) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes)


def _weight(param: nnx.Param, dtype: jnp.dtype) -> Array:
    """The whole of a layer's parameter, in the type it is used in."""
    return meshes.gather(param[...], param.get_metadata("axes"), dtype)


class RMSNorm(nnx.Module):
    """x * rsqrt(mean(x^2) + eps) * scale, in float32. Source: arXiv:1910.07467."""

    def __init__(self, size: int, eps: float):
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=(None,))
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
    """Where the tokens of a call stand: rotary angles, and what each may attend to."""

    cos: Float[Array, "B T 1 H2"]
    sin: Float[Array, "B T 1 H2"]
    # Of packed rows.
    segment_ids_BT: Int[Array, "B T"] | None = None
    # Of tokens that continue a cache.
    positions_BT: Int[Array, "B T"] | None = None
    rows_B: Int[Array, " B"] | None = None
    rows_BT: Int[Array, "B T"] | None = None


# Of each weight, the leading axes that are summed over.
_NUM_IN = {"q": 1, "k": 1, "v": 1, "qkv": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


class _Projections(nnx.Module):
    """Linear maps by name: a weight [in..., out...], maybe with bias and low-rank adapter.

    out_first: the weights are [out..., in...] instead.
    """

    def __init__(self, cfg: ModelConfig, out_first: bool):
        self.cfg = cfg
        self.out_first = out_first

    def add(self, name: str, weight: nnx.Param, key: jax.Array) -> None:
        """An adapter's A starts random, its B at zero, so that nothing changes at first. Its rank
        is too small to share: both lie as the weight's other axes do.
        Source: LoRA, arXiv:2106.09685, section 4.1.
        """
        num_in = _NUM_IN[name]
        if self.out_first:
            axes = weight.get_metadata("axes")
            weight = nnx.Param(_out_first(weight[...], num_in), axes=axes[num_in:] + axes[:num_in])
        setattr(self, name, weight)
        adapter = self.cfg.lora
        if adapter is None or name not in adapter.targets:
            return
        shape, axes, rank = weight.shape, weight.get_metadata("axes"), adapter.rank
        into, out = shape[:num_in], shape[num_in:]
        fan_in = math.prod(into)
        setattr(self, name + lora.A, _normal(key, (*into, rank), fan_in, *axes[:num_in], None))
        setattr(self, name + lora.B, _zeros((rank, *out), None, *axes[num_in:]))

    def project(self, name: str, x: Array) -> Array:
        num_in = _NUM_IN[name]

        def times(x: Array, param: nnx.Param, num_in: int) -> Array:
            return jnp.tensordot(x, _weight(param, x.dtype), num_in)

        if self.out_first:
            y = _times_out_first(x, _weight(getattr(self, name), x.dtype), num_in)
        else:
            y = times(x, getattr(self, name), num_in)
        if hasattr(self, name + lora.A):
            low = times(x, getattr(self, name + lora.A), num_in)
            scale = self.cfg.lora.alpha / self.cfg.lora.rank
            y += times(low, getattr(self, name + lora.B), 1) * scale
        if hasattr(self, name + "_bias"):
            # Its rank is raised by hand: implicit rank promotion is an error in the tests.
            y += _weight(getattr(self, name + "_bias"), x.dtype)[None, None]
        return y


def _out_first(w: Array, num_in: int) -> Array:
    return w.transpose(*range(num_in, w.ndim), *range(num_in))


def _times_out_first(x: Array, w: Array, num_in: int) -> Array:
    """[B, T, in...] by [out..., in...]."""
    out = w.shape[: w.ndim - num_in]
    size = math.prod(w.shape[w.ndim - num_in :])
    columns = x.reshape(-1, size).T
    return times_columns(w.reshape(-1, size), columns, x.dtype).T.reshape(*x.shape[:2], *out)


class Attention(_Projections):
    """joined: what makes queries, keys and values is one array, by key heads: of each its queries,
    its key, its value."""

    def __init__(self, cfg: ModelConfig, key: jax.Array, out_first: bool, joined: bool):
        D, N, K, H = cfg.width, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        key_q, key_k, key_v, key_o, *keys = jax.random.split(key, 8)
        super().__init__(cfg, out_first)
        self.joined = joined
        wide, narrow = ("heads", "head_dim"), ("kv_heads", "head_dim")
        if joined:
            group, all_three = (K, (N // K + 2) * H), ("kv_heads", None)
            self.add("qkv", _normal(key_q, (D, *group), D, "embed", *all_three), keys[0])
        else:
            self.add("q", _normal(key_q, (D, N, H), D, "embed", *wide), keys[0])
            self.add("k", _normal(key_k, (D, K, H), D, "embed", *narrow), keys[1])
            self.add("v", _normal(key_v, (D, K, H), D, "embed", *narrow), keys[2])
        o = _normal(key_o, (N, H, D), N * H, "heads", "head_dim", "embed")
        self.add("o", o, keys[3])
        if cfg.qkv_bias and joined:
            self.qkv_bias = _zeros(group, *all_three)
        elif cfg.qkv_bias:
            self.q_bias = _zeros((N, H), *wide)
            self.k_bias = _zeros((K, H), *narrow)
            self.v_bias = _zeros((K, H), *narrow)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(H, cfg.norm_eps)
            self.k_norm = RMSNorm(H, cfg.norm_eps)

    def __call__(self, x_BTD, where: _Where, cache: Cache | None, layer, backend: str):
        cfg = self.cfg
        q, k, v = self._queries_keys_values(x_BTD)
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, where.cos, where.sin), rotate(k, where.cos, where.sin)
        q = constrain(q, "batch", "length", "heads", "head_dim")
        if cache is None:
            out = attention.attend_packed(q, k, v, where.segment_ids_BT, backend)
        else:
            cache = cache.write(layer, where.rows_BT, where.positions_BT, k, v)
            out = attention.attend_cached(q, cache, layer, where.rows_B, where.positions_BT)
        return self.project("o", out), cache

    def _queries_keys_values(self, x_BTD):
        if not self.joined:
            return (self.project(name, x_BTD) for name in "qkv")
        N, H = self.cfg.num_heads, self.cfg.head_dim
        x_BTKG = self.project("qkv", x_BTD)
        q, k, v = jnp.split(x_BTKG, (x_BTKG.shape[-1] - 2 * H, x_BTKG.shape[-1] - H), axis=-1)
        return q.reshape(*x_BTD.shape[:2], N, H), k, v


class MLP(_Projections):
    """down(silu(gate x) * up x). Source: SwiGLU, arXiv:2002.05202."""

    def __init__(self, cfg: ModelConfig, key: jax.Array, out_first: bool):
        D, F = cfg.width, cfg.mlp_width
        key_gate, key_up, key_down, *keys = jax.random.split(key, 6)
        super().__init__(cfg, out_first)
        self.add("gate", _normal(key_gate, (D, F), D, "embed", "mlp"), keys[0])
        self.add("up", _normal(key_up, (D, F), D, "embed", "mlp"), keys[1])
        self.add("down", _normal(key_down, (F, D), F, "mlp", "embed"), keys[2])

    def __call__(self, x_BTD):
        gate, up = (self.project(name, x_BTD) for name in ("gate", "up"))
        hidden = constrain(jax.nn.silu(gate) * up, "batch", "length", "mlp")
        return self.project("down", hidden)


class Block(nnx.Module):
    def __init__(self, cfg: ModelConfig, key: jax.Array, out_first: bool, joined: bool):
        key_attn, key_mlp = jax.random.split(key)
        self.attn_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.attn = Attention(cfg, key_attn, out_first, joined)
        self.mlp_norm = RMSNorm(cfg.width, cfg.norm_eps)
        self.mlp = MLP(cfg, key_mlp, out_first)

    def __call__(self, x_BTD, where: _Where, cache: Cache | None, layer, backend: str):
        out, cache = self.attn(self.attn_norm(x_BTD), where, cache, layer, backend)
        x_BTD = constrain(x_BTD + out, "batch", "length", None)
        x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return constrain(x_BTD, "batch", "length", None), cache


class Qwen(nnx.Module):
    """stacked: the layers' parameters in one tree; or else a list of trees, outputs first. joined:
    see `Attention`."""

    def __init__(
        self, cfg: ModelConfig, key: jax.Array, *, stacked: bool = True, joined: bool = False
    ):
        key_embed, key_layers, key_head = jax.random.split(key, 3)
        V, D = cfg.vocab_size, cfg.width
        # The embedding's scale is Qwen's initializer_range, 0.02, not a fan-in.
        self.embed = _normal(key_embed, (V, D), 2500, "vocab", "embed")
        keys = jax.random.split(key_layers, cfg.num_layers)
        if stacked:
            self.layers = jax.vmap(lambda k: Block(cfg, k, False, joined))(keys)
        else:
            self.layers = nnx.List([Block(cfg, k, True, joined) for k in keys])
        self.final_norm = RMSNorm(D, cfg.norm_eps)
        if not cfg.tied_embeddings:
            self.head = _normal(key_head, (V, D), D, "vocab", "embed")

    def __call__(self, ids_BT, where: _Where, cache: Cache | None, compute: ComputeConfig):
        backend = attention.backend(compute)
        x_BTD = constrain(self._embed(ids_BT, jnp.dtype(compute.dtype)), "batch", "length", None)

        def block(carry, layer_block):
            x_BTD, cache, layer = carry
            x_BTD, cache = layer_block(x_BTD, where, cache, layer, backend)
            return (x_BTD, cache, layer + 1), None

        # The cache travels in the carry: as scanned inputs and outputs it would exist twice.
        carry = (x_BTD, cache, jnp.int32(0))
        if isinstance(self.layers, nnx.List):
            for layer_block in self.layers:
                carry, _ = block(carry, layer_block)
        else:
            if cache is None:
                block = jax.checkpoint(block, policy=_KEPT[compute.remat], prevent_cse=False)
            carry, _ = jax.lax.scan(block, carry, self.layers)
        x_BTD, cache, _ = carry
        return self.final_norm(x_BTD), cache

    def _embed(self, ids_BT, dtype):
        """Where the table's columns are shared, each device looks up its part for all."""
        table = self.embed[...]
        if meshes.num_shards() == 1 or "embed" not in self.embed.get_metadata("axes"):
            return table.at[ids_BT].get(mode="clip").astype(dtype)
        ids_SBT = jax.lax.all_gather(ids_BT, "fsdp")
        part_SBTD = table.at[ids_SBT].get(mode="clip").astype(dtype)
        whole = jax.lax.all_to_all(part_SBTD, "fsdp", split_axis=0, concat_axis=3, tiled=True)
        return whole[0]


@functools.lru_cache
def _graph(cfg: ModelConfig, *, stacked: bool = True, joined: bool = False, whole: bool = False):
    """whole: no device shares the axis `embed` of a parameter with others."""
    model = nnx.eval_shape(lambda: Qwen(cfg, jax.random.key(0), stacked=stacked, joined=joined))
    graph, state = nnx.split(model)
    if not whole:
        return graph, state

    def without_embed(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata("axes")
        return variable.copy(axes=tuple(None if axis == "embed" else axis for axis in axes))

    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return nnx.split(nnx.merge(graph, jax.tree.map(without_embed, state, is_leaf=is_variable)))


def _form(params: Params) -> dict[str, bool]:
    """How the layers lie in a tree: see `Qwen`."""
    stacked = "attn" in params["layers"]
    attn = (params["layers"] if stacked else params["layers"][0])["attn"]
    return {"stacked": stacked, "joined": "qkv" in attn}


def init(cfg: ModelConfig, key: jax.Array) -> Params:
    """Random parameters, float32, as a plain nested dict."""
    return nnx.to_pure_dict(nnx.split(Qwen(cfg, key))[1])


def abstract_params(cfg: ModelConfig) -> Params:
    """Shapes and types of the parameters, nothing allocated."""
    return nnx.to_pure_dict(_graph(cfg)[1])


def param_axes(cfg: ModelConfig) -> Params:
    """Logical axes of each parameter, in the tree of `init`."""
    return _axes(_graph(cfg)[1], stacked=True)


def decoding_axes(params: Params, cfg: ModelConfig) -> Params:
    """The same of parameters that `for_decoding` made: rows are shared, no parameter over them."""
    form = _form(params)
    return _axes(_graph(cfg, **form, whole=True)[1], form["stacked"])


def _axes(state: Any, stacked: bool) -> Params:
    def axes(path, variable: nnx.Variable):
        first = ("layers",) if stacked and path[0].key == "layers" else ()
        return first + variable.get_metadata("axes")

    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    return nnx.to_pure_dict(jax.tree_util.tree_map_with_path(axes, state, is_leaf=is_variable))


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
    compute: ComputeConfig = REFERENCE,
) -> Float[Array, "B T D"]:
    """Normed hidden states of packed rows, in the type of `compute`.

    A segment is a run of tokens with equal id, which attend to each other and to no others;
    padding is one too. Positions, which count from 0 in each segment, set the rotary angles.
    """
    model = nnx.merge(_graph(cfg)[0], nnx.State(params))
    cos, sin = rope_tables(positions_BT, cfg.head_dim, cfg.rope_theta, cfg.yarn)
    return model(ids_BT, _Where(cos, sin, segment_ids_BT), None, compute)[0]


def forward_cached(
    params: Params,
    cfg: ModelConfig,
    ids_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    cache: Cache,
    rows_B: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B T D"], Cache]:
    """The same for tokens that continue cached rows; their keys and values are stored.

    Computes in the type of the parameters, as `for_decoding` makes them.

    rows_B: the cache's rows that the B rows of tokens belong to; None: all, in order.
    A token whose position or row lies outside the cache is padding: nothing is stored for it.
    """
    graph, _ = _graph(cfg, **_form(params), whole=True)
    model = nnx.merge(graph, nnx.State(params))
    B, T = ids_BT.shape
    rows = jnp.arange(B) if rows_B is None else rows_B
    rows_BT = jnp.broadcast_to(rows[:, None], (B, T))
    cos, sin = rope_tables(positions_BT, cfg.head_dim, cfg.rope_theta, cfg.yarn)
    where = _Where(cos, sin, None, positions_BT, rows_B, rows_BT)
    compute = REFERENCE.model_copy(update={"dtype": params["embed"].dtype.name})
    return model(ids_BT, where, cache, compute)


def for_decoding(params: Params, cfg: ModelConfig, dtype: str) -> tuple[Params, ModelConfig]:
    """Parameters in the type that decoding computes in, adapters merged, and their model.

    The norms' scales stay float32, as they are used in training. Devices share them by heads,
    MLP and vocabulary alone, not by rows. Queries, keys and values are one product, as small ones
    take longer than their bytes. On a CPU each layer has arrays of its own, since to take
    a layer out of a stack would copy it at every step, and outputs first, as products with few
    columns are fast there.
    """
    params, cfg = lora.merge(params, cfg)

    def cast(path, x: Array) -> Array:
        return x if path[-1].key == "scale" else x.astype(dtype)

    def laid_out(axes: Params, params: Params) -> Params:
        return jax.tree.map(
            lambda axes, x: meshes.constrain(x, *axes), axes, params, is_leaf=meshes.is_axes
        )

    params = jax.tree_util.tree_map_with_path(cast, params)
    # First with the rows' devices sharing them: from a mesh without `tensor` right to the last
    # layout, XLA would gather all of a parameter everywhere.
    params = laid_out(param_axes(cfg), params)
    # Then as they will lie: what is joined there stays where it is.
    params = laid_out(decoding_axes(params, cfg), params)
    params = params | {"layers": _with_joined(params["layers"])}
    if meshes.platform() == "cpu":
        params = params | {"layers": _listed(params["layers"], cfg.num_layers)}
    return laid_out(decoding_axes(params, cfg), params), cfg


def _with_joined(stack: Params) -> Params:
    """Of each key head its queries' part, its key's and its value's."""

    def joined(q, k, v):
        return jnp.concatenate([q.reshape(*k.shape[:-1], -1), k, v], axis=-1)

    attn = dict(stack["attn"])
    for end in ("", "_bias"):
        if "q" + end in attn:
            attn["qkv" + end] = joined(*(attn.pop(name + end) for name in "qkv"))
    return stack | {"attn": attn}


def _listed(stack: Params, num_layers: int) -> dict[int, Params]:
    def of_layer(i: int, path, x_L: Array) -> Array:
        name = path[-1].key
        return _out_first(x_L[i], _NUM_IN[name]) if name in _NUM_IN else x_L[i]

    return {
        i: jax.tree_util.tree_map_with_path(functools.partial(of_layer, i), stack)
        for i in range(num_layers)
    }


def head_table(params: Params) -> Float[Array, "V D"]:
    """The output head's table: its own, or the embedding's where they are tied."""
    return params["head"] if "head" in params else params["embed"]
