"""The vocabulary head: logits of a few tokens; log-probabilities and losses of many.

Many tokens go through the head a chunk at a time, forward and backward, so that no array of
tokens x vocabulary exists. Where every device runs on its own rows (`mesh.over_rows`), each holds
the logits of all their chunks for its part of the vocabulary: the table is never gathered.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cir_jax import mesh as meshes

# Entries of the largest array of logits, about: 256 MiB in float32.
_MAX_LOGITS = 2**26
_MAX_CHUNK = 4096
# The score of entries that are no tokens: far below any, and finite in all that is made of it.
_OUTSIDE = -1e30

# Sums over tokens; where a name ends in _max, the largest, of numbers not below 0.
Metrics = dict[str, Float[Array, ""]]
# (logp_C, entropy_C, args) -> loss, a sum over tokens, and metrics; args: arrays [C] or scalars.
LossFn = Callable[[Float[Array, " C"], Float[Array, " C"], Any], tuple[Float[Array, ""], Metrics]]


def combine(total: Callable, largest: Callable, *metrics: dict[str, Array]) -> dict[str, Array]:
    """Metrics of a whole from those of its parts, by what sums and what takes the largest."""
    return {
        name: (largest if name.endswith("_max") else total)(*(part[name] for part in metrics))
        for name in metrics[0]
    }


def logits(hidden_BD: Float[Array, "B D"], table_VD: Float[Array, "V D"]) -> Float[Array, "B V"]:
    """Float32 logits."""
    return jnp.einsum(
        "BD,VD->BV", hidden_BD, table_VD.astype(hidden_BD.dtype), preferred_element_type=jnp.float32
    )


def step_logits(
    hidden_BD: Float[Array, "B D"], table_VD: Float[Array, "V D"]
) -> Float[Array, "V B"]:
    """The same of a decode step's few tokens, vocabulary first: the table is read as it lies."""
    return times_columns(table_VD.astype(hidden_BD.dtype), hidden_BD.T, jnp.dtype("float32"))


def times_columns(
    w_OI: Float[Array, "O I"], x_IB: Float[Array, "I B"], dtype: jnp.dtype
) -> Float[Array, "O B"]:
    """The product with few columns, in a type, of columns that lie so in memory.

    Else XLA would fold what is transposed before or after into the product: on a CPU that takes
    up to twice the time.
    """
    product = jnp.matmul(w_OI, jax.lax.optimization_barrier(x_IB), preferred_element_type=dtype)
    return jax.lax.optimization_barrier(product)


def token_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V Ds"],
    targets_BT: Int[Array, "B T"],
    temperature: Float[Array, ""] | float,
    chunk: int | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each target and entropy, of softmax(logits / temperature), float32.

    table_VD: the device's shard of it, Ds columns of D, where each runs on its own rows.

    chunk: tokens that go through the head at a time; None: by the vocabulary's size.
    Differentiable by hidden and table. The backward pass computes the logits again, a chunk at a
    time; a loss that is a sum over tokens is cheaper by `token_loss`.
    """
    shape = targets_BT.shape
    head, chunks = _prepare(hidden_BTD, table_VD, targets_BT, {}, temperature, chunk)
    logp, entropy = _logprobs(head, chunks.hidden, chunks.targets, table_VD.shape[0])
    count = targets_BT.size
    return logp.reshape(-1)[:count].reshape(shape), entropy.reshape(-1)[:count].reshape(shape)


def token_loss(
    loss_fn: LossFn,
    hidden_BTD: Float[Array, "B T D"],
    table_VD: Float[Array, "V Ds"],
    targets_BT: Int[Array, "B T"],
    args: Any,
    temperature: Float[Array, ""] | float,
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Loss and metrics that are sums (metrics also maxima) over tokens of functions of
    log-probability and entropy.

    args: what loss_fn is given beside them, a pytree of arrays [B, T], scalars as they are.
    Padding of the last chunk has args of 0, for which loss_fn must return 0. Only the loss has
    a gradient, by hidden and table; it is computed in the forward pass, chunk by chunk, where
    the logits are at hand: three products of the head's size, not four.
    Source: the idea of Liger Kernel's fused linear cross-entropy, arXiv:2410.10989, section 3.2.
    """
    head, chunks = _prepare(hidden_BTD, table_VD, targets_BT, args, temperature, chunk)
    return _loss(loss_fn, head, chunks, table_VD.shape[0])


class _Head(NamedTuple):
    """This device's part of the table, in the type it is used in."""

    table: Float[Array, "Vs D"]
    temperature: Float[Array, ""]


class _Chunks(NamedTuple):
    """This device's tokens. args: arrays [chunks, C]; scalars are there, too, once per chunk."""

    hidden: Float[Array, "chunks C D"]
    targets: Int[Array, "chunks C"]
    args: Any


def _prepare(hidden_BTD, table_VD, targets_BT, args, temperature, chunk) -> tuple[_Head, _Chunks]:
    count, V = targets_BT.size, table_VD.shape[0]
    if chunk is None:
        chunk = 2 ** round(np.log2(_MAX_LOGITS / V))
        chunk = min(max(chunk, 1), _MAX_CHUNK, 2 ** int(np.ceil(np.log2(count))))
    pad = -count % chunk

    def split(x: Array) -> Array:
        if jnp.ndim(x) == 0:
            return jnp.broadcast_to(x, ((count + pad) // chunk,))
        x = x.reshape(count, *x.shape[2:])
        x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(-1, chunk, *x.shape[1:])

    head = _Head(_own_vocabulary(table_VD, hidden_BTD.dtype), jnp.float32(temperature))
    return head, _Chunks(split(hidden_BTD), split(targets_BT), jax.tree.map(split, args))


# --- one chunk; with several shards of the vocabulary, of all devices that share it


def _own_vocabulary(table_VD: Array, dtype: jnp.dtype) -> Float[Array, "Vs D"]:
    """Rows of the table for the part of the vocabulary that this device computes logits of.

    At rest the table's columns are shared. Rows are added to make the parts equal.
    """
    shards = meshes.num_shards()
    table_VD = table_VD.astype(dtype)
    if shards == 1:
        return table_VD
    padded = jnp.pad(table_VD, ((0, -table_VD.shape[0] % shards), (0, 0)))
    return jax.lax.all_to_all(padded, "fsdp", split_axis=0, concat_axis=1, tiled=True)


class _Shards:
    """The devices that share the vocabulary, as seen by one of them."""

    def __init__(self, shard_size: int, vocab_size: int):
        self.count = meshes.num_shards()
        self.first = jax.lax.axis_index("fsdp") * shard_size if self.count > 1 else 0
        padded = self.count * shard_size != vocab_size
        self.limit = vocab_size - self.first if padded else None

    def sum(self, x: Array) -> Array:
        return meshes.sum_over(x, "fsdp") if self.count > 1 else x

    def max(self, x: Array) -> Array:
        return jax.lax.pmax(x, "fsdp") if self.count > 1 else x

    def all_tokens(self, x: Array) -> Array:
        """[C, ...] of every device, one after the other."""
        return jax.lax.all_gather(x, "fsdp", tiled=True) if self.count > 1 else x

    def own_tokens(self, x: Array) -> Array:
        """The inverse of all_tokens, for values that all devices have."""
        if self.count == 1:
            return x
        size = x.shape[0] // self.count
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("fsdp") * size, size)

    def sum_to_own_tokens(self, x: Array) -> Array:
        return meshes.sum_to_own_part(x, 0) if self.count > 1 else x


class _Distribution(NamedTuple):
    """softmax(logits / temperature) of C tokens over the own part of the vocabulary."""

    hidden: Float[Array, "C D"]
    scores: Float[Array, "C Vs"]
    targets: Int[Array, " C"]
    logsumexp: Float[Array, " C"]
    logp: Float[Array, " C"]
    entropy: Float[Array, " C"]


def _distribution(head: _Head, shards: _Shards, hidden_CD, targets_C) -> _Distribution:
    hidden, targets = shards.all_tokens(hidden_CD), shards.all_tokens(targets_C)
    scores = meshes.constrain(logits(hidden, head.table) / head.temperature, None, "vocab")
    targets = targets - shards.first
    if shards.limit is not None:
        outside = jnp.arange(scores.shape[1]) >= shards.limit
        scores = jnp.where(outside[None], _OUTSIDE, scores)
    top = shards.max(jnp.max(scores, axis=1))
    weights = jnp.exp(scores - top[:, None])
    total = shards.sum(jnp.sum(weights, axis=1))
    logsumexp = top + jnp.log(total)
    mean = shards.sum(jnp.sum(weights * scores, axis=1)) / total
    here = (targets >= 0) & (targets < scores.shape[1])
    at_target = jnp.take_along_axis(scores, targets[:, None], axis=1, mode="clip")[:, 0]
    at_target = shards.sum(jnp.where(here, at_target, 0.0))
    return _Distribution(
        hidden, scores, targets, logsumexp, at_target - logsumexp, logsumexp - mean
    )


def _gradients(
    head: _Head, shards: _Shards, d: _Distribution, grad_logp_C, grad_entropy_C
) -> tuple[Float[Array, "C D"], Float[Array, "Vs D"]]:
    """Gradients by the own tokens' hidden states and the own part of the table.

    d logp / d scores = onehot - p;  d entropy / d scores = -p (log p + entropy)
    """
    grad_logp = shards.all_tokens(grad_logp_C)[:, None]
    grad_entropy = shards.all_tokens(grad_entropy_C)[:, None]
    log_p = d.scores - d.logsumexp[:, None]
    is_target = jnp.arange(d.scores.shape[1])[None] == d.targets[:, None]
    by_scores = jnp.where(is_target, grad_logp, 0.0) - jnp.exp(log_p) * (
        grad_logp + grad_entropy * (log_p + d.entropy[:, None])
    )
    by_logits = (by_scores / head.temperature).astype(d.hidden.dtype)
    by_hidden = shards.sum_to_own_tokens(by_logits @ head.table)
    by_table = jnp.einsum("CV,CD->VD", by_logits, d.hidden, preferred_element_type=jnp.float32)
    return by_hidden, by_table


# --- log-probabilities


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _logprobs(head: _Head, hidden, targets, vocab_size: int):
    """[chunks, C] twice."""
    shards = _Shards(head.table.shape[0], vocab_size)

    def one(_, chunk):
        d = _distribution(head, shards, *chunk)
        return None, (shards.own_tokens(d.logp), shards.own_tokens(d.entropy))

    return jax.lax.scan(one, None, (hidden, targets))[1]


def _logprobs_fwd(head, hidden, targets, vocab_size):
    return _logprobs(head, hidden, targets, vocab_size), (head, hidden, targets)


def _logprobs_bwd(vocab_size, saved, grads):
    head, hidden, targets = saved
    shards = _Shards(head.table.shape[0], vocab_size)

    def one(by_table, chunk):
        *tokens, grad_logp, grad_entropy = chunk
        d = _distribution(head, shards, *tokens)
        by_hidden, more = _gradients(head, shards, d, grad_logp, grad_entropy)
        return by_table + more, by_hidden

    zeros = jnp.zeros(head.table.shape, jnp.float32)
    by_table, by_hidden = jax.lax.scan(one, zeros, (hidden, targets, *grads))
    return _Head(by_table.astype(head.table.dtype), jnp.float32(0)), by_hidden, None


_logprobs.defvjp(_logprobs_fwd, _logprobs_bwd)


# --- losses


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _loss(loss_fn: LossFn, head: _Head, chunks: _Chunks, vocab_size: int):
    logp, entropy = _logprobs(head, chunks.hidden, chunks.targets, vocab_size)
    losses = jax.vmap(loss_fn)(logp, entropy, chunks.args)
    return _over_chunks(*losses)


def _over_chunks(loss: Float[Array, " chunks"], metrics: dict[str, Array]):
    return jnp.sum(loss), combine(jnp.sum, jnp.max, metrics)


def _loss_fwd(loss_fn, head, chunks, vocab_size):
    shards = _Shards(head.table.shape[0], vocab_size)

    def one(by_table, chunk: _Chunks):
        d = _distribution(head, shards, chunk.hidden, chunk.targets)
        own = shards.own_tokens(d.logp), shards.own_tokens(d.entropy)
        loss, pull_back, metrics = jax.vjp(
            lambda logp, entropy: loss_fn(logp, entropy, chunk.args), *own, has_aux=True
        )
        by_hidden, more = _gradients(head, shards, d, *pull_back(jnp.ones_like(loss)))
        return by_table + more, (by_hidden, loss, metrics)

    zeros = jnp.zeros(head.table.shape, jnp.float32)
    by_table, (by_hidden, *losses) = jax.lax.scan(one, zeros, chunks)
    return _over_chunks(*losses), (by_hidden, by_table.astype(head.table.dtype))


def _loss_bwd(loss_fn, vocab_size, saved, grads):
    by_hidden, by_table = saved
    scale = grads[0]
    head = _Head(by_table * scale.astype(by_table.dtype), jnp.float32(0))
    return head, _Chunks(by_hidden * scale.astype(by_hidden.dtype), None, None)


_loss.defvjp(_loss_fwd, _loss_bwd)
