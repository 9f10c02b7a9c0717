"""The cost of a config's programs, for the lengths at hand."""

import functools
import math
from collections.abc import Mapping

from cir_jax.aot import hlo
from cir_jax.aot.compilation import Facts, Plan
from cir_jax.aot.cost import Cost, cost
from cir_jax.aot.lengths import Lengths
from cir_jax.config import Config
from cir_jax.models import flops

# Functions whose loop over micro-batches is open, by program.
MICRO_LOOPS = {
    "update": "update",
    "sft update": "update",
    "critic update": "update",
    "old log-probabilities": "old_logprobs",
    "reference log-probabilities": "old_logprobs",
    "values": "old_values",
}
# What a function's name is followed by, on one device or on several.
_OVER = ("", "/shard_map")
# Loops of the rollout's program, by the ends of their names.
_DECODE, _PUT_IN, _COPY = "/decode/while", "/put_in/while", "/copy_prompts/while"


_parsed = functools.lru_cache(maxsize=8)(hlo.parse)


def sequences(cfg: Config, name: str) -> int:
    """Of one run of such a program."""
    of_rl = cfg.rl.minibatch_prompts * cfg.rollout.samples_per_prompt
    return cfg.sft.batch_size if name.startswith("sft") else of_rl


def micro_rows(cfg: Config, name: str) -> int:
    return cfg.sft.micro_rows if name.startswith("sft") else cfg.rl.micro_rows


def micro_batches(cfg: Config, name: str, lengths: Lengths) -> int:
    """That such sequences fill."""
    return math.ceil(lengths.rows(cfg, sequences(cfg, name)) / micro_rows(cfg, name))


def of_micro_batches(facts: Facts, name: str, number: int) -> Cost:
    """Of a program over so many of them."""
    function = f"jit({MICRO_LOOPS[name]})"
    trips = {f"{function}{over}/while": number for over in _OVER}
    return cost(_parsed(facts.text), trips=trips, loop=None)


def whole(facts: Facts) -> Cost:
    """Of a program without open loops."""
    return cost(_parsed(facts.text), trips={}, loop=None)


def model_flops(cfg: Config, name: str, lengths: Lengths) -> int:
    """Of one run of such a program, analytic: what the mathematics needs."""
    of = flops.train_flops if name.endswith("update") else flops.forward_flops
    return of(cfg.model, sequences(cfg, name), lengths.prompt + lengths.response)


def of_decode_step(cfg: Config, plan: Plan, facts: Facts, bucket: int) -> Cost:
    """Of a step in which every device's longest row has this length."""
    blocks = math.ceil(bucket / plan.cache_block)
    return _of_loop(cfg, facts, _DECODE, {"/body/while": cfg.model.num_layers}, blocks)


def of_prefill(cfg: Config, plan: Plan, facts: Facts, tokens: int, bucket: int) -> Cost:
    """Of one group of rows, of all devices, into which so many tokens each are put."""
    chunks = math.ceil(tokens / cfg.rollout.prefill_chunk)
    blocks = math.ceil(bucket / plan.cache_block)
    trips = {"/body/while": chunks, "/body/while/body/while": cfg.model.num_layers}
    return _of_loop(cfg, facts, _PUT_IN, trips, blocks)


def of_fork(facts: Facts) -> Cost:
    """Of the copy of one prompt."""
    return cost(_parsed(facts.text), trips={}, loop=_COPY)


def _of_loop(cfg: Config, facts: Facts, loop: str, trips: Mapping[str, int], blocks: int) -> Cost:
    """One iteration. trips: of loops within, the last of them over layers."""
    layers = list(trips)[-1]
    inner = {loop + end: number for end, number in trips.items()}
    # Attention's blocks; and restricted sampling, which a run without it never enters.
    inner |= {f"{loop}{layers}/body/closed_call/while": blocks}
    inner |= {f"/sample{over}/while": 0 for over in _OVER}
    idle = tuple(f"/sample{over}/cond" for over in _OVER)
    return cost(_parsed(facts.text), trips=inner, loop=loop, idle=idle)


def decode_bytes(cfg: Config, bucket: int) -> float:
    """That one device has to read in a decode step: its weights, its rows' keys and values."""
    mesh = cfg.mesh.decoding
    rows = cfg.rollout.slots // (mesh.data * mesh.fsdp)
    itemsize = 2 if cfg.compute.dtype == "bfloat16" else 4
    weights = flops.decode_bytes(cfg.model, 0, 0.0, itemsize)
    cached = flops.decode_bytes(cfg.model, rows, float(bucket), 1) - weights / itemsize
    # Quantized: a byte, and a scale for each vector.
    of_cache = itemsize if cfg.rollout.cache_dtype == "compute" else 1 + 4 / cfg.model.head_dim
    return (weights + cached * of_cache) / mesh.tensor
