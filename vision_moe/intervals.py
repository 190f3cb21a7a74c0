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
    ratios_bR = _resampled_ratios(numerators_RN, denominators_RN, seed, num_resamples)
    return _percentiles(ratios_bR.mean(axis=1))


def bootstrap_ratio_intervals(
    numerators_RN: NDArray[np.float64],
    denominators_RN: NDArray[np.float64],
    *,
    seed: int,
    num_resamples: int = 1000,
) -> list[tuple[float, float]]:
    """The same for each of the R ratios by itself, from one drawing of the units; arguments as there."""
    ratios_bR = _resampled_ratios(numerators_RN, denominators_RN, seed, num_resamples)
    return [_percentiles(ratios_b) for ratios_b in ratios_bR.T]


def bootstrap_ratio_difference_interval(
    a: tuple[NDArray[np.float64], NDArray[np.float64]],
    b: tuple[NDArray[np.float64], NDArray[np.float64]],
    *,
    seed: int,
    num_resamples: int = 1000,
) -> tuple[float, float]:
    """Of what `bootstrap_ratio_interval` takes two of, B less A: every drawing of the units serves both.

    Args:
        a: numerators and denominators of A, float[R, N].
        b: those of B, over the same N units in the same order.
        seed: of the resampling.
        num_resamples: how often.

    Raises:
        ValueError: if the shapes differ or there is no unit.
    """
    if a[0].shape != b[0].shape:
        raise ValueError(f"need as many ratios and units of both, but got {a[0].shape} and {b[0].shape}")
    # Equal seeds draw equal units.
    ratios_a_bR, ratios_b_bR = (_resampled_ratios(*of, seed, num_resamples) for of in (a, b))
    return _percentiles(ratios_b_bR.mean(axis=1) - ratios_a_bR.mean(axis=1))


def bootstrap_mean_share_interval(
    hits_C: NDArray[np.int64], sizes_C: NDArray[np.int64], *, seed: int, num_resamples: int = 1000
) -> tuple[float, float]:
    """Percentile bootstrap of the mean over C classes of each class's share of hits, resampled within classes.

    Args:
        hits_C: int[C], hits of each class. Drawing its samples with replacement gives it a binomial number of them.
        sizes_C: int[C], samples of each class, at least 1.
        seed: of the resampling.
        num_resamples: how often.

    Raises:
        ValueError: if the shapes differ, or a class has no sample or more hits than samples.
    """
    if hits_C.shape != sizes_C.shape or hits_C.ndim != 1 or not len(sizes_C):
        raise ValueError(f"need two int[C] of one length, but got {hits_C.shape} and {sizes_C.shape}")
    if sizes_C.min() < 1 or (hits_C < 0).any() or (hits_C > sizes_C).any():
        raise ValueError("every class needs 0 <= hits <= samples and at least one sample")
    drawn_bC = np.random.default_rng(seed).binomial(sizes_C, hits_C / sizes_C, size=(num_resamples, len(sizes_C)))
    return _percentiles((drawn_bC / sizes_C).mean(axis=1))


def _resampled_ratios(
    numerators_RN: NDArray[np.float64], denominators_RN: NDArray[np.float64], seed: int, num_resamples: int
) -> NDArray[np.float64]:
    """float[num_resamples, R]."""
    if numerators_RN.shape != denominators_RN.shape or numerators_RN.ndim != 2 or numerators_RN.shape[1] == 0:
        raise ValueError(
            f"need two float[R, N] of one shape with N >= 1, but got {numerators_RN.shape} and {denominators_RN.shape}"
        )
    rng = np.random.default_rng(seed)
    num_ratios, num_units = numerators_RN.shape
    ratios_bR = np.empty((num_resamples, num_ratios))
    for index in range(num_resamples):
        times_drawn_N = np.bincount(rng.integers(num_units, size=num_units), minlength=num_units)
        ratios_bR[index] = (numerators_RN @ times_drawn_N) / (denominators_RN @ times_drawn_N)
    return ratios_bR


def _percentiles(values_b: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values_b, [0.025, 0.975])
    return float(low), float(high)
