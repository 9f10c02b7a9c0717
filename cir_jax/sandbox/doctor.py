"""What a machine allows, and whether the sandbox holds on it, for people to read."""

from collections.abc import Callable
from typing import Literal

from cir_jax.sandbox import packages, probe
from cir_jax.sandbox.errors import SandboxError
from cir_jax.sandbox.pool import Sandbox


def examine(
    isolation: Literal["namespaces", "landlock"], runtime: str, say: Callable[[str], None] = print
) -> bool:
    """Says what the machine is like, which rungs it allows and how each attack ends.

    Args:
      runtime: as the key sandbox.runtime.


    Returns: whether programs can be run as asked for.
    """
    for name, value in probe.describe().items():
        say(f"{name}: {value}")
    try:
        found = packages.find(runtime)
        names = ", ".join(f"{name} {version}" for name, version in found.versions.items())
        say(f"packages for programs: {found.folder or 'as the trainer'} ({names})")
        for rung, reason in probe.try_rungs(found.interpreter).items():
            say(f"rung {rung}: {reason or 'works'}")
        with Sandbox(
            num_workers=1, isolation=isolation, attack=False, interpreter=found.interpreter
        ) as sandbox:
            say(f"attacks on rung {sandbox.rung}:")
            outcomes = sandbox.attack()
    except SandboxError as error:
        say(str(error))
        return False
    for outcome in outcomes:
        say(f"  {'held' if outcome.held else 'BROKEN'}  {outcome.name} ({outcome.said})")
    return all(outcome.held for outcome in outcomes)
