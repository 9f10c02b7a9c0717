"""Layering: who may import whom, no cycles, and what imports without jax."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cir_jax import config as configs

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cir_jax"

BASE = {"config", "records", "metrics", "tokenizer", "mesh", "masked"}
BASE |= {"workers", "starting", "channel", "prctl", "prompts", "exits", "watchdog"}
BASE |= {"hosts", "peers", "sinks", "jitted", "output"}
STAGES = {"data", "models", "sandbox", "reward", "rl"}
# Layer (a folder, or a file of the package's top) -> layers it may import, besides its own.
ALLOWED = (
    {layer: BASE for layer in BASE | STAGES}
    | {
        "rollout": BASE | {"models", "sandbox"},
        "evals": BASE | {"models", "rollout", "reward", "data"},
        "analyses": {"config", "records", "metrics", "evals"},
        "report": BASE | {"arguments", "reward", "evals", "analyses"},
        "train": BASE | STAGES | {"rollout", "evals"},
        "__init__": set(),
    }
    | dict.fromkeys(
        (
            top := (
                "ablation",
                "aot",
                "arguments",
                "bench",
                "chat",
                "cli",
                "collect",
                "diff_runs",
                "drill",
                "evaluation",
                "parity",
                "verl",
            )
        ),
        BASE | STAGES | {"rollout", "evals", "analyses", "report", "train"} | set(top),
    )
)


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def layer_of(module):
    return (module.split(".") + ["__init__"])[1]


def imports(source, module, modules=MODULES):
    """Modules of the package that a source imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            # `from a import b`: b may be a module of its own.
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return {name for name in found if name.split(".")[0] == "cir_jax"}


def graph():
    return {name: imports(path.read_text(), name) for name, path in MODULES.items()}


def forbidden(edges):
    """Imports against the layering, as pairs (importing, imported)."""
    return sorted(
        (module, target)
        for module, targets in edges.items()
        for target in targets
        if layer_of(target) != layer_of(module)
        and layer_of(target) not in ALLOWED[layer_of(module)]
    )


def cycle(edges):
    """The modules left when those that import no other module left are taken away repeatedly."""
    left = dict(edges)
    while free := [m for m, targets in left.items() if not any(t in left for t in targets)]:
        for module in free:
            del left[module]
    return sorted(left)


def test_every_module_has_a_layer():
    assert {layer_of(module) for module in MODULES} <= set(ALLOWED)


def test_imports_follow_the_layers():
    assert forbidden(graph()) == []


def test_no_import_cycles():
    assert cycle(graph()) == []


def test_the_checks_see_what_they_should():
    source = "import cir_jax.a\nfrom cir_jax import b\ndef f():\n    from cir_jax.c import d, e\n"
    modules = {"cir_jax.b", "cir_jax.c.d"}
    found = imports(source, "cir_jax.x", modules)
    assert found == {"cir_jax.a", "cir_jax.b", "cir_jax.c.d", "cir_jax.c"}
    edges = {"cir_jax.rl.loss": {"cir_jax.models.qwen", "cir_jax.masked", "cir_jax.rl.batch"}}
    assert forbidden(edges) == [("cir_jax.rl.loss", "cir_jax.models.qwen")]
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def imported_by(statement):
    """Top-level names of the modules that a fresh interpreter holds after a statement."""
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "modules",
    [
        "config, records, cli",
        "analyses, report.page",
        "sandbox.pool, sandbox.zygote",
        "reward.score, reward.worker",
    ],
)
def test_imports_without_jax(modules):
    names = ", ".join(f"cir_jax.{name.strip()}" for name in modules.split(","))
    held = imported_by(f"import {names}")
    assert "cir_jax" in held
    assert not held & {"jax", "jaxlib", "flax", "torch", "transformers"}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda p: p.stem)
def test_config_file_parses(path, tmp_path, monkeypatch):
    """Where the weights and files that it names are, beside the directory of configs."""
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r'"((?:models|runs)/[^"]+)"', _with_bases(path)):
        Path(name).mkdir(parents=True, exist_ok=True)
    for name in re.findall(r'"(data/[^"]+)"', _with_bases(path)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    cfg = configs.load(path)
    assert cfg.name == path.stem
    header = path.read_text().split("name =")[0]
    command = rf"cir-jax (train|sft) {path.relative_to(ROOT)}( run_dir=\S+)?\n"
    assert re.search(command, header)
    assert re.search(r"TPU v\d\w+-\d+|2 CPU cores", _with_bases(path))


def _with_bases(path):
    text = path.read_text()
    base = re.search(r'^base = "(.*)"', text, re.MULTILINE)
    return text + (_with_bases(path.parent / base[1]) if base else "")
