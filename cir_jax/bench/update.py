"""`cir-jax bench update`: gradients of a policy loss, against the machine's matmul ceiling.

With `--against torch` the same on transformers and torch, in the same run.
"""

import json
from typing import Any

from cir_jax.bench.contest import Figures, contest
from cir_jax.config import ConfigError, preset
from cir_jax.models import flops
from cir_jax.models.hf_config import to_hf_config

# Contenders by the name they are printed with.
SYSTEMS = {"cir_jax": "cir_jax.bench.update_jax", "torch": "cir_jax.bench.update_torch"}


def bench_update(
    *, model: str, batch: int, length: int, dtype: str, remat: str, rounds: int, against: str | None
) -> None:
    """Prints one line of JSON for each system, and one with the ratios if there are two.

    tokens_per_s: batch x length by the median step's seconds. mfu: model FLOPs (what the
    mathematics needs: remat does not count) per second, as a share of matmul_flops_per_s, the
    rate of one large matrix product on the same devices between the steps.
    peak_bytes: of the process's resident memory, libraries and compilation included.
    """
    try:
        cfg = preset(model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    setup = {"batch": batch, "length": length, "dtype": dtype}
    arguments = {SYSTEMS["cir_jax"]: setup | {"model": model, "remat": remat}}
    if against:
        # Given the config as it is, so that its process needs nothing of jax.
        arguments[SYSTEMS[against]] = setup | {"config": to_hf_config(cfg, "float32")}
    systems = [name for name, module in SYSTEMS.items() if module in arguments]
    results = contest(arguments, rounds)
    total = flops.train_flops(cfg, batch, length)
    lines = {
        system: _line(system, {"model": model} | setup, results[SYSTEMS[system]], total)
        for system in systems
    }
    for line in lines.values():
        print(json.dumps(line), flush=True)
    if against:
        ours, theirs = lines["cir_jax"], lines[against]
        ratios = {name: ours[name] / theirs[name] for name in ("tokens_per_s", "peak_bytes")}
        print(json.dumps({"bench": "update", "ratio": f"cir_jax/{against}"} | ratios), flush=True)


def _line(system: str, setup: dict[str, Any], figures: Figures, total_flops: int) -> dict[str, Any]:
    rate = total_flops / figures["seconds"]
    return (
        {"bench": "update", "system": system}
        | setup
        | figures
        | {
            "tokens_per_s": setup["batch"] * setup["length"] / figures["seconds"],
            "model_flops": total_flops,
            "mfu": rate / figures["matmul_flops_per_s"],
        }
    )
