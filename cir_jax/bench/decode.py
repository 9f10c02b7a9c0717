"""`cir-jax bench decode`: sampled tokens, against the limit that memory and products set.

With `--against` the same by transformers' generate and Tunix's Sampler, in the same run.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cir_jax.bench.contest import Figures, contest
from cir_jax.config import ModelConfig, preset
from cir_jax.models import flops
from cir_jax.models.hf_config import read_config, to_hf_config

# Contenders by the name they are printed with.
SYSTEMS = {
    "cir_jax": "cir_jax.bench.decode_jax",
    "transformers": "cir_jax.bench.decode_transformers",
    "tunix": "cir_jax.bench.decode_tunix",
}
_CEILING = "cir_jax.bench.ceiling_jax"
# What a contender imports that this package does not depend on, and how it is had.
_NEEDS = {
    "transformers": ("torch", "pip install torch"),
    # Tunix wants another safetensors than the transformers that this package depends on.
    "tunix": (
        "tunix",
        "pip install google-tunix jax into an environment of its own, --python is its interpreter",
    ),
}
_ITEMSIZE = {"float32": 4, "bfloat16": 2}


def bench_decode(
    *,
    model: str,
    directory: Path | None,
    slots: int,
    prompt: int,
    new: int,
    dtype: str,
    top_p: float,
    rounds: int,
    against: list[str],
    python: str,
) -> None:
    """Prints one line of JSON for each system, and one with the ratios to each of the others.

    directory: of Hugging Face's, whose weights are used; else random ones of the preset `model`.
    Every slot gets a prompt of random ids, none ends before its `new` tokens.
    python: interpreter of Tunix's process.

    tokens_per_s: slots x new by the median round's seconds, which the prompts' prefill is part
    of. share_of_limit, share_of_step_limit: of the two limits that `limit` describes.
    peak_bytes: of the process's resident memory, libraries and compilation included.
    Raises ValueError for an unknown preset, a directory that does not hold a model, or a
    contender that is not installed.
    """
    pythons = {"tunix": python}
    for system in against:
        _check_installed(system, pythons.get(system, sys.executable))
    cfg = read_config(directory) if directory else preset(model)
    setup = {"slots": slots, "prompt": prompt, "new": new, "dtype": dtype, "top_p": top_p}
    # Given the config as it is, so that no process needs more than its own libraries.
    weights = {"config": to_hf_config(cfg, dtype), "directory": str(directory or "")}
    systems = ["cir_jax", *against]
    results = contest(
        {_CEILING: {"dtype": dtype}} | {SYSTEMS[s]: setup | weights for s in systems},
        rounds,
        {SYSTEMS[s]: path for s, path in pythons.items()},
    )
    lines = {
        system: {"bench": "decode", "system": system, "model": str(directory or model)}
        | setup
        | results[SYSTEMS[system]]
        | {"tokens_per_s": slots * new / results[SYSTEMS[system]]["seconds"]}
        for system in systems
    }
    ours = lines["cir_jax"]
    ours |= limit(cfg, slots, prompt, new, _ITEMSIZE[dtype], results[_CEILING])
    for name in ("limit", "step_limit"):
        ours[f"share_of_{name}"] = ours["tokens_per_s"] / ours[f"{name}_tokens_per_s"]
    for line in lines.values():
        print(json.dumps(line), flush=True)
    for system in against:
        ratios = {n: ours[n] / lines[system][n] for n in ("tokens_per_s", "peak_bytes")}
        print(json.dumps({"bench": "decode", "ratio": f"cir_jax/{system}"} | ratios), flush=True)


def limit(
    cfg: ModelConfig, slots: int, prompt: int, new: int, itemsize: int, ceiling: Figures
) -> dict[str, Any]:
    """Tokens/s at most, and which of the machine's ceilings binds.

    A step, and the prefill before the first, take the longer of reading their bytes and computing
    their FLOPs, at the rates measured. The first step attends to the prompt, each further one to
    a position more.

    limit_tokens_per_s: with the prefill, as tokens_per_s is measured. step_limit_tokens_per_s:
    as if prompts came for nothing. limited_by: what binds a step.
    """
    length = prompt + (new - 1) / 2
    step_bytes = flops.decode_bytes(cfg, slots, length, itemsize)
    step_flops = flops.decode_flops(cfg, slots, length)
    # The prompt's last token is fed by the first step.
    prefill_flops = flops.prefill_flops(cfg, slots, prompt - 1)
    prefill_bytes = itemsize * flops.layer_params(cfg)

    def seconds(num_bytes: float, num_flops: float) -> dict[str, float]:
        return {
            "memory": num_bytes / ceiling["read_bytes_per_s"],
            "matmul": num_flops / ceiling["matmul_flops_per_s"],
        }

    step, prefill = seconds(step_bytes, step_flops), seconds(prefill_bytes, prefill_flops)
    binding = max(step, key=step.get)
    rates = {name: ceiling[name] for name in ("read_bytes_per_s", "matmul_flops_per_s")}
    return (
        rates
        | {"step_bytes": step_bytes, "step_flops": step_flops, "prefill_flops": prefill_flops}
        | {"limited_by": binding, "step_limit_tokens_per_s": slots / step[binding]}
        | {"limit_tokens_per_s": slots * new / (max(prefill.values()) + new * step[binding])}
    )


def _check_installed(system: str, python: str) -> None:
    package, how = _NEEDS[system]
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    try:
        missing = subprocess.run([python, "-c", code], check=False).returncode
    except OSError as error:
        raise ValueError(f"--python {python}: {error.strerror}") from error
    if missing:
        raise ValueError(f"--against {system}: {python} lacks {package}: {how}")
