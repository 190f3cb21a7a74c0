"""Comparison of two results for tests: one measure, equally strict for all dtypes and sizes."""

from torch import Tensor


def assert_close(name: str, actual: Tensor, expected: Tensor, ratio: float) -> None:
    """Fails where the root mean square of the error exceeds `ratio` times that of the expected values.

    Args:
        name: what is compared, for the message.
        actual: float[...].
        expected: float[...], same shape; all zeros ask for zeros.
        ratio: the bound.

    Raises:
        AssertionError: when shapes differ, a value is not finite, or the error is too large.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.isfinite().all(), f"{name}: {(~actual.isfinite()).sum()} of {actual.numel()} values are not finite"
    error, size = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    assert error <= ratio * size, f"{name}: relative RMS error {error / max(size, 1e-300):.2e}, allowed {ratio:.2e}"
