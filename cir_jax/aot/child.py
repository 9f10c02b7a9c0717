"""`python -m cir_jax.aot.child`: compiles one program of a config for a slice that is not here.

Reads a request from stdin (see `compilation.py`) and prints its answer, one line of JSON, last. A
process of its own, since a compiler that is given what it does not like may end it, and since
flags and the folder for its texts are read when libtpu is loaded.
"""

import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from cir_jax import config as configs
from cir_jax import mesh as meshes
from cir_jax.jitted import Jitted, device_bytes
from cir_jax.tokenizer import Tokenizer
from cir_jax.train import compiled

# Of the compiler's error, in the words of its two versions: needed, and usable.
_OVERFLOW = (
    re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)"),
    re.compile(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm"),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Packages whose version changes what is compiled, or how it is reported.
_PACKAGES = ("jax", "jaxlib", "libtpu")


def main() -> None:
    request = json.load(sys.stdin)
    cfg = configs.from_tree_alone(request["config"])
    mesh = meshes.make_mesh(cfg.mesh, _devices(request["topology"]))
    programs = {p.name: p for p in compiled.jitted(cfg, mesh, _end_ids(cfg))}
    if request["program"] is None:
        held = {name: device_bytes(tree) for name, tree in compiled.held(cfg, mesh).items()}
        own = {
            p.name: {what: device_bytes(p.args[i]) for i, what in p.held.items()}
            for p in programs.values()
        }
        answer: dict[str, Any] = {"programs": list(programs), "held": held, "held_args": own}
        cache = programs["rollout"].args[1].cache
        answer |= {"cache_block": cache.block, "cache_length": cache.length}
        names = ("decode_bytes", "slots_bytes")
        answer |= dict(zip(names, map(device_bytes, programs["rollout"].args), strict=False))
    else:
        answer = _compiled(programs[request["program"]], request)
    print(json.dumps(answer))


def _devices(name: str) -> list[jax.Device]:
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except jax.errors.JaxRuntimeError as error:
        raise configs.ConfigError(
            f"--topology={name!r}: libtpu knows no such slice: {str(error).splitlines()[0]}"
        ) from error


def _end_ids(cfg: configs.Config) -> tuple[int, ...]:
    """Of the tokenizer if it is here; else as many as Qwen's have: they are constants of a
    comparison."""
    directory = configs.asset_dir(cfg.tokenizer)
    return Tokenizer(directory).end_ids if directory.is_dir() else (0, 1)


def _compiled(program: Jitted, request: dict[str, Any]) -> dict[str, Any]:
    """Where the facts are, and whether they were there."""
    lowered = program.lower()
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    options = request["options"]
    identity = json.dumps([request["topology"], options, versions, lowered.as_text()])
    path = Path(request["cache"]) / f"{hashlib.sha256(identity.encode()).hexdigest()}.json.gz"
    cached = path.is_file()
    if not cached:
        facts = _compile(lowered, options, Path(request["dump"])) | {"versions": versions}
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}")
        aside.write_bytes(gzip.compress(json.dumps(facts).encode(), 6))
        aside.rename(path)
    return {"facts": str(path), "cached": cached}


def _compile(lowered: jax.stages.Lowered, options: dict[str, Any], dump: Path) -> dict[str, Any]:
    start = time.perf_counter()
    facts: dict[str, Any] = {"overflow": None, "memory": None, "buffers": [], "text": ""}
    try:
        executable = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        facts["overflow"] = overflow(str(error))
        if facts["overflow"] is None:
            raise
    else:
        analysis = executable.memory_analysis()
        names = ("argument", "output", "alias", "temp", "generated_code")
        facts["memory"] = {name: getattr(analysis, f"{name}_size_in_bytes") for name in names}
        # The executable's own text cannot be had where lookups run on the sparse cores.
        facts["text"] = _newest(dump, "*after_codegen.txt")
    report = _newest(dump, "*memory-usage-report.txt")
    facts["buffers"] = buffers(report)
    facts["compile_s"] = time.perf_counter() - start
    facts["host_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return facts


def _newest(dump: Path, pattern: str) -> str:
    """Of the program's own texts; constants are programs, too, small ones."""
    found = sorted(dump.glob(pattern), key=lambda path: path.stat().st_size)
    return found[-1].read_text() if found else ""


def overflow(message: str) -> dict[str, float] | None:
    for pattern in _OVERFLOW:
        if found := pattern.search(message):
            needed, usable = (float(found[i]) * _UNITS[found[i + 1]] / 2**30 for i in (1, 3))
            return {"needed_gib": needed, "usable_gib": usable}
    return None


def buffers(report: str) -> list[dict[str, Any]]:
    """The largest ones: bytes and, shortened, the shapes that lie there in turn."""
    lines = re.findall(r"^\s*\S+\(\s*\d+%\);\s*([\d.]+)([KMG])iB;[^;]*;[^;]*; (.*)$", report, re.M)
    return [
        {"bytes": int(float(size) * _UNITS[unit]), "shapes": shapes[:120]}
        for size, unit, shapes in lines[:10]
    ]


if __name__ == "__main__":
    main()
