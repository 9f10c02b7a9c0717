"""The key/value cache: [L, B, K, S, H], written in place at (layer, row, position).

Heads come before positions, so that what a head attends to lies in one piece.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cir_jax.config import ModelConfig
from cir_jax.mesh import constrain

# Positions that attention reads at a time: it stops after the block of the longest row.
BLOCK = 128


class Cache(NamedTuple):
    k_LBKSH: Float[Array, "L B K S H"]
    v_LBKSH: Float[Array, "L B K S H"]

    @property
    def length(self) -> int:
        return self.k_LBKSH.shape[3]

    def write(
        self,
        layer: Int[Array, ""],
        rows_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
    ) -> "Cache":
        """Stores keys and values; rows or positions outside the cache are dropped."""
        # Every axis but the last is indexed, heads too: a slice of heads would have XLA lay the
        # cache out with heads inside of positions, and copy all of it there and back.
        heads = jnp.arange(k_BTKH.shape[2])[None, None]
        at = (layer, rows_BT[:, :, None], heads, positions_BT[:, :, None])
        return Cache(
            self.k_LBKSH.at[at].set(k_BTKH.astype(self.k_LBKSH.dtype), mode="drop"),
            self.v_LBKSH.at[at].set(v_BTKH.astype(self.v_LBKSH.dtype), mode="drop"),
        )

    @property
    def block(self) -> int:
        """Positions that are read at a time."""
        return min(BLOCK, self.length)

    def read(
        self, layer: Int[Array, ""], rows_B: Int[Array, " B"] | None, number: Int[Array, ""]
    ) -> tuple[Float[Array, "B K Sb H"], Float[Array, "B K Sb H"]]:
        """One layer's keys and values in block `number`, of the given rows or of all."""

        def block(x_LBKSH):
            L, B, K, _, H = x_LBKSH.shape
            start = (layer, 0, 0, number * self.block, 0)
            x_BKSH = jax.lax.dynamic_slice(x_LBKSH, start, (1, B, K, self.block, H))[0]
            return x_BKSH if rows_B is None else x_BKSH.at[rows_B].get(mode="clip")

        return block(self.k_LBKSH), block(self.v_LBKSH)

    def copy_rows(
        self, sources_R: Int[Array, " R"], targets_R: Int[Array, " R"], length: int
    ) -> "Cache":
        """The first `length` positions of rows into other rows; targets outside are dropped."""

        def copied(x_LBKSH):
            part = x_LBKSH[:, :, :, :length].at[:, sources_R].get(mode="clip")
            return x_LBKSH.at[:, targets_R, :, :length].set(part, mode="drop")

        return Cache(*map(copied, self))


def make_cache(cfg: ModelConfig, rows: int, length: int, dtype: str) -> Cache:
    """Zeros; more than one block long, the length is rounded up to whole blocks."""
    if length > BLOCK:
        length += -length % BLOCK
    shape = (cfg.num_layers, rows, cfg.num_kv_heads, length, cfg.head_dim)
    axes = ("layers", "batch", "kv_heads", "length", "head_dim")
    return Cache(
        constrain(jnp.zeros(shape, dtype), *axes), constrain(jnp.zeros(shape, dtype), *axes)
    )
