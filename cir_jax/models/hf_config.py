"""config.json of a Hugging Face directory <-> ModelConfig."""

from pathlib import Path
from typing import Any

import pydantic

from cir_jax.config import ModelConfig, Section, YarnConfig
from cir_jax.models.hf_directory import CONFIG, read_json

# What transformers takes where config.json is silent.
_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "attention_bias": False,
}
# Fields that may say one thing only, by what this model computes.
_FIXED = {"hidden_act": "silu", "quantization_config": None}
_ROPE_FIELDS = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "truncate",
}


def from_hf_config(config: dict[str, Any]) -> ModelConfig:
    """The model that a config.json of transformers 4 or 5 describes.

    Raises ValueError naming the field and value that is missing or not supported.
    """
    kind = config.get("model_type")
    if kind not in ("qwen2", "qwen3"):
        raise ValueError(f"model_type={kind!r}: must be 'qwen2' or 'qwen3'")
    (expected,) = _architecture(qwen3=kind == "qwen3")
    if config.get("architectures") not in (None, [expected]):
        raise ValueError(f"architectures={config['architectures']!r}: must be ['{expected}']")
    values = _DEFAULTS | config
    for field, value in _FIXED.items():
        if values.get(field) != value:
            raise ValueError(f"{field}={values[field]!r}: not supported, must be {value!r}")
    if kind == "qwen3" and values["attention_bias"]:
        raise ValueError("attention_bias=true: not supported in a qwen3 model")
    required = ("vocab_size", "hidden_size", "intermediate_size")
    for field in (*required, "num_hidden_layers", "num_attention_heads"):
        if not isinstance(values.get(field), int):
            raise ValueError(f"{field}={values.get(field)!r}: must be a whole number")
    _check_full_attention(values)
    theta, yarn = _rope(values)
    heads = values["num_attention_heads"]
    by_default = 128 if kind == "qwen3" else values["hidden_size"] // heads
    return _valid(
        ModelConfig,
        vocab_size=values["vocab_size"],
        width=values["hidden_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or by_default,
        mlp_width=values["intermediate_size"],
        rope_theta=theta,
        norm_eps=values["rms_norm_eps"],
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        tied_embeddings=values["tie_word_embeddings"],
        max_positions=values["max_position_embeddings"],
        yarn=yarn,
    )


def _check_full_attention(values: dict[str, Any]) -> None:
    types = set(values.get("layer_types") or ())
    if types - {"full_attention"}:
        raise ValueError(f"layer_types={sorted(types)}: every layer must be 'full_attention'")
    window = values["sliding_window"] if values["use_sliding_window"] else None
    if not types and window and values["max_window_layers"] < values["num_hidden_layers"]:
        raise ValueError(
            f"use_sliding_window=true, sliding_window={window} from layer "
            f"{values['max_window_layers']} on: sliding windows are not supported"
        )


def _rope(values: dict[str, Any]) -> tuple[float, YarnConfig | None]:
    """rope_theta, and YaRN's settings: in rope_parameters (transformers 5) or rope_scaling (4)."""
    field = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = {k: v for k, v in (values.get(field) or {}).items() if v is not None}
    theta = float(rope.get("rope_theta", values["rope_theta"]))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise ValueError(f"{field}.rope_type={kind!r}: must be 'default' or 'yarn'")
    for name in sorted(set(rope) - _ROPE_FIELDS):
        raise ValueError(f"{field}.{name}={rope[name]!r}: not supported")
    if kind == "default":
        return theta, None
    if "factor" not in rope:
        raise ValueError(f"{field}.factor: missing")
    settings = {
        "factor": float(rope["factor"]),
        "original_length": rope.get(
            "original_max_position_embeddings", values["max_position_embeddings"]
        ),
    }
    for name in ("beta_fast", "beta_slow", "attention_factor"):
        if name in rope:
            settings[name] = float(rope[name])
    return theta, _valid(YarnConfig, **settings, truncate=rope.get("truncate", True))


def _valid(section: type[Section], **fields) -> Section:
    """A section of our config. Raises ValueError with one line for the first wrong field."""
    try:
        return section(**fields)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        given = f"{first['loc'][0]}={first['input']!r}: " if first["loc"] else ""
        raise ValueError(given + first["msg"].removeprefix("Value error, ")) from error


def _architecture(qwen3: bool) -> list[str]:
    return ["Qwen3ForCausalLM" if qwen3 else "Qwen2ForCausalLM"]


def to_hf_config(cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a model; it reads in transformers 4 and 5.

    Raises ValueError for a model that is neither Qwen2.5 nor Qwen3.
    """
    if cfg.qkv_bias == cfg.qk_norm:
        raise ValueError(
            f"model.qkv_bias={cfg.qkv_bias} and model.qk_norm={cfg.qk_norm}: transformers has "
            "bias without norm (Qwen2.5) and norm without bias (Qwen3)"
        )
    config = {
        "architectures": _architecture(cfg.qk_norm),
        "model_type": "qwen3" if cfg.qk_norm else "qwen2",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.width,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "intermediate_size": cfg.mlp_width,
        "rope_theta": cfg.rope_theta,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied_embeddings,
        "attention_bias": cfg.qkv_bias,
        "use_sliding_window": False,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "torch_dtype": dtype,
    }
    if cfg.yarn:
        scaling = cfg.yarn.model_dump(exclude_none=True)
        scaling["original_max_position_embeddings"] = scaling.pop("original_length")
        config["rope_scaling"] = {"rope_type": "yarn"} | scaling
    return config


def read_config(directory: Path) -> ModelConfig:
    """The model of a directory. Raises ValueError naming file, field and value."""
    file = directory / CONFIG
    try:
        return from_hf_config(read_json(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
