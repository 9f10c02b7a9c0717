"""Update and decoding, compiled for TPU slices that are not here.

The 7B update fits, and no array is too large. A decode step reads parameters and cache once; the
cache is never copied, and what devices exchange is small.

Run with `pytest -m tpu`; needs the extra `tpu` (libtpu) and minutes.
"""

import re

import pytest
import tpu

from cir_jax.aot import hlo

pytestmark = pytest.mark.tpu
slow = pytest.mark.slow

# Compiles one update of 655,360 tokens in rows of 5120 (the paper's lengths). v5p's program text
# cannot be printed.
PROGRAM = """
import json, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from cir_jax import mesh as meshes
from cir_jax.config import ComputeConfig, OptimConfig, RLConfig, preset
from cir_jax.rl.batch import TrainBatch
from cir_jax.train.state import abstract_state, make_optimizer
from cir_jax.train.step import Given, make_update, rl_loss_fn

topology, rows_each, moments, text = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology)
mesh = topologies.make_mesh(devices, (1, len(devices.devices), 1), meshes.AXES)
cfg, optimizer = preset("Qwen2.5-7B"), make_optimizer(OptimConfig(moments=moments), 100)
rows, length = rows_each * mesh.size, 5120
with jax.set_mesh(mesh):
    def data(dtype):
        shape = (655360 // (rows * length), rows, length)
        layout = meshes.sharding(mesh, None, "batch", "length")
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout)

    def scalar(dtype):
        return jax.ShapeDtypeStruct((), dtype, sharding=meshes.sharding(mesh))

    batch = TrainBatch(*map(data, (jnp.int32,) * 3 + (bool,) * 2 + (jnp.float32,) * 3))
    update = make_update(cfg, ComputeConfig(), mesh, optimizer, rl_loss_fn(RLConfig()))
    compiled = update.lower(
        abstract_state(cfg, mesh, optimizer), batch, Given(data(jnp.float32)), scalar(jnp.int32),
        scalar(jnp.float32),
    ).compile()
m = compiled.memory_analysis()
used = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
print(json.dumps({
    "gib": (used + m.temp_size_in_bytes) / 2**30,
    "new_output_bytes": m.output_size_in_bytes - m.alias_size_in_bytes,
    "text": compiled.as_text() if text else "",
}))
"""


def compile_update(topology, rows_each, moments="float32", text=False):
    return tpu.run(PROGRAM, topology, rows_each, moments, text)


def test_7b_on_16_v5e():
    """15.75 GiB are usable; 12.6 is what a good program needs."""
    result = compile_update("v5e:4x4", rows_each=1, text=True)
    assert result["gib"] <= 12.6
    # The state goes out where it came in; only the metrics are new.
    assert result["new_output_bytes"] < 2**20

    # Logits are of 512 tokens of each of the 16 devices by a 16th of the vocabulary, 9504.
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([0-9,]+)\]", result["text"])
    sizes = {tuple(map(int, shape.split(","))) for shape in shapes}
    assert (8192, 9504) in sizes
    tokens = 5120
    for size in sizes:
        total = 1
        for n in size:
            total *= n
        if 152064 in size:
            assert total <= 152064 * 3584 // 16, size  # the table's shard
        assert total < tokens * 152064, size
    # No layer's weights are gathered in float32.
    gathers = re.findall(r"= (\w+)\[([0-9,]+)\][^=]*? all-gather", result["text"])
    assert ("bf16", "1,3584,18944") in gathers
    assert not [g for g in gathers if g[0] == "f32" and len(g[1]) > 12]


@pytest.mark.parametrize(
    ("topology", "rows_each", "moments", "most"),
    [
        ("v5e:4x4", 1, "bfloat16", 10.9),
        ("v5p:2x2x1", 2, "float32", 44.0),
        ("v5p:2x2x2", 2, "float32", 25.0),
    ],
)
@slow
def test_7b_on_other_slices(topology, rows_each, moments, most):
    assert compile_update(topology, rows_each, moments)["gib"] <= most


def test_what_does_not_fit_is_refused_with_the_number():
    with pytest.raises(RuntimeError, match=r"exceeds available HBM \(15\.75G\)|Used [0-9.]+G of"):
        compile_update("v5e:2x4", rows_each=1)


# Compiles the program that moves slots on, with rows as long as the paper's.
DECODING = """
import json, math, sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from cir_jax import mesh as meshes
from cir_jax.config import RolloutConfig, preset
from cir_jax.models import qwen
from cir_jax.rollout import decode
from cir_jax.rollout.sampling import Sampling

topology, tensor, name, num_slots, cache_dtype = json.loads(sys.argv[1])
devices = topologies.get_topology_desc(platform="tpu", topology_name=topology)
mesh = topologies.make_mesh(devices, (1, len(devices.devices) // tensor, tensor), meshes.AXES)
cfg, rollout, prompt, length = preset(name), RolloutConfig(), 1024, 5120
row_shards = mesh.size // tensor
prefill_rows = -(-rollout.prefill_rows // row_shards)

def placed(axes, tree):
    def one(axes, x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=meshes.sharding(mesh, *axes))
    return jax.tree.map(one, axes, tree, is_leaf=meshes.is_axes)

def rows(dtype, *shape):
    return placed(("batch",), jax.ShapeDtypeStruct((num_slots, *shape), dtype))

with jax.set_mesh(mesh):
    params = jax.eval_shape(
        lambda params: qwen.for_decoding(params, cfg, "bfloat16")[0], qwen.abstract_params(cfg)
    )
    params = placed(qwen.decoding_axes(params, cfg), params)
    slots = jax.eval_shape(lambda: decode.make_slots(
        cfg=cfg, dtype=cache_dtype, num_slots=num_slots, length=length
    ))
    slots = placed(decode.slots_axes(cache_dtype), slots)
    flags, numbers, shares = rows(bool), rows(jnp.int32), rows(jnp.float32)
    work = decode.Work(
        ends=flags, enters=flags, max_length=numbers, calls_left=numbers,
        keys=rows(jnp.uint32, 2), sampling=Sampling(shares, shares, numbers, shares),
        ids=rows(jnp.int32, prompt), count=numbers, source=numbers, is_output=flags,
        is_last=flags, queued=numbers,
    )
    table = placed((None, None), jax.ShapeDtypeStruct((30, cfg.vocab_size), jnp.int8))
    max_stopped = placed((), jax.ShapeDtypeStruct((), jnp.int32))
    compiled = decode.advance.lower(
        params, slots, work, table, rows(jnp.int32, 1), max_stopped, cfg=cfg,
        steps=rollout.segment_steps, end_ids=(0,), prefill_chunk=rollout.prefill_chunk,
        prefill_rows=prefill_rows,
    ).compile()

def local_bytes(tree):
    shapes = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * size for shape, size in shapes)

m = compiled.memory_analysis()
print(json.dumps({
    "gib": (m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
            + m.temp_size_in_bytes) / 2**30,
    "stacked": "attn" in params["layers"],
    "params": local_bytes(params) - ("head" in params) * local_bytes(params["embed"]),
    "cache": local_bytes(slots.cache),
    "layer_keys": local_bytes(jax.tree.leaves(slots.cache)[0]) // cfg.num_layers,
    "layers": cfg.num_layers,
    "blocks": slots.cache.length // slots.cache.block,
    # Float32 hidden states of a device's slots, and of the tokens that are put in at a time.
    "step_states": num_slots // row_shards * cfg.width * 4,
    "prefill_states": prefill_rows * rollout.prefill_chunk * cfg.width * 4,
    "text": compiled.as_text(),
}))
"""


@pytest.mark.parametrize(
    ("topology", "tensor", "model", "slots", "cache", "gib", "most_written"),
    [
        ("v5e:4x4", 4, "Qwen2.5-7B", 256, "bfloat16", 8.0, 0.01),
        # Fewer devices than key/value heads.
        ("v5e:2x2", 1, "Qwen2.5-1.5B", 64, "bfloat16", 5.2, 0.01),
        # What a device of 16 does for 256 slots.
        ("v5p:2x2x1", 4, "Qwen2.5-7B", 64, "bfloat16", 8.0, 0.1),
        pytest.param("v5e:2x4", 2, "Qwen2.5-7B", 128, "bfloat16", 11.8, 0.01, marks=slow),
        pytest.param("v6e:2x4", 4, "Qwen2.5-7B", 256, "bfloat16", 12.7, 0.01, marks=slow),
        # Scales are stored by layers.
        pytest.param("v5e:4x4", 4, "Qwen2.5-7B", 512, "int8", 8.5, 0.03, marks=slow),
    ],
)
def test_decoding(topology, tensor, model, slots, cache, gib, most_written):
    """All rows at the cache's end, 5120 positions, each step sampling from all tokens.

    gib: of one device, what the program needs; 15.75 are usable on v5e. most_written: share of
    what a step has to read that it may write. v5p leaves kernels' results no room outside of HBM.
    """
    result = tpu.run(DECODING, topology, tensor, model, slots, cache)
    assert result["stacked"] and result["gib"] <= gib
    compiled = hlo.parse(result["text"])
    trips = {
        "/decode/while/body/while": result["layers"],
        "/decode/while/body/while/body/closed_call/while": result["blocks"],
        "/sample/shard_map/while": 0,
        "/sample/while": 0,
    }
    step = hlo.traffic(compiled, trips=trips, loop="/decode/while")
    needed = result["params"] + result["cache"]
    # Small weights may be loaded once for all steps.
    assert 0.97 * needed <= step.read <= 1.15 * needed, str(step)
    assert step.written <= most_written * needed, str(step)
    # Prefill and prompts' forks too work in place. Before all loops, a weight may be laid out anew,
    # and the scales of int8; nothing as large as the keys is.
    for loop in ("/put_in/while", "/copy_prompts/while", "/decode/while"):
        assert hlo.large_writes(compiled, result["layer_keys"], loop=loop) == []
    assert hlo.large_writes(compiled, result["layers"] * result["layer_keys"], loop=None) == []
    # Float32 logits would be ten times the hidden states.
    for instruction, size in hlo.collectives(compiled):
        decodes = "/decode/" in instruction.op_name
        assert size <= result["step_states" if decodes else "prefill_states"], instruction
