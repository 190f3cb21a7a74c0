"""Which samples share a row."""

from collections.abc import Sequence


def pack_rows(lengths: Sequence[int], row_length: int | None) -> list[list[int]]:
    """Spreads samples over as few rows as possible, and evenly, so that little padding is left.

    The longest sample that is left goes to the shortest row (Graham 1969, longest processing time first); the number of
    rows is the smallest with which no row exceeds `row_length`.

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
    num_rows = -(-sum(lengths) // row_length)
    while True:
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        loads = [0] * num_rows
        for number in descending:
            emptiest = loads.index(min(loads))
            rows[emptiest].append(number)
            loads[emptiest] += lengths[number]
        if max(loads) <= row_length:
            return [sorted(row) for row in rows]
        num_rows += 1
