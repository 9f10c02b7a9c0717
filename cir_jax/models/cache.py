"""The key/value cache: [L, B, K, S, H], written in place at (layer, row, head, position).

Heads come before positions, so that what a head attends to lies in one piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from cir_jax.config import ModelConfig
from cir_jax.mesh import constrain

# Positions that attention reads at a time: it stops after the block of the longest row. Running
# sums are stored between blocks, so long caches have larger ones, up to an eighth of their length.
BLOCK, MAX_BLOCK = 128, 512
AXES = ("layers", "batch", "kv_heads", "length", "head_dim")


class Quantized(NamedTuple):
    """Vectors of whole numbers from -127 to 127, and what each vector is multiplied by."""

    values: Int8[Array, "*shape H"]
    scale: Float[Array, "*shape"]


def quantize(x: Float[Array, "*shape H"]) -> Quantized:
    """Each vector by its largest magnitude: no entry is off by more than a 254th of that."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    values = jnp.round(x / jnp.where(scale == 0, 1.0, scale)[..., None])
    return Quantized(values.astype(jnp.int8), scale)


class Cache(NamedTuple):
    """Keys and values, as they are or quantized at each (layer, row, head, position)."""

    k_LBKSH: Float[Array, "L B K S H"] | Quantized
    v_LBKSH: Float[Array, "L B K S H"] | Quantized

    @property
    def shape(self) -> tuple[int, ...]:
        """(L, B, K, S, H)"""
        return jax.tree.leaves(self)[0].shape

    @property
    def dtype(self) -> str:
        """As `make_cache` was given it."""
        return jax.tree.leaves(self)[0].dtype.name

    @property
    def length(self) -> int:
        return self.shape[3]

    def write(
        self,
        layer: Int[Array, ""],
        rows_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
    ) -> "Cache":
        """Stores keys and values; rows or positions outside the cache are dropped."""
        # Heads are a slice: as indices, devices that share them would send each other all vectors.
        at = (rows_BT, slice(None), positions_BT)

        def put(x, at, new):
            return x.at[at].set(new, mode="drop", wrap_negative_indices=False)

        def written(x, new):
            if isinstance(x, Quantized):
                new = quantize(new)
                # By layers: where scales fit into a TPU's VMEM, XLA would move all of them there
                # and back in every layer.
                scale_BKS = put(x.scale[layer], at, new.scale)
                values = put(x.values, (layer, *at), new.values)
                return Quantized(values, x.scale.at[layer].set(scale_BKS))
            return put(x, (layer, *at), new.astype(x.dtype))

        return Cache(written(self.k_LBKSH, k_BTKH), written(self.v_LBKSH, v_BTKH))

    @property
    def block(self) -> int:
        """Positions that are read at a time."""
        return min(_block(self.length), self.length)

    def read(
        self, layer: Int[Array, ""], rows_B: Int[Array, " B"] | None, number: Int[Array, ""]
    ) -> tuple[Array, Array]:
        """One layer's keys and values [B, K, Sb, H] in block `number`, of the given rows or of
        all, as they are stored."""

        def block(x):
            x_LBKSH = x.values if isinstance(x, Quantized) else x
            _, B, K, _, H = x_LBKSH.shape
            start = (layer, 0, 0, number * self.block, 0)
            x_BKSH = jax.lax.dynamic_slice(x_LBKSH, start, (1, B, K, self.block, H))[0]
            # Rows are taken out of the slice: of the whole cache, XLA would make copies for that.
            return x_BKSH if rows_B is None else x_BKSH.at[rows_B].get(mode="clip")

        return block(self.k_LBKSH), block(self.v_LBKSH)

    def scales(
        self, layer: Int[Array, ""], rows_B: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "B K S"], Float[Array, "B K S"]] | None:
        """What one layer's keys and values, as they are read, are multiplied by, if by anything."""
        if not isinstance(self.k_LBKSH, Quantized):
            return None
        scales = self.k_LBKSH.scale[layer], self.v_LBKSH.scale[layer]
        return scales if rows_B is None else tuple(x.at[rows_B].get(mode="clip") for x in scales)

    def copy_row(self, source: Int[Array, ""], target: Int[Array, ""], length: int) -> "Cache":
        """The first `length` positions of a row into another row, bit by bit."""

        def copied(x):
            L, _, K, _, *H = x.shape
            begin = (0,) * (2 + len(H))
            part = jax.lax.dynamic_slice(x, (0, source, *begin), (L, 1, K, length, *H))
            return jax.lax.dynamic_update_slice(x, part, (0, target, *begin))

        return jax.tree.map(copied, self)


def _block(length: int) -> int:
    """A power of two, so that lengths rounded up to whole blocks have the same."""
    shares = length // (8 * BLOCK)
    return min(BLOCK * 2 ** max(0, shares.bit_length() - 1), MAX_BLOCK)


def cache_axes(dtype: str) -> Cache:
    """Logical axes of a cache of this type."""
    axes = Quantized(AXES, AXES[:-1]) if dtype == "int8" else AXES
    return Cache(axes, axes)


def make_cache(cfg: ModelConfig, rows: int, length: int, dtype: str) -> Cache:
    """Zeros; more than one block long, the length is rounded up to whole blocks.

    dtype: of keys and values; int8: quantized, with scales in float32.
    """
    if length > BLOCK:
        length += -length % _block(length)
    shape = (cfg.num_layers, rows, cfg.num_kv_heads, length, cfg.head_dim)

    def zeros():
        x = constrain(jnp.zeros(shape, dtype), *AXES)
        if dtype != "int8":
            return x
        return Quantized(x, constrain(jnp.zeros(shape[:-1], jnp.float32), *AXES[:-1]))

    return Cache(zeros(), zeros())
