"""What a machine allows, and whether the sandbox holds on it, for people to read."""

import sys
from collections.abc import Callable
from typing import Literal

from cir_jax.sandbox import canary, probe
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.pool import Sandbox


def examine(
    isolation: Literal["namespaces", "landlock"], say: Callable[[str], None] = print
) -> bool:
    """Says what the machine is like, which rungs it allows and how each attack ends.

    Returns: whether programs can be run as asked for.
    """
    for name, value in probe.describe().items():
        say(f"{name}: {value}")
    try:
        for rung, reason in probe.try_rungs(sys.executable).items():
            say(f"rung {rung}: {reason or 'works'}")
        with Sandbox(num_workers=1, isolation=isolation, attack=False) as sandbox:
            say(f"attacks on rung {sandbox.rung}:")
            outcomes = canary.attack(sandbox.submit, sandbox.limits, sandbox.rung)
    except SandboxError as error:
        say(str(error))
        return False
    for outcome in outcomes:
        say(f"  {'held' if outcome.held else 'BROKEN'}  {outcome.name} ({outcome.said})")
    return all(outcome.held for outcome in outcomes)
