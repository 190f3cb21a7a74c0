"""95 % intervals of reported numbers: Wilson for shares, bootstrap for what several samples share."""

import math

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal."""


def wilson_interval(successes: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Score interval of a binomial share (Wilson 1927); well behaved at 0, at 1 and for small n.

    Args:
        successes: number of hits, in [0, n].
        n: number of trials, at least 1.
        z: normal quantile; the default gives 95 %.

    Returns:
        (low, high), both in [0, 1].

    Raises:
        ValueError: if n < 1 or successes lies outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"need 0 <= successes <= n and n >= 1, but got successes={successes} with n={n}")
    share = successes / n
    center = share + z * z / (2 * n)
    radius = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (center - radius) / scale), min(1.0, (center + radius) / scale)


def bootstrap_ratio_interval(
    numerators_RN: NDArray[np.float64],
    denominators_RN: NDArray[np.float64],
    *,
    seed: int,
    num_resamples: int = 1000,
) -> tuple[float, float]:
    """Percentile bootstrap over units of the mean of R ratios of sums (Efron 1979).

    A unit (say a picture with all its captions) is drawn as a whole: the captions of one picture are not
    independent of each other.

    Args:
        numerators_RN: float[R, N], what each of N units adds to the numerator of each ratio.
        denominators_RN: float[R, N], what it adds to the denominator.
        seed: of the resampling; the same seed gives the same interval.
        num_resamples: how many times the N units are drawn with replacement.

    Returns:
        (low, high): the 2.5 % and 97.5 % quantiles of mean_r(sum_n numerators / sum_n denominators).

    Raises:
        ValueError: if the shapes differ or there is no unit.
    """
    if numerators_RN.shape != denominators_RN.shape or numerators_RN.ndim != 2 or numerators_RN.shape[1] == 0:
        raise ValueError(
            f"need two float[R, N] of one shape with N >= 1, but got {numerators_RN.shape} and {denominators_RN.shape}"
        )
    rng = np.random.default_rng(seed)
    num_units = numerators_RN.shape[1]
    means = np.empty(num_resamples)
    for index in range(num_resamples):
        times_drawn_N = np.bincount(rng.integers(num_units, size=num_units), minlength=num_units)
        means[index] = np.mean((numerators_RN @ times_drawn_N) / (denominators_RN @ times_drawn_N))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
