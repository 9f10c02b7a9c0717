"""What the machine reaches at best, measured beside a contender: products and reads."""

import time
from collections.abc import Callable

# Side of the square matrices whose product is the ceiling of computation.
SQUARE = 2048
PRODUCT_FLOPS = 2 * SQUARE**3
# Read once for the ceiling of memory: far more than caches hold.
READ_BYTES = 2**29
_TRIES = 5


def seconds(f: Callable[[], object]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def product_rate(product: Callable[[], object], num_devices: int = 1) -> float:
    """FLOPs/s of what multiplies two squares on each device, and waits for it."""
    return PRODUCT_FLOPS * num_devices / min(seconds(product) for _ in range(_TRIES))


def read_rate(read: Callable[[], object]) -> float:
    """Bytes/s of what reads READ_BYTES once, and waits for it."""
    return READ_BYTES / min(seconds(read) for _ in range(_TRIES))
