"""Hugging Face directory <-> parameters: the one place that knows HF's tensor names."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cir_jax.config import ModelConfig
from cir_jax.models import qwen

WEIGHTS = "model.safetensors"

_TOP_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
}


def _layer_tensors(cfg: ModelConfig) -> dict[str, tuple[str, ...]]:
    """HF name within a layer -> path in our tree."""
    names = {
        "input_layernorm.weight": ("attn_norm", "scale"),
        "post_attention_layernorm.weight": ("mlp_norm", "scale"),
        "self_attn.o_proj.weight": ("attn", "o"),
        "mlp.gate_proj.weight": ("mlp", "gate"),
        "mlp.up_proj.weight": ("mlp", "up"),
        "mlp.down_proj.weight": ("mlp", "down"),
    }
    for x in "qkv":
        names[f"self_attn.{x}_proj.weight"] = ("attn", x)
        if cfg.qkv_bias:
            names[f"self_attn.{x}_proj.bias"] = ("attn", f"{x}_bias")
    if cfg.qk_norm:
        for x in "qk":
            names[f"self_attn.{x}_norm.weight"] = ("attn", f"{x}_norm", "scale")
    return names


def _to_hf(path: tuple[str, ...], value: np.ndarray) -> np.ndarray:
    """Our [in..., out...] to a torch Linear's [out, in]."""
    if path[0] == "attn" and path[-1] in ("q", "k", "v"):
        return value.reshape(value.shape[0], -1).T
    if path == ("attn", "o"):
        return value.reshape(-1, value.shape[-1]).T
    if path[0] == "mlp":
        return value.T
    return value.reshape(-1) if path[-1].endswith("_bias") else value


def _from_hf(path: tuple[str, ...], value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    transposed = path[0] == "mlp" or (path[0] == "attn" and path[-1] in ("q", "k", "v", "o"))
    return (value.T if transposed else value).reshape(shape)


def export(params: qwen.Params, cfg: ModelConfig, directory: Path, tokenizer: Path) -> None:
    """Writes weights (float32), config and tokenizer files that transformers loads.

    Raises ValueError for a model that is neither Qwen2.5 nor Qwen3.
    """
    from safetensors.numpy import save_file

    if cfg.qkv_bias == cfg.qk_norm:
        raise ValueError(
            f"model.qkv_bias={cfg.qkv_bias} and model.qk_norm={cfg.qk_norm}: transformers has "
            "bias without norm (Qwen2.5) and norm without bias (Qwen3)"
        )
    tensors = {
        "model.embed_tokens.weight": np.asarray(params["embed"]),
        "model.norm.weight": np.asarray(params["final_norm"]["scale"]),
    }
    if not cfg.tied_embeddings:
        tensors["lm_head.weight"] = np.asarray(params["head"])
    for name, path in _layer_tensors(cfg).items():
        stacked = np.asarray(_get(params["layers"], path))
        for layer in range(cfg.num_layers):
            tensors[f"model.layers.{layer}.{name}"] = _to_hf(path, stacked[layer])
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    (directory / WEIGHTS).chmod(0o644)  # save_file leaves it to the owner alone
    (directory / "config.json").write_text(json.dumps(_hf_config(cfg), indent=1) + "\n")
    for file in tokenizer.iterdir():
        shutil.copy(file, directory / file.name)


def load(directory: Path, cfg: ModelConfig, mesh: Mesh) -> qwen.Params:
    """Parameters of a directory with one safetensors file, laid out on the mesh.

    Raises ValueError naming a tensor that is missing, unexpected or of another shape.
    """
    from safetensors import safe_open

    file = directory / WEIGHTS
    with safe_open(file, framework="numpy") as tensors:
        unread = set(tensors.keys())

        def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
            if name not in unread:
                raise ValueError(f"{file}: tensor {name} is missing")
            unread.remove(name)
            value = tensors.get_tensor(name)
            if value.shape != shape:
                raise ValueError(f"{file}: tensor {name} has shape {value.shape}, expected {shape}")
            return value.astype(np.float32)

        def leaf(keys: tuple, target: jax.ShapeDtypeStruct) -> np.ndarray:
            path = tuple(key.key for key in keys)
            if path[0] != "layers":
                return read(_TOP_NAMES[path[0]], target.shape)
            path, shape = path[1:], target.shape[1:]
            hf_shape = _to_hf(path, np.empty(shape)).shape
            names = (f"model.layers.{n}.{layer_names[path]}" for n in range(cfg.num_layers))
            return np.stack([_from_hf(path, read(name, hf_shape), shape) for name in names])

        layer_names = {path: name for name, path in _layer_tensors(cfg).items()}
        params = jax.tree_util.tree_map_with_path(leaf, qwen.abstract_params(cfg))
        if unread:
            raise ValueError(f"{file}: unexpected tensor {sorted(unread)[0]}")
    shardings = qwen.param_shardings(cfg, mesh)
    return jax.tree.map(lambda x, s: jax.device_put(jnp.asarray(x), s), params, shardings)


def _get(tree: qwen.Params, path: tuple[str, ...]):
    for key in path:
        tree = tree[key]
    return tree


def _hf_config(cfg: ModelConfig) -> dict:
    qwen3 = cfg.qk_norm
    return {
        "architectures": ["Qwen3ForCausalLM" if qwen3 else "Qwen2ForCausalLM"],
        "model_type": "qwen3" if qwen3 else "qwen2",
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
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "torch_dtype": "float32",
    }
