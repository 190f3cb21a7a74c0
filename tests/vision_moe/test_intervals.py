"""Intervals against values worked by hand and against their own meaning."""

import numpy as np
import pytest

from vision_moe.intervals import (
    bootstrap_mean_share_interval,
    bootstrap_ratio_interval,
    bootstrap_ratio_intervals,
    wilson_interval,
)


def test_wilson_matches_the_published_example():
    # Newcombe 1998, table I, method 3: 81 of 263 -> 0.2553 to 0.3662.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_wilson_stays_within_bounds_and_keeps_width_at_the_ends():
    low, high = wilson_interval(0, 10)
    assert low == 0.0
    assert high == pytest.approx(0.2775, abs=5e-5)
    assert wilson_interval(10, 10) == pytest.approx((1 - high, 1.0))


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes"):
        wilson_interval(successes, n)


def test_bootstrap_covers_the_mean_about_as_wide_as_the_normal_interval():
    hits = (np.arange(400) % 4 == 0).astype(float)[None]
    low, high = bootstrap_ratio_interval(hits, np.ones_like(hits), seed=0)
    # 1.96 * sqrt(0.25 * 0.75 / 400) = 0.0424
    assert low == pytest.approx(0.25 - 0.0424, abs=0.006)
    assert high == pytest.approx(0.25 + 0.0424, abs=0.006)


def test_bootstrap_draws_whole_units():
    # Ten units of 100 equal samples each are ten observations, so the interval is far wider than that of 1,000.
    numerators = np.array([[100.0, 0.0] * 5])
    low, high = bootstrap_ratio_interval(numerators, np.full((1, 10), 100.0), seed=0)
    assert high - low > 0.5


def test_bootstrap_repeats_with_its_seed_and_differs_with_another():
    rng = np.random.default_rng(0)
    numerators = rng.random((2, 50))
    first, again, other = (bootstrap_ratio_interval(numerators, np.ones((2, 50)), seed=s) for s in (1, 1, 2))
    assert first == again
    assert first != other


def test_intervals_of_single_ratios_are_those_of_one_ratio_at_a_time():
    numerators = np.random.default_rng(0).random((2, 50))
    together = bootstrap_ratio_intervals(numerators, np.ones((2, 50)), seed=1)
    alone = [bootstrap_ratio_interval(row[None], np.ones((1, 50)), seed=1) for row in numerators]
    np.testing.assert_allclose(together, alone)


def test_mean_share_is_about_as_wide_as_the_normal_interval_and_resamples_within_classes():
    low, high = bootstrap_mean_share_interval(np.array([100, 400]), np.array([400, 400]), seed=0)
    # Class 1 has no variance: 1.96 * sqrt(0.25 * 0.75 / 400) / 2 = 0.0212 on either side of (0.25 + 1) / 2.
    assert low == pytest.approx(0.625 - 0.0212, abs=0.003)
    assert high == pytest.approx(0.625 + 0.0212, abs=0.003)


@pytest.mark.parametrize(("hits", "sizes"), [([0], [0]), ([2], [1]), ([1, 1], [2])])
def test_mean_share_refuses_impossible_counts(hits, sizes):
    with pytest.raises(ValueError, match="need"):
        bootstrap_mean_share_interval(np.array(hits), np.array(sizes), seed=0)
