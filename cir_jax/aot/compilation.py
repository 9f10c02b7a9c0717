"""Compiles a config's programs for a TPU slice, each in a process of its own, and keeps the result.

What was compiled is known again by the hash of the program as jax hands it over (StableHLO), the
compiler's options and the versions, in `~/.cache/cir_jax/aot`: a report is made of that.
"""

import dataclasses
import gzip
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cir_jax import config as configs
from cir_jax.aot.chips import Topology
from cir_jax.config import Config, ConfigError

CACHE = Path("~/.cache/cir_jax/aot")
_ENVIRONMENT = {
    # Of this process; libtpu is loaded for its compiler alone.
    "JAX_PLATFORMS": "cpu",
    # libtpu looks for no machine around it; any type will do, the topology is another matter.
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    # Another process may have libtpu loaded as well.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": "",
}


class CompilerError(Exception):
    """The compiler failed for another reason than memory."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config's programs on a slice, nothing compiled yet.

    held: bytes on each device that stay there through the run, by what they are. held_args: those
    of them that are arguments of a program. decode_bytes, slots_bytes: of decoding's weights and
    cache. cache_length, cache_block: its positions, and how many attention reads at a time.
    """

    programs: tuple[str, ...]
    held: Mapping[str, int]
    held_args: Mapping[str, Mapping[str, int]]
    decode_bytes: int
    slots_bytes: int
    cache_length: int
    cache_block: int


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the compiler says of a program.

    memory: bytes of a device: argument, output, alias, temp. None where it did not fit.
    overflow: needed_gib, usable_gib, then. buffers: the largest: bytes, shapes. text: optimized
    HLO. host_bytes: peak of the process that compiled, which took compile_s.
    """

    memory: Mapping[str, int] | None
    overflow: Mapping[str, float] | None
    buffers: tuple[Mapping[str, Any], ...]
    text: str
    compile_s: float
    host_bytes: int
    versions: Mapping[str, str]
    cached: bool

    @property
    def peak_bytes(self) -> int | None:
        """Of a device while the program runs: arguments, results and what it needs besides."""
        if self.memory is None:
            return None
        m = self.memory
        return m["argument"] + m["output"] - m["alias"] + m["temp"] + m["generated_code"]


def check_installed() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            "aot: libtpu, the compiler for TPUs, is missing: pip install 'cir_jax[tpu]'"
        )


def plan(cfg: Config, topology: Topology) -> Plan:
    answer = _child(cfg, topology, None, {})
    return Plan(**(answer | {"programs": tuple(answer["programs"])}))


def compile_program(
    cfg: Config, topology: Topology, name: str, options: Mapping[str, Any] | None = None
) -> Facts:
    """options: the compiler's, by name."""
    answer = _child(cfg, topology, name, options or {})
    facts = json.loads(gzip.decompress(Path(answer["facts"]).read_bytes()))
    return Facts(cached=answer["cached"], **(facts | {"buffers": tuple(facts["buffers"])}))


def _child(
    cfg: Config, topology: Topology, program: str | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as dump:
        request = {
            "config": configs.to_tree(cfg),
            "topology": topology.name,
            "program": program,
            "options": dict(options),
            "cache": str(CACHE.expanduser()),
            "dump": dump,
        }
        flags = [f"--xla_dump_to={dump}", "--xla_dump_hlo_as_text"]
        flags.append("--xla_dump_hlo_module_re=jit_.*")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "cir_jax.aot.child"],
            input=json.dumps(request),
            env=os.environ | _ENVIRONMENT | {"XLA_FLAGS": " ".join(flags)},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        what = f"{program or 'programs'} for {topology.name}"
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        if any("ConfigError" in line for line in lines[-1:]):
            raise ConfigError(lines[-1].split("ConfigError: ", 1)[-1])
        raise CompilerError(f"{what}: exit code {done.returncode}: " + "\n".join(lines[-5:]))
    return json.loads(done.stdout.splitlines()[-1])
