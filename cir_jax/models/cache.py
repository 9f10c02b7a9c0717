"""The key/value cache: [L, B, S, K, H], written in place at (layer, row, position)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cir_jax.config import ModelConfig
from cir_jax.mesh import constrain


class Cache(NamedTuple):
    k_LBSKH: Float[Array, "L B S K H"]
    v_LBSKH: Float[Array, "L B S K H"]

    @property
    def length(self) -> int:
        return self.k_LBSKH.shape[2]

    def write(
        self,
        layer: Int[Array, ""],
        rows_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        k_BTKH: Float[Array, "B T K H"],
        v_BTKH: Float[Array, "B T K H"],
    ) -> "Cache":
        """Stores keys and values; rows or positions outside the cache are dropped."""
        at = (layer, rows_BT, positions_BT)
        return Cache(
            self.k_LBSKH.at[at].set(k_BTKH.astype(self.k_LBSKH.dtype), mode="drop"),
            self.v_LBSKH.at[at].set(v_BTKH.astype(self.v_LBSKH.dtype), mode="drop"),
        )

    def read(
        self, layer: Int[Array, ""], rows_B: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]:
        """Keys and values of one layer, of the given rows or of all."""
        if rows_B is None:
            return self.k_LBSKH[layer], self.v_LBSKH[layer]
        at = (layer, rows_B)
        return self.k_LBSKH.at[at].get(mode="clip"), self.v_LBSKH.at[at].get(mode="clip")


def make_cache(cfg: ModelConfig, rows: int, length: int, dtype="float32") -> Cache:
    shape = (cfg.num_layers, rows, length, cfg.num_kv_heads, cfg.head_dim)
    axes = ("layers", "batch", "length", "kv_heads", "head_dim")
    return Cache(
        constrain(jnp.zeros(shape, dtype), *axes), constrain(jnp.zeros(shape, dtype), *axes)
    )
