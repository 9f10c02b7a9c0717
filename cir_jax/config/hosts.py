"""Several processes of one run: how long they wait for each other."""

from cir_jax.config.base import PositiveFloat, Section


class HostsConfig(Section):
    """Several processes of one run, one per host of a slice; without effect in a run of one."""

    join_timeout_s: PositiveFloat = 900.0
    """Seconds until all processes have to be there; then those that are end with exit code 75."""
    peer_timeout_s: PositiveFloat = 120.0
    """Seconds without a sign of life after which a process counts as dead, and all others end with
    exit code 75; one whose connection breaks, as a killed one's does, is noticed at once."""
    stall_timeout_s: PositiveFloat = 1800.0
    """Seconds that a process may stay in one place, a compilation for example; then each prints
    where all of them are and the stacks of its threads, and ends with exit code 75."""
