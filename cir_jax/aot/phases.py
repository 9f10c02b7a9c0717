"""One step of RL, phase by phase, as the sum of what its programs cost."""

import math
from collections.abc import Mapping
from typing import Any

from cir_jax.aot import work
from cir_jax.aot.chips import Topology
from cir_jax.aot.compilation import Facts, Plan
from cir_jax.aot.lengths import Lengths
from cir_jax.config import Config
from cir_jax.models import flops


def step_of(
    cfg: Config,
    topology: Topology,
    plan: Plan,
    facts: Mapping[str, Facts],
    lengths: Lengths,
    price: float | None,
) -> dict[str, Any]:
    """Seconds by phase, estimated and ideal, and what the run takes. price: of a chip's hour.

    Taken to be: slots are always full, programs' results are there at once, and groups of rows
    whose text is put in are half full. The last rows of a step, which leave slots empty, come on
    top, and so do the host's own work, evaluations and checkpoints.
    """
    phases = _phases(cfg, topology, plan, facts, lengths)
    seconds = sum(phase["seconds"] for phase in phases.values())
    tokens = _responses(cfg) * (lengths.prompt + lengths.response)
    hours = seconds * cfg.rl.steps * topology.num_chips / 3600
    step = {
        "lengths": {
            "prompt": lengths.prompt,
            "response": lengths.response,
            "output": lengths.output,
            "outputs": lengths.outputs,
            "bucket": lengths.bucket(plan.cache_length),
        },
        "phases": phases,
        "seconds": seconds,
        "ideal_s": sum(phase["ideal_s"] for phase in phases.values()),
        "tokens": tokens,
        "tokens_per_s_per_chip": tokens / seconds / topology.num_chips,
        "steps": cfg.rl.steps,
        "chip_hours": hours,
    }
    return step if price is None else step | {"price": price, "cost": hours * price}


def _responses(cfg: Config) -> int:
    return cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt


def _phases(
    cfg: Config, topology: Topology, plan: Plan, facts: Mapping[str, Facts], lengths: Lengths
) -> dict[str, dict[str, float]]:
    chip, devices = topology.chip, topology.num_devices
    rollout = facts["rollout"]
    mesh = cfg.mesh.decoding
    groups_of = -(-cfg.rollout.prefill_rows // (mesh.data * mesh.fsdp)) * mesh.data * mesh.fsdp
    bucket = lengths.bucket(plan.cache_length)

    def phase(seconds: float, ideal_s: float) -> dict[str, float]:
        return {"seconds": seconds, "ideal_s": ideal_s}

    def by_flops(number: float) -> float:
        return number / (devices * chip.flops_per_s)

    def prefill(rows: float, tokens: int, longest: int) -> dict[str, float]:
        one = work.of_prefill(cfg, plan, rollout, tokens, longest).seconds(topology)
        ideal = by_flops(flops.prefill_flops(cfg.model, 1, tokens)) * rows
        return phase(math.ceil(rows / (groups_of / 2)) * one, ideal)

    steps = _responses(cfg) * lengths.response / cfg.rollout.slots
    one = work.of_decode_step(cfg, plan, rollout, bucket).seconds(topology)
    ideal = work.decode_bytes(cfg, bucket) / chip.hbm_bytes_per_s
    weights = work.whole(facts["weights"])
    forks = (_responses(cfg) - cfg.rollout.prompts_per_step) / (mesh.data * mesh.fsdp)
    fork = work.of_fork(rollout)
    phases = {
        "weights for decoding": phase(
            weights.seconds(topology), weights.traffic / chip.hbm_bytes_per_s
        ),
        "prompts": prefill(cfg.rollout.prompts_per_step, lengths.prompt, lengths.prompt),
        "forks": phase(forks * fork.seconds(topology), forks * fork.traffic / chip.hbm_bytes_per_s),
        "decode": phase(steps * one, steps * ideal),
        "outputs of programs": prefill(_responses(cfg) * lengths.outputs, lengths.output, bucket),
    }
    per_step = cfg.rollout.prompts_per_step // cfg.rl.minibatch_prompts
    for name in plan.programs:
        if name in work.MICRO_LOOPS and not name.startswith("sft"):
            runs = per_step * (cfg.rl.epochs if name.endswith("update") else 1)
            number = work.micro_batches(cfg, name, lengths)
            total = work.of_micro_batches(facts[name], name, number)
            ideal = by_flops(work.model_flops(cfg, name, lengths))
            phases[name] = phase(runs * total.seconds(topology), runs * ideal)
    return phases
