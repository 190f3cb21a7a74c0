"""Which samples share a row."""

from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], row_length: int | None) -> list[list[int]]:
    """Spreads samples over rows so that little padding is left.

    The longest sample that is left goes to the shortest row (Graham 1969, longest processing time first). Of all
    numbers of rows with which no row exceeds `row_length`, the one with the fewest places is taken, and the largest of
    those: attention costs least in short rows.

    Args:
        lengths: tokens of each sample.
        row_length: longest row in tokens; None for one row of all.

    Returns:
        the numbers of the samples in each row, in ascending order.

    Raises:
        ValueError: there is no sample, or one is longer than a row.
    """
    if not lengths:
        raise ValueError("there are no samples to pack")
    if row_length is None:
        return [list(range(len(lengths)))]
    if max(lengths) > row_length:
        raise ValueError(f"a sample of {max(lengths)} tokens does not fit into a row of row_length={row_length}")
    descending = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    best: list[list[int]] = []
    fewest = 0
    for num_rows in range(len(lengths), -(-sum(lengths) // row_length) - 1, -1):
        rows, longest = _spread(descending, lengths, num_rows)
        if longest <= row_length and (not best or num_rows * longest < fewest):
            best, fewest = rows, num_rows * longest
    return [sorted(row) for row in best]


def _spread(descending: Sequence[int], lengths: Sequence[int], num_rows: int) -> tuple[list[list[int]], int]:
    """The rows, and the length of the longest."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads = [0] * num_rows
    for number in descending:
        emptiest = loads.index(min(loads))
        rows[emptiest].append(number)
        loads[emptiest] += lengths[number]
    return rows, max(loads)
