"""Hugging Face directory <-> parameters: the one place that knows HF's names.

Both ways go one tensor at a time: on the host there is never more than one tensor of the files,
beside the parameters themselves where the host's memory is the device's.
"""

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from cir_jax import mesh as meshes
from cir_jax.config import ModelConfig, Section, YarnConfig
from cir_jax.models import qwen, tensorfile
from cir_jax.models.tensorfile import Stored
from cir_jax.tokenizer import Tokenizer

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
# What goes along with weights: all that is needed to tokenize, and how to end a generation.
COMPANIONS = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    GENERATION,
)
SHARD_BYTES = 5 * 10**9

Keys = tuple[str, ...]  # of our tree, from the top


# --- config.json

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


# --- tensors

_TOP_NAMES = {
    ("embed",): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("head",): "lm_head.weight",
}


def _layer_names(cfg: ModelConfig) -> dict[Keys, str]:
    """Path in our tree -> HF name, both within a layer."""
    names = {
        ("attn_norm", "scale"): "input_layernorm.weight",
        ("mlp_norm", "scale"): "post_attention_layernorm.weight",
        ("attn", "o"): "self_attn.o_proj.weight",
        ("mlp", "gate"): "mlp.gate_proj.weight",
        ("mlp", "up"): "mlp.up_proj.weight",
        ("mlp", "down"): "mlp.down_proj.weight",
    }
    for x in "qkv":
        names["attn", x] = f"self_attn.{x}_proj.weight"
        if cfg.qkv_bias:
            names["attn", f"{x}_bias"] = f"self_attn.{x}_proj.bias"
    if cfg.qk_norm:
        for x in "qk":
            names["attn", f"{x}_norm", "scale"] = f"self_attn.{x}_norm.weight"
    return names


def _names(cfg: ModelConfig, path: Keys) -> list[str]:
    """HF names of a parameter: of each layer's tensor where it is stacked."""
    if path[0] != "layers":
        return [_TOP_NAMES[path]]
    name = _layer_names(cfg)[path[1:]]
    return [f"model.layers.{layer}.{name}" for layer in range(cfg.num_layers)]


def _to_hf(path: Keys, value: Array) -> Array:
    """Our [in..., out...] of one layer to a torch Linear's [out, in]."""
    if path[1:] in (("attn", "q"), ("attn", "k"), ("attn", "v")):
        return value.reshape(value.shape[0], -1).T
    if path[1:] == ("attn", "o"):
        return value.reshape(-1, value.shape[-1]).T
    if path[1:2] == ("mlp",):
        return value.T
    return value.reshape(-1) if path[-1].endswith("_bias") else value


def _from_hf(path: Keys, value: Array, shape: tuple[int, ...]) -> Array:
    transposed = path[1:2] == ("mlp",) or path[1:] in [("attn", x) for x in "qkvo"]
    return (value.T if transposed else value).reshape(shape)


def _hf_axes(path: Keys, axes: tuple) -> tuple:
    """Logical axes of one layer's tensor as HF has it; a head's axes are one there."""
    if path[1:] == ("attn", "o"):
        return axes[2], axes[0]
    if path[1:] in [("attn", x) for x in "qkv"]:
        return axes[1], axes[0]
    if path[1:2] == ("mlp",):
        return axes[::-1]
    return axes[:1] if path[-1].endswith("_bias") else axes


def _paths(cfg: ModelConfig) -> Iterator[tuple[Keys, jax.ShapeDtypeStruct, tuple]]:
    """Path, abstract value and logical axes of each parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(qwen.abstract_params(cfg))
    axes = jax.tree.leaves(qwen.param_axes(cfg), is_leaf=lambda x: isinstance(x, tuple))
    for (keys, target), names in zip(leaves, axes, strict=True):
        yield tuple(key.key for key in keys), target, names


def _hf_tensor(path: Keys, target: jax.ShapeDtypeStruct | Array) -> jax.ShapeDtypeStruct:
    """Shape and type of one tensor of a parameter as HF has it."""
    shape = target.shape[1:] if path[0] == "layers" else target.shape
    one = jax.ShapeDtypeStruct(shape, target.dtype)
    return jax.eval_shape(functools.partial(_to_hf, path), one)


# --- import


def fetch(source: str) -> Path:
    """A directory as it is; anything else is a hub id, whose files are downloaded.

    Raises ValueError if it is neither, or out of reach.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        patterns = [CONFIG, "*.safetensors", INDEX, *COMPANIONS]
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (HFValidationError, OSError) as error:
        raise ValueError(
            f"{source!r}: no such directory, and not to be had from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from error


def read_config(directory: Path) -> ModelConfig:
    """The model of a directory. Raises ValueError naming file, field and value."""
    file = directory / CONFIG
    try:
        return from_hf_config(_read_json(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load(directory: Path, cfg: ModelConfig, mesh: Mesh, dtype=jnp.float32) -> qwen.Params:
    """Parameters of a directory with one or several safetensors files, laid out on the mesh.

    Everything that the files' headers tell is checked before any tensor is read.
    Raises ValueError naming a tensor that is missing, unexpected or of another shape or type,
    or a file that is missing or truncated.
    """
    stored = _stored_tensors(directory)
    _check(stored, cfg, directory)
    params: qwen.Params = {}
    for path, target, axes in _paths(cfg):
        names = _names(cfg, path)
        if path[0] == "layers":
            layout = meshes.sharding(mesh, *_hf_axes(path, axes[1:]))
            layers = (_place(stored[name], layout) for name in names)
            value = _stack(layers, path, target.shape, dtype, meshes.sharding(mesh, *axes))
        else:
            layout = meshes.sharding(mesh, *axes)
            value = _caster(dtype, layout)(_place(stored[names[0]], layout))
        # Waits, so that the next tensor is not read while this one is still held.
        _set(params, path, jax.block_until_ready(value))
    return params


def _place(tensor: Stored, layout: NamedSharding) -> Array:
    value = tensorfile.read(tensor)
    placed = jax.make_array_from_callback(value.shape, layout, lambda index: value[index])
    # Waits, so that the host's copy is gone before the devices make theirs.
    return jax.block_until_ready(placed)


def _stack(
    layers: Iterator[Array], path: Keys, shape: tuple[int, ...], dtype, layout: NamedSharding
) -> Array:
    """The stacked parameter of HF's tensors, each written into its place on the devices."""
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    stacked = _zeros(shape, dtype, layout)()
    for number, value in enumerate(layers):
        layer = jax.device_put(np.int32(number), everywhere)
        stacked = jax.block_until_ready(_writer(path, layout)(stacked, value, layer))
    return stacked


# Cached, because a jitted function made anew is compiled anew.


@functools.lru_cache
def _caster(dtype, layout: NamedSharding) -> Callable[[Array], Array]:
    # Copied in any case: on CPUs the array may share numpy's memory, which cannot be donated.
    return jax.jit(lambda x: jnp.copy(x.astype(dtype)), out_shardings=layout)


@functools.lru_cache
def _zeros(shape: tuple[int, ...], dtype, layout: NamedSharding) -> Callable[[], Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=layout)


@functools.lru_cache
def _writer(path: Keys, layout: NamedSharding) -> Callable[[Array, Array, Array], Array]:
    def write(stacked: Array, value: Array, layer: Int[Array, ""]) -> Array:
        ours = _from_hf(path, value, stacked.shape[1:]).astype(stacked.dtype)
        return jax.lax.dynamic_update_index_in_dim(stacked, ours, layer, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=layout)


def _stored_tensors(directory: Path) -> dict[str, Stored]:
    """Where a directory's tensors lie: one file (transformers prefers it too), or by index."""
    if (directory / WEIGHTS).is_file():
        return tensorfile.read_header(directory / WEIGHTS)
    index = directory / INDEX
    if not index.is_file():
        raise ValueError(f"{directory}: holds neither {WEIGHTS} nor {INDEX}")
    try:
        file_of = dict(_read_json(index)["weight_map"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{index}: no index: weight_map is missing") from error
    stored: dict[str, Stored] = {}
    for file in sorted(set(file_of.values())):
        if not (directory / file).is_file():
            raise ValueError(f"{index}: names {file}, which is missing")
        header = tensorfile.read_header(directory / file)
        for name in header.keys() & stored.keys():
            raise ValueError(f"{directory / file}: tensor {name} is also in {stored[name].file}")
        stored |= header
    for name, file in file_of.items():
        if name not in stored or stored[name].file.name != Path(file).name:
            raise ValueError(f"{directory / file}: tensor {name} is missing, {INDEX} names it here")
    return stored


def _check(stored: dict[str, Stored], cfg: ModelConfig, directory: Path) -> None:
    expected = {
        name: _hf_tensor(path, target)
        for path, target, _ in _paths(cfg)
        for name in _names(cfg, path)
    }
    for name, x in expected.items():
        if name not in stored:
            raise ValueError(f"{directory}: tensor {name} is missing")
        if stored[name].shape != x.shape:
            raise ValueError(
                f"{stored[name].file}: tensor {name} has shape {stored[name].shape}, "
                f"expected {x.shape}"
            )
        if stored[name].dtype not in tensorfile.DTYPES:
            raise ValueError(
                f"{stored[name].file}: tensor {name} has type {stored[name].dtype}, "
                f"expected one of {', '.join(tensorfile.DTYPES)}"
            )
    # Some checkpoints with tied embeddings hold the table twice.
    known = expected.keys() | ({_TOP_NAMES["head",]} if cfg.tied_embeddings else set())
    for name in sorted(stored.keys() - known):
        raise ValueError(f"{stored[name].file}: unexpected tensor {name}")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file}: no such file") from error
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error


# --- export


def export(
    params: qwen.Params,
    cfg: ModelConfig,
    out: Path,
    tokenizer: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights as they are, config and tokenizer files that transformers and vLLM load.

    shard_bytes: a file holds no more, unless one tensor does.
    Raises ValueError for a model that is neither Qwen2.5 nor Qwen3, or if `out` has contents.
    """
    config = to_hf_config(cfg, params["embed"].dtype.name)
    with write_aside(out) as aside:
        _export_tensors(params, cfg, aside, shard_bytes)
        (aside / CONFIG).write_text(json.dumps(config, indent=1) + "\n")
        copy_companions(tokenizer, aside)
        if not (aside / GENERATION).exists():
            end = Tokenizer(tokenizer).eos_id
            generation = {"eos_token_id": end, "pad_token_id": end}
            (aside / GENERATION).write_text(json.dumps(generation, indent=1) + "\n")


def _export_tensors(
    params: qwen.Params, cfg: ModelConfig, directory: Path, shard_bytes: int
) -> None:
    tensors, where = {}, {}
    for path, _, _ in _paths(cfg):
        value = _get(params, path)
        for layer, name in enumerate(_names(cfg, path)):
            tensors[name] = _hf_tensor(path, value)
            where[name] = value, path, layer
    shards = _split(tensors, shard_bytes)
    file_of = {}
    for number, names in enumerate(shards, start=1):
        single = len(shards) == 1
        file = WEIGHTS if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = {name: tensors[name] for name in names}
        tensorfile.write(directory / file, shard, lambda name: _take(*where[name]))
        file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(map(tensorfile.num_bytes, tensors.values()))
        index = {"metadata": {"total_size": total}, "weight_map": file_of}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _split(tensors: dict[str, jax.ShapeDtypeStruct], shard_bytes: int) -> list[list[str]]:
    """Names in order, as many to a file as fit."""
    shards: list[list[str]] = [[]]
    left = shard_bytes
    for name, x in tensors.items():
        size = tensorfile.num_bytes(x)
        if size > left and shards[-1]:
            shards.append([])
            left = shard_bytes
        shards[-1].append(name)
        left -= size
    return shards


def _take(value: Array, path: Keys, layer: int) -> np.ndarray:
    """One tensor of a parameter, on the host."""
    if path[0] != "layers":
        return np.asarray(value)
    return np.asarray(_take_layer(value, jax.device_put(np.int32(layer)), path))


@functools.partial(jax.jit, static_argnames="path")
def _take_layer(stacked: Float[Array, "L ..."], layer: Int[Array, ""], path: Keys) -> Array:
    one = jax.lax.dynamic_index_in_dim(stacked, layer, 0, keepdims=False)
    return _to_hf(path, one)


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer and generation files, and none of the others that may lie beside them."""
    for file in sorted(source.iterdir()):
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in COMPANIONS):
            shutil.copyfile(file, target / file.name)


@contextlib.contextmanager
def write_aside(out: Path) -> Iterator[Path]:
    """A directory beside `out` that takes its name when the block is done, and else is removed.

    Raises ValueError if `out` is there and is no empty directory.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"OUT={str(out)!r}: exists; must be new or an empty directory")
    aside = out.parent / f".{out.name}.{os.getpid()}.partial"
    aside.mkdir(parents=True)
    try:
        yield aside
        aside.rename(out)
    except BaseException:
        shutil.rmtree(aside)
        raise


def _get(tree: qwen.Params, path: Keys) -> Array:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: qwen.Params, path: Keys, value: Array) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
