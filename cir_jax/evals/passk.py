"""pass@k: the probability that at least one of k samples is correct."""

import numpy as np


def pass_at_k(num: int, correct: int, k: int) -> float:
    """Unbiased estimate from `num` samples of one problem, of which `correct` are correct.

    1 - C(num - correct, k) / C(num, k), as a product of num - correct + ... factors in [0, 1], so
    that neither binomial is ever formed: 1 - prod over i in (num - correct, num] of (1 - k / i).

    Source: Codex, arXiv:2107.03374, equation 1 and figure 3.
    Raises ValueError unless 0 <= correct <= num and 1 <= k <= num.
    """
    if not 0 <= correct <= num:
        raise ValueError(f"correct={correct}: must be at least 0 and at most num={num}")
    if not 1 <= k <= num:
        raise ValueError(f"k={k}: must be at least 1 and at most num={num}, the samples there are")
    if num - correct < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(num - correct + 1, num + 1)))


def powers_of_two(num: int) -> list[int]:
    """1, 2, 4, ... up to num, and num itself: the values of k that tables and figures have."""
    ks = [2**i for i in range(num.bit_length()) if 2**i <= num]
    return ks if not ks or ks[-1] == num else [*ks, num]
