"""What of a run fits on a slice: mesh, remat, micro-batch, slots and length of the cache."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from cir_jax import config as configs
from cir_jax.aot import compilation, work
from cir_jax.aot.chips import Topology
from cir_jax.aot.compilation import Facts, Plan
from cir_jax.aot.lengths import Lengths
from cir_jax.config import Config
from cir_jax.config.keys import toml_text

# Lightest first.
_REMAT = ("none", "minimal", "full")
# Beyond these rows of a device, weights are gathered so rarely that more gain nothing.
_MOST_ROWS = 8
# Slots are tried in these shares of what is predicted, should that not fit.
_SHARES = (1.0, 0.9, 0.75, 0.5)

Note = Callable[[str], None]


def on_slice(cfg: Config, where: Topology) -> Config:
    """The run on another number of devices, with as many rows for each.

    Parameters are shared by all in training; decoding shares heads as far as there are key/value
    heads.
    """
    devices = where.num_devices
    tensor = math.gcd(devices, cfg.model.num_kv_heads)
    shards = cfg.mesh.data * cfg.mesh.fsdp

    def rows(micro_rows: int) -> int:
        return max(1, micro_rows // shards) * devices

    groups = devices // tensor
    return with_values(
        cfg,
        {
            "mesh": {"data": 1, "fsdp": devices, "tensor": 1, "decode_tensor": tensor},
            "rl": {"micro_rows": rows(cfg.rl.micro_rows)},
            "sft": {"micro_rows": rows(cfg.sft.micro_rows)},
            "rollout": {"slots": math.ceil(cfg.rollout.slots / groups) * groups},
        },
    )


def with_values(cfg: Config, sections: dict[str, dict[str, Any]]) -> Config:
    tree = configs.to_tree(cfg)
    for name, values in sections.items():
        tree[name] |= values
    return configs.from_tree_alone(tree)


def overrides(before: Config, after: Config) -> list[str]:
    """Of the command line, that make one of the other."""
    changed = configs.differences(before, after)
    return [f"{key}={toml_text(value)}" for key, (_, value) in sorted(changed.items())]


def fitted(cfg: Config, where: Topology, lengths: Lengths, note: Note) -> Config:
    """The run with what the search finds best; where nothing fits, with the least memory."""
    plan = compilation.plan(cfg, where)
    return _with_slots(_with_update(cfg, where, plan, lengths, note), where, plan, note)


# --- training


@dataclasses.dataclass(frozen=True)
class _Tried:
    """needed_gib: with all that is held beside the program, also of one that did not fit."""

    cfg: Config
    facts: Facts
    needed_gib: float
    fits: bool


def _try(cfg: Config, where: Topology, plan: Plan, program: str, note: Note) -> _Tried:
    facts = compilation.compile_program(cfg, where, program)
    beside = sum(plan.held.values()) - sum(plan.held_args[program].values())
    gib = facts.overflow["needed_gib"] if facts.overflow else facts.peak_bytes / 2**30
    gib += beside / 2**30
    fits = not facts.overflow and gib <= where.chip.hbm_gib
    what = f"remat={cfg.compute.remat}, micro_rows={cfg.rl.micro_rows}, slots={cfg.rollout.slots}"
    verdict = "fits" if fits else "does not fit"
    note(f"{where.name}: {program}, {what}: {gib:.2f} GiB, {verdict}")
    return _Tried(cfg, facts, gib, fits)


def _with_update(cfg: Config, where: Topology, plan: Plan, lengths: Lengths, note: Note) -> Config:
    """By the least estimated seconds; without clock, the lightest remat that fits."""
    best: tuple[float, Config] | None = None
    smallest = cfg
    for remat in _REMAT:
        tried, smallest = _most_rows(cfg, where, plan, remat, lengths, note)
        if tried is None:
            continue
        number = work.micro_batches(tried.cfg, "update", lengths)
        seconds = work.of_micro_batches(tried.facts, "update", number).seconds(where)
        if best is None or (seconds or 0.0) < best[0]:
            best = (seconds or 0.0, tried.cfg)
        if tried.cfg.rl.micro_rows >= _limit(cfg, lengths) * cfg.mesh.data * cfg.mesh.fsdp:
            # A heavier one has nothing to gain.
            break
    return best[1] if best else smallest


def _limit(cfg: Config, lengths: Lengths) -> int:
    """Rows of a device, a power of two: beyond it, micro-batches would not be filled."""
    shards = cfg.mesh.data * cfg.mesh.fsdp
    filled = lengths.rows(cfg, work.sequences(cfg, "update")) // shards
    return 2 ** int(math.log2(min(_MOST_ROWS, max(1, filled))))


def _most_rows(
    cfg: Config, where: Topology, plan: Plan, remat: str, lengths: Lengths, note: Note
) -> tuple[_Tried | None, Config]:
    """The most rows of a device that fit, of powers of two; and the run with one row.

    Memory is a constant and a part for each row: two sizes, fitting or not, tell the rest.
    """
    shards = cfg.mesh.data * cfg.mesh.fsdp

    def rows(each: int) -> _Tried:
        values = {"compute": {"remat": remat}, "rl": {"micro_rows": each * shards}}
        return _try(with_values(cfg, values), where, plan, "update", note)

    one = rows(1)
    if not one.fits:
        return None, one.cfg
    limit = _limit(cfg, lengths)
    if limit < 2:
        return one, one.cfg
    two = rows(2)
    if not two.fits:
        return one, one.cfg
    each = two.needed_gib - one.needed_gib
    room = where.chip.hbm_gib - two.needed_gib
    most = min(limit, 2 + int(room / each) if each > 0 else limit)
    found, size = two, 2 ** int(math.log2(most))
    while size > 2:
        tried = rows(size)
        if tried.fits:
            return tried, one.cfg
        size //= 2
    return found, one.cfg


# --- rollouts


def _with_slots(cfg: Config, where: Topology, plan: Plan, note: Note) -> Config:
    """The most slots, at most one for each response of a step; if there is not one for each group
    of devices, rows are shortened."""
    mesh = cfg.mesh.decoding
    groups = mesh.data * mesh.fsdp
    responses = cfg.rollout.prompts_per_step * cfg.rollout.samples_per_prompt
    first = _try(cfg, where, plan, "rollout", note)
    fixed = (sum(plan.held.values()) + plan.decode_bytes) / 2**30
    each = (first.needed_gib - fixed) / cfg.rollout.slots
    room = where.chip.hbm_gib - fixed
    most = min(int(room / each), responses) // groups * groups
    if most < groups:
        length = int(room / (each * groups) * plan.cache_length)
        length -= length % plan.cache_block
        if length <= cfg.data.max_prompt_tokens:
            return cfg
        values = {"slots": groups, "max_context": length}
        return with_values(cfg, {"rollout": values})
    for share in _SHARES:
        slots = max(groups, int(most * share) // groups * groups)
        if slots == cfg.rollout.slots and first.fits:
            return cfg
        changed = with_values(cfg, {"rollout": {"slots": slots}})
        tried = _try(changed, where, plan, "rollout", note)
        if tried.fits:
            return tried.cfg
    return tried.cfg
