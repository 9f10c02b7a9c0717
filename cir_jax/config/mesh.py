"""How devices share the work, in training and in decoding."""

import math
from typing import Self

import pydantic

from cir_jax.config.base import PositiveInt, Section


class MeshConfig(Section):
    """Devices per mesh axis; their product must be the number of devices."""

    data: PositiveInt = 1
    """Devices that hold copies of the parameters and share the rows."""
    fsdp: PositiveInt = 1
    """Devices that share the rows and the parameters."""
    tensor: PositiveInt = 1
    """Devices that share heads, MLP and vocabulary."""
    decode_tensor: PositiveInt | None = None
    """The same in decoding, where the other devices share the rows alone; at most the model's
    key/value heads, best all of them; null (leave out) = tensor, and the rows as in training."""

    @pydantic.model_validator(mode="after")
    def _divides(self) -> Self:
        if self.num_devices % (self.decode_tensor or 1):
            raise ValueError(
                f"mesh.decode_tensor={self.decode_tensor}: must divide the number of devices, "
                f"data x fsdp x tensor = {self.num_devices}"
            )
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.data, self.fsdp, self.tensor

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape)

    @property
    def decoding(self) -> "MeshConfig":
        """The mesh of the same devices that rollouts run on."""
        if self.decode_tensor is None:
            return self
        return MeshConfig(fsdp=self.num_devices // self.decode_tensor, tensor=self.decode_tensor)
