"""The report of a config on a slice: what fits, what programs cost, and the RL step of them."""

import collections
from collections.abc import Mapping
from typing import Any

from cir_jax.aot import text, work
from cir_jax.aot.chips import Topology
from cir_jax.aot.compilation import Facts, Plan
from cir_jax.aot.cost import Cost
from cir_jax.aot.lengths import Lengths
from cir_jax.aot.phases import step_of
from cir_jax.config import Config
from cir_jax.models import flops

GIB = 2**30
_BUCKETS = (1024, 2048, 3072, 4096)


def make(
    cfg: Config,
    topology: Topology,
    plan: Plan,
    facts: Mapping[str, Facts],
    lengths: Lengths,
    price: float | None = None,
) -> dict[str, Any]:
    """Plain values, for JSON and for `text`. Seconds and rates are estimates, none measured."""
    programs = [_program(cfg, topology, plan, name, f, lengths) for name, f in facts.items()]
    fits = all(program["fits"] for program in programs)
    report: dict[str, Any] = {
        "config": cfg.name,
        "topology": topology.name,
        "chips": topology.num_chips,
        "devices": topology.num_devices,
        "usable_gib": topology.chip.hbm_gib,
        "note": text.NOTE,
        "fits": fits,
        "held_gib": {name: size / GIB for name, size in plan.held.items()},
        "rollout_gib": {"weights": plan.decode_bytes / GIB, "slots": plan.slots_bytes / GIB},
        "programs": programs,
    }
    if facts.get("rollout") and facts["rollout"].memory:
        report["decode"] = _decode_table(cfg, topology, plan, facts["rollout"])
    if fits and topology.chip.clock_hz and "update" in facts:
        report["step"] = step_of(cfg, topology, plan, facts, lengths, price)
    return report


def _program(
    cfg: Config, topology: Topology, plan: Plan, name: str, facts: Facts, lengths: Lengths
) -> dict[str, Any]:
    usable = topology.chip.hbm_gib
    line: dict[str, Any] = {
        "program": name,
        "compile_s": facts.compile_s,
        "host_gib": facts.host_bytes / GIB,
        "cached": facts.cached,
        "versions": dict(facts.versions),
        "top_buffers": [dict(buffer) for buffer in facts.buffers],
    }
    beside = sum(plan.held.values()) - sum(plan.held_args[name].values())
    if facts.memory is None:
        needed = facts.overflow["needed_gib"]
        return line | {"fits": False, "gib": needed, "live_gib": needed + beside / GIB}
    gib = facts.peak_bytes / GIB
    live = gib + beside / GIB
    line |= {"fits": live <= usable, "gib": gib, "live_gib": live}
    line["memory_gib"] = {kind: size / GIB for kind, size in facts.memory.items()}
    if name == "rollout":
        return line  # its parts have tables of their own
    if name not in work.MICRO_LOOPS:
        total = work.whole(facts)
        return line | {
            "estimate": estimate(total, topology),
            "ideal_s": total.traffic / topology.chip.hbm_bytes_per_s,
            "collectives": _collectives(total),
        }
    number = work.micro_batches(cfg, name, lengths)
    total = work.of_micro_batches(facts, name, number)
    tokens = number * work.micro_rows(cfg, name) * cfg.max_length
    model = work.model_flops(cfg, name, lengths)
    return line | {
        "micro_batches": number,
        "tokens": tokens,
        "model_flops": model,
        "estimate": estimate(total, topology),
        "ideal_s": model / (topology.num_devices * topology.chip.flops_per_s),
        "collectives": _collectives(total),
    }


def estimate(total: Cost, topology: Topology) -> dict[str, float | None]:
    """Seconds by the compiler's estimate and the model of the links."""
    return {
        "seconds": total.seconds(topology),
        "compute_s": total.compute_s(topology),
        "attention_s": total.kernels_s(topology),
        "blocking_s": total.links_s(topology, blocking=True),
        "overlapped_s": total.links_s(topology, blocking=False),
    }


def _collectives(total: Cost) -> list[dict[str, Any]]:
    """By kind, type and whether they block, the most bytes first."""
    sums: dict[tuple, list[int]] = collections.defaultdict(lambda: [0, 0])
    for c in total.collectives:
        counts = sums[c.kind, "+".join(c.dtypes), c.blocking]
        counts[0] += c.times
        counts[1] += c.times * c.bytes
    names = ("kind", "dtype", "blocking")
    lines = [
        dict(zip(names, key, strict=True)) | {"count": n, "bytes": b}
        for key, (n, b) in sums.items()
    ]
    return sorted(lines, key=lambda line: -line["bytes"])


# --- decoding


def _decode_table(
    cfg: Config, topology: Topology, plan: Plan, facts: Facts
) -> list[dict[str, Any]]:
    buckets = [b for b in _BUCKETS if b < plan.cache_length] + [plan.cache_length]
    return [decode_line(cfg, topology, plan, facts, bucket) for bucket in buckets]


def decode_line(
    cfg: Config, topology: Topology, plan: Plan, facts: Facts, bucket: int
) -> dict[str, Any]:
    step = work.of_decode_step(cfg, plan, facts, bucket)
    needed = work.decode_bytes(cfg, bucket)
    seconds = step.seconds(topology)
    ideal = max(
        needed / topology.chip.hbm_bytes_per_s,
        flops.decode_flops(cfg.model, cfg.rollout.slots, float(bucket))
        / (topology.num_devices * topology.chip.flops_per_s),
    )

    def rate(seconds: float | None) -> float | None:
        return seconds and cfg.rollout.slots / seconds / topology.num_chips

    return {
        "bucket": bucket,
        "bytes": step.traffic,
        "ideal_bytes": needed,
        "bytes_ratio": step.traffic / needed,
        "model_flops": flops.decode_flops(cfg.model, cfg.rollout.slots, float(bucket)),
        "estimate": estimate(step, topology),
        "ideal_s": ideal,
        "tokens_per_s_per_chip": rate(seconds),
        "ideal_tokens_per_s_per_chip": rate(ideal),
        "collectives": _collectives(step),
    }
