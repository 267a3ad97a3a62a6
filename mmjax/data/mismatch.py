"""Label noise in pairs: a share of them gets another pair's text."""

import numpy as np
from jaxtyping import Int


def mismatched(count: int, share: float, seed: int) -> Int[np.ndarray, " count"]:
    """For each of `count` pairs the pair whose text it has: another one for a `share` of them, its index for the rest.

    The texts of these pairs are permuted, so that each text still occurs once: round(share * count) pairs, at least two
    if any, chosen by the seed.

    >>> mismatched(5, 0.4, seed=0)
    array([0, 1, 4, 3, 2])
    """
    sources = np.arange(count)
    chosen = np.random.default_rng(seed).permutation(count)[: round(share * count)]
    sources[chosen] = np.roll(chosen, 1)
    return sources
