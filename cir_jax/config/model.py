"""The model's sections: its shape, how it is computed, its adapters."""

from typing import Annotated, ClassVar, Literal

import pydantic
from pydantic import Field

from cir_jax.config.base import PositiveFloat, PositiveInt, Section


class YarnConfig(Section):
    """YaRN scaling of the rotary embedding, for contexts longer than the model was trained on."""

    factor: Annotated[float, Field(ge=1)]
    """Context length divided by original_length (YaRN, section 2.3: s)."""
    original_length: PositiveInt
    """Context that the model was trained on before, positions (YaRN, section 2.3: L)."""
    beta_fast: PositiveFloat = 32.0
    """Wavelengths with more turns than this within original_length stay (YaRN, section 3.2)."""
    beta_slow: PositiveFloat = 1.0
    """Wavelengths with fewer turns than this are stretched by factor (YaRN, section 3.2)."""
    attention_factor: PositiveFloat | None = None
    """Scales cos and sin; null (leave out) = 0.1 ln(factor) + 1 (YaRN, section 3.4)."""
    truncate: bool = True
    """Round the two ends of the ramp between beta_fast and beta_slow outwards to whole pairs."""

    @pydantic.model_validator(mode="after")
    def _ramp(self) -> "YarnConfig":
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"beta_fast={self.beta_fast}: must be at least beta_slow={self.beta_slow}"
            )
        return self


class LoRAConfig(Section):
    """Low-rank adapters: W + alpha / rank A B is used, A and B alone are trained.

    Source: arXiv:2106.09685, section 4.1.
    """

    rank: PositiveInt
    """Rank r of each update."""
    alpha: PositiveFloat
    """Numerator of the update's scale, alpha / rank."""
    targets: Annotated[
        tuple[Literal["q", "k", "v", "o", "gate", "up", "down"], ...], Field(min_length=1)
    ] = ("q", "k", "v", "o", "gate", "up", "down")
    """Projections that get an adapter, in every layer."""


class ModelConfig(Section):
    """A Qwen2.5- or Qwen3-shaped decoder (dense)."""

    shorthands: ClassVar[dict[str, str]] = {
        "preset": "Model that the section starts from, such as Qwen2.5-7B; names from "
        "cir_jax/config/presets.py. Every other key of [model], in the file or an override, wins "
        "over it; model={preset = 'Qwen2.5-7B'} as an override drops the file's [model]."
    }
    vocab_size: PositiveInt
    """Rows of the embedding table, tokens; at least the tokenizer's size."""
    width: PositiveInt
    """Residual width D."""
    num_layers: PositiveInt
    """Decoder blocks L."""
    num_heads: PositiveInt
    """Query heads N."""
    num_kv_heads: PositiveInt
    """Key/value heads K; divides num_heads."""
    head_dim: PositiveInt
    """Width of one head H; even."""
    mlp_width: PositiveInt
    """Hidden width F of the gated MLP."""
    rope_theta: PositiveFloat
    """Base of the rotary embedding's wavelengths, positions."""
    norm_eps: PositiveFloat = 1e-6
    """Added to the mean square in RMSNorm."""
    qkv_bias: bool = True
    """Bias on the q, k, v projections (Qwen2.5: true, Qwen3: false)."""
    qk_norm: bool = False
    """RMSNorm on each query and key head (Qwen3: true)."""
    tied_embeddings: bool = True
    """The output head is the embedding table."""
    max_positions: PositiveInt = 32768
    """Context named in exported configs, positions; nothing here is cut at it."""
    yarn: YarnConfig | None = None
    """Null (leave out): plain rotary embedding."""
    lora: LoRAConfig | None = None
    """Null (leave out): all parameters are trained, and none is added."""

    @pydantic.model_validator(mode="after")
    def _shapes(self) -> "ModelConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads}: must divide num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim}: must be even for rotary embedding")
        return self


class ComputeConfig(Section):
    """How the model is computed; parameters and logits are float32 whatever is set here."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations, of the weights as they enter matrix products, and of the KV cache."""
    remat: Literal["none", "minimal", "full"] = "full"
    """What the backward pass computes again: nothing; all of a layer but its matrix products; or
    all of a layer (only the residual stream between layers is kept)."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """Back end of training's attention; auto: splash (Pallas) on TPUs, cudnn on GPUs in bfloat16,
    else xla."""
