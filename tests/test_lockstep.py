"""No computation on the mesh, and no agreement, under a condition that is one host's alone."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "cir_jax"

# What tells processes apart, and what all of them have to do together.
APART = {"process_index", "is_first", "hosts.index"}
TOGETHER = ("jax.", "jnp.", "multihost_utils.", "meshes.", "ocp.", "self._manager.")
TOGETHER += ("hosts.exchange", "hosts.gather", "hosts.of_first", "hosts.check_same")
TOGETHER += ("run.save", "run.evaluate", "checkpoints.", "engine.", "learner.", "update(")
# Reads no device and waits for none.
HARMLESS = {"jax.process_index", "jax.process_count", "jax.tree.map"}


def dotted(node):
    """`a.b.c` of a call's function, as far as it is one of names."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join(reversed([*parts, node.id])) if isinstance(node, ast.Name) else ""


def tells_apart(test):
    names = {dotted(n) for n in ast.walk(test)}
    return any(name in APART or name.split(".")[-1] in APART - {"hosts.index"} for name in names)


def conditional(tree):
    """Parts of the code that not all processes run, by the line of the condition."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.While | ast.IfExp) and tells_apart(node.test):
            branches = (node.body, node.orelse)
            parts = [p for b in branches for p in (b if isinstance(b, list) else [b])]
            yield from ((node.lineno, part) for part in parts)
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            yield from after_a_way_out(body if isinstance(body, list) else [])
        if isinstance(node, ast.BoolOp):
            for at, value in enumerate(node.values[:-1]):
                if tells_apart(value):
                    yield from ((node.lineno, part) for part in node.values[at + 1 :])


def after_a_way_out(body):
    """What comes after a condition that ends a function, or a turn of a loop."""
    ways_out = ast.Return | ast.Raise | ast.Continue | ast.Break
    for at, node in enumerate(body):
        if isinstance(node, ast.If) and tells_apart(node.test):
            if any(isinstance(n, ways_out) for part in node.body for n in ast.walk(part)):
                yield from ((node.lineno, part) for part in body[at + 1 :])


def faults(source):
    found = []
    for line, part in conditional(ast.parse(source)):
        for node in ast.walk(part):
            name = dotted(node.func) if isinstance(node, ast.Call) else ""
            if (
                name
                and name not in HARMLESS
                and any(f"{name}(".startswith(prefix) for prefix in TOGETHER)
            ):
                found.append((line, name))
    return found


def test_nothing_global_under_a_condition_of_one_host():
    found = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := faults(path.read_text()))
    }
    assert found == {}


def test_the_check_sees_what_it_should():
    assert faults("if jax.process_index() == 0:\n    x = jnp.sum(y)\n") == [(1, "jnp.sum")]
    assert faults("if hosts.is_first():\n    pass\nelse:\n    hosts.exchange('a', 1)\n")
    assert faults("if a and hosts.is_first():\n    run.save(s)\n")
    assert faults("hosts.is_first() and checkpoints.save(s)\n")
    assert faults("x = update(s) if hosts.index() == 0 else 0\n")
    assert faults("def f():\n    if not hosts.is_first():\n        return\n    jnp.sum(x)\n")
    assert not faults("if hosts.is_first():\n    path.write_text(text)\n")
    assert not faults("if hosts.count() > 1:\n    hosts.check_same(a=1)\n")
