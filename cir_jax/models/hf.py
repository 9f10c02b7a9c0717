"""Hugging Face directory <-> parameters: the one place that knows the tensors' names and layout.

Every way goes one tensor at a time: on the host there is never more than one tensor of the files,
beside the parameters themselves where the host's memory is the device's.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from cir_jax import mesh as meshes
from cir_jax.config import ModelConfig
from cir_jax.models import hf_directory, lora, qwen, tensorfile
from cir_jax.models.hf_config import read_config, to_hf_config
from cir_jax.models.hf_directory import CONFIG
from cir_jax.models.tensorfile import Stored

SHARD_BYTES = 5 * 10**9

Keys = tuple[str, ...]  # of our tree, from the top

_TOP = {
    ("embed",): "model.embed_tokens.weight",
    ("final_norm", "scale"): "model.norm.weight",
    ("head",): "lm_head.weight",
}
# Path within a layer -> HF's name within a layer, and how many of our leading axes a matrix takes
# in: ours are [in..., out...], HF's [out, in]. 0: a vector, whose axes are one there.
_LAYER = {
    ("attn_norm", "scale"): ("input_layernorm.weight", 0),
    ("attn", "q"): ("self_attn.q_proj.weight", 1),
    ("attn", "k"): ("self_attn.k_proj.weight", 1),
    ("attn", "v"): ("self_attn.v_proj.weight", 1),
    ("attn", "o"): ("self_attn.o_proj.weight", 2),
    ("attn", "q_bias"): ("self_attn.q_proj.bias", 0),
    ("attn", "k_bias"): ("self_attn.k_proj.bias", 0),
    ("attn", "v_bias"): ("self_attn.v_proj.bias", 0),
    ("attn", "q_norm", "scale"): ("self_attn.q_norm.weight", 0),
    ("attn", "k_norm", "scale"): ("self_attn.k_norm.weight", 0),
    ("mlp_norm", "scale"): ("post_attention_layernorm.weight", 0),
    ("mlp", "gate"): ("mlp.gate_proj.weight", 1),
    ("mlp", "up"): ("mlp.up_proj.weight", 1),
    ("mlp", "down"): ("mlp.down_proj.weight", 1),
}


class _Parameter(NamedTuple):
    """A parameter of ours and HF's tensors that it is made of: one, or one of each layer.

    num_in: as in _LAYER; None outside the layers, where both have the same.
    """

    path: Keys
    shape: tuple[int, ...]
    axes: tuple
    names: list[str]
    num_in: int | None

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Of one tensor."""
        if self.num_in is None:
            return self.shape
        taken_in, given_out = self._halves(self.shape[1:])
        return (math.prod(given_out), *([math.prod(taken_in)] if taken_in else []))

    @property
    def hf_axes(self) -> tuple:
        """Logical axes of one tensor; those that are one there go by the first."""
        if self.num_in is None:
            return self.axes
        taken_in, given_out = self._halves(self.axes[1:])
        return given_out[:1] + taken_in[:1]

    def _halves(self, of_layer: tuple) -> tuple[tuple, tuple]:
        return of_layer[: self.num_in], of_layer[self.num_in :]


def _parameters(cfg: ModelConfig) -> Iterator[_Parameter]:
    leaves = jax.tree_util.tree_leaves_with_path(qwen.abstract_params(cfg))
    axes = jax.tree.leaves(qwen.param_axes(cfg), is_leaf=lambda x: isinstance(x, tuple))
    for (keys, target), names in zip(leaves, axes, strict=True):
        path = tuple(key.key for key in keys)
        if path[0] == "layers":
            name, num_in = _LAYER[path[1:]]
            hf_names = [f"model.layers.{layer}.{name}" for layer in range(cfg.num_layers)]
        else:
            hf_names, num_in = [_TOP[path]], None
        yield _Parameter(path, target.shape, names, hf_names, num_in)


def _to_hf(num_in: int, value: Array) -> Array:
    """Our [in..., out...] of one layer to a torch Linear's [out, in]."""
    if num_in == 0:
        return value.reshape(-1)
    return value.reshape(math.prod(value.shape[:num_in]), -1).T


def _from_hf(num_in: int, value: Array, shape: tuple[int, ...]) -> Array:
    return (value.T if num_in else value).reshape(shape)


def _checked(directory: Path, cfg: ModelConfig) -> dict[str, Stored]:
    """The directory's tensors, which are the model's by name, shape and type.

    Raises ValueError naming the first that is not.
    """
    stored = hf_directory.stored_tensors(directory)
    expected = {name: p.hf_shape for p in _parameters(cfg) for name in p.names}
    for name, shape in expected.items():
        if name not in stored:
            raise ValueError(f"{directory}: tensor {name} is missing")
        if stored[name].shape != shape:
            raise ValueError(
                f"{stored[name].file}: tensor {name} has shape {stored[name].shape}, "
                f"expected {shape}"
            )
        if stored[name].dtype not in tensorfile.DTYPES:
            raise ValueError(
                f"{stored[name].file}: tensor {name} has type {stored[name].dtype}, "
                f"expected one of {', '.join(tensorfile.DTYPES)}"
            )
    # Some checkpoints with tied embeddings hold the table twice.
    known = expected.keys() | ({_TOP["head",]} if cfg.tied_embeddings else set())
    for name in sorted(stored.keys() - known):
        raise ValueError(f"{stored[name].file}: unexpected tensor {name}")
    return {name: stored[name] for name in expected}


# --- directory -> parameters


def load(directory: Path, cfg: ModelConfig, mesh: Mesh, dtype=jnp.float32) -> qwen.Params:
    """Parameters of a directory with one or several safetensors files, laid out on the mesh.

    A process reads the rows that its devices hold. Everything that the files' headers tell is
    checked before any tensor is read.
    Raises ValueError naming a tensor that is missing, unexpected or of another shape or type,
    or a file that is missing or truncated.
    """
    stored = _checked(directory, cfg)
    params = {"layers": _zeros(cfg, dtype, mesh)()}
    for p in _parameters(cfg):
        layout = meshes.sharding(mesh, *p.axes)
        placed = (_place(stored[name], meshes.sharding(mesh, *p.hf_axes)) for name in p.names)
        if p.num_in is None:
            value = _caster(dtype, layout)(next(placed))
        else:
            value = _stack(_get(params, p.path), placed, p.num_in, layout)
        # Waits, so that the next tensor is not read while this one is still held.
        _set(params, p.path, jax.block_until_ready(value))
    return params


def _place(tensor: Stored, layout: NamedSharding) -> Array:
    """The tensor on the devices. The rows from this process's first to its last are read."""
    num_rows = tensor.shape[0]
    indices = layout.addressable_devices_indices_map(tensor.shape).values()
    spans = [index[0].indices(num_rows)[:2] for index in indices]
    first, end = min(span[0] for span in spans), max(span[1] for span in spans)
    rows = tensorfile.read(tensor, first, end)

    def part(index: tuple[slice, ...]) -> np.ndarray:
        begin, stop, _ = index[0].indices(num_rows)
        return rows[(slice(begin - first, stop - first), *index[1:])]

    placed = jax.make_array_from_callback(tensor.shape, layout, part)
    # Waits, so that the host's copy is gone before the devices make theirs.
    return jax.block_until_ready(placed)


def _stack(stacked: Array, layers: Iterator[Array], num_in: int, layout: NamedSharding) -> Array:
    """HF's tensors, each written into its place in the stacked parameter on the devices."""
    everywhere = NamedSharding(layout.mesh, PartitionSpec())
    for number, value in enumerate(layers):
        layer = jax.device_put(np.int32(number), everywhere)
        stacked = jax.block_until_ready(_writer(num_in, layout)(stacked, value, layer))
    return stacked


# Cached, because a jitted function made anew is compiled anew.


@functools.lru_cache
def _caster(dtype, layout: NamedSharding) -> Callable[[Array], Array]:
    # Copied in any case: on CPUs the array may share numpy's memory, which cannot be donated.
    return jax.jit(lambda x: jnp.copy(x.astype(dtype)), out_shardings=layout)


@functools.lru_cache
def _zeros(cfg: ModelConfig, dtype, mesh: Mesh) -> Callable[[], qwen.Params]:
    """The layers' parameters, laid out, for values to be written into."""
    shapes = qwen.abstract_params(cfg)["layers"]
    shardings = qwen.param_shardings(cfg, mesh)["layers"]
    return jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), shapes), out_shardings=shardings
    )


@functools.lru_cache
def _writer(num_in: int, layout: NamedSharding) -> Callable[[Array, Array, Array], Array]:
    def write(stacked: Array, value: Array, layer: Int[Array, ""]) -> Array:
        ours = _from_hf(num_in, value, stacked.shape[1:]).astype(stacked.dtype)
        return jax.lax.dynamic_update_index_in_dim(stacked, ours, layer, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=layout)


# --- parameters or directory -> directory


def export(
    params: qwen.Params,
    cfg: ModelConfig,
    out: Path,
    tokenizer: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights as they are (adapters merged), config and tokenizer files that transformers
    and vLLM load.

    shard_bytes: a file holds no more, unless one tensor does.
    Raises ValueError for a model that is neither Qwen2.5 nor Qwen3, or if `out` has contents.
    """
    params, cfg = lora.merge(params, cfg)
    tensors, where = {}, {}
    for p in _parameters(cfg):
        value = _get(params, p.path)
        for layer, name in enumerate(p.names):
            tensors[name] = jax.ShapeDtypeStruct(p.hf_shape, value.dtype)
            where[name] = value, p.num_in, layer
    with hf_directory.write_aside(out) as aside:
        _write(aside, cfg, tensors, lambda name: [_take(*where[name])], tokenizer, shard_bytes)


def convert(source: Path, target: Path, dtype: np.dtype | None) -> None:
    """Writes the weights, config and tokenizer files of a directory to another, an empty one.

    dtype: that weights are written in; None: each in its own, bit by bit.
    Raises ValueError as read_config and load do, before any tensor is read.
    """
    cfg = read_config(source)
    stored = _checked(source, cfg)
    tensors = {
        name: jax.ShapeDtypeStruct(x.shape, dtype or tensorfile.DTYPES[x.dtype])
        for name, x in stored.items()
    }

    def blocks_of(name: str) -> Iterator[np.ndarray]:
        for block in tensorfile.read_blocks(stored[name]):
            yield block.astype(tensors[name].dtype, copy=False)

    _write(target, cfg, tensors, blocks_of, source, SHARD_BYTES)


def _write(
    directory: Path,
    cfg: ModelConfig,
    tensors: Mapping[str, jax.ShapeDtypeStruct],
    blocks_of: Callable[[str], Iterable[np.ndarray]],
    companions: Path,
    shard_bytes: int,
) -> None:
    config = to_hf_config(cfg, tensors[_TOP["embed",]].dtype.name)
    hf_directory.write_json(directory / CONFIG, config)
    hf_directory.copy_companions(companions, directory)
    hf_directory.write_tensors(directory, tensors, blocks_of, shard_bytes)


def _take(value: Array, num_in: int | None, layer: int) -> np.ndarray:
    """One tensor of a parameter, on the host."""
    if num_in is None:
        return np.asarray(value)
    return np.asarray(_take_layer(value, jax.device_put(np.int32(layer)), num_in))


@functools.partial(jax.jit, static_argnames="num_in")
def _take_layer(stacked: Float[Array, "L ..."], layer: Int[Array, ""], num_in: int) -> Array:
    return _to_hf(num_in, jax.lax.dynamic_index_in_dim(stacked, layer, 0, keepdims=False))


def _get(tree: qwen.Params, path: Keys) -> Array:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: qwen.Params, path: Keys, value: Array) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value
