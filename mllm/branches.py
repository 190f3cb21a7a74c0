"""Dialogues whose questions do not see each other, as trees.

What all questions begin with is the trunk, and each question with its answer a branch. A branch is computed as if its
question had been asked alone, while the trunk, with the picture, is computed once for all. B rows, S their length.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from mllm.conversation import IGNORE_INDEX

# input_ids, labels and position_ids, and segments: 0 for what all tokens after it see, n for the n-th branch.
Row = dict[str, list[int]]
_PADDING = -1


def join_branches(encoded: Sequence[tuple[list[int], list[int]]]) -> Row:
    """A row of the ids and labels of dialogues that begin alike; all labels are in the branches."""
    first, first_labels = encoded[0]
    unlabelled = next(index for index, label in enumerate(first_labels) if label != IGNORE_INDEX)
    trunk = _common_length([first[:unlabelled], *(ids for ids, _ in encoded)])
    return _join([(encoded[0], range(trunk)), *((pair, range(trunk, len(pair[0]))) for pair in encoded)])


def one_branch(input_ids: list[int], labels: list[int]) -> Row:
    """A row of a dialogue as it is: every token sees all before it."""
    return _join([((input_ids, labels), range(len(input_ids)))])


def collate_rows(rows: Sequence[Row], pad_token_id: int, *, additive_mask: bool = True) -> dict[str, Tensor]:
    """Pads rows to the longest and turns their segments into an attention mask.

    Args:
        rows: B rows.
        pad_token_id: fills input_ids.
        additive_mask: the mask is float32, 0 where a token may look and the lowest number elsewhere, as eager attention
            takes it; if False bool, as torch's scaled_dot_product_attention does.

    Returns:
        input_ids, labels and position_ids, int64[B, S]; attention_mask, [B, 1, S, S].
    """
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": pad_token_id, "labels": IGNORE_INDEX, "position_ids": 0, "segments": _PADDING}
    batch = {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in fill.items()
    }
    segments_BS = batch.pop("segments")
    earlier_SS = torch.ones(length, length, dtype=torch.bool).tril()
    same_BSS = segments_BS[:, None, :] == segments_BS[:, :, None]
    # Padding is its own segment: it sees itself, so that no softmax is over nothing, and nothing else sees it.
    trunk_BSS = (segments_BS[:, None, :] == 0) & (segments_BS[:, :, None] >= 0)
    seen_B1SS = (earlier_SS & (same_BSS | trunk_BSS))[:, None]
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(seen_B1SS.shape).masked_fill(~seen_B1SS, lowest) if additive_mask else seen_B1SS
    return {**batch, "attention_mask": mask}


def _join(segments: list[tuple[tuple[list[int], list[int]], range]]) -> Row:
    """A row of segments: each the ids and labels of a dialogue, and the positions of it that belong to the row."""
    row: Row = {"input_ids": [], "labels": [], "position_ids": [], "segments": []}
    for number, ((ids, labels), positions) in enumerate(segments):
        row["input_ids"] += [ids[position] for position in positions]
        row["labels"] += [labels[position] for position in positions]
        row["position_ids"] += positions
        row["segments"] += [number] * len(positions)
    return row


def _common_length(rows: list[list[int]]) -> int:
    """The number of tokens with which all rows begin alike."""
    columns = enumerate(zip(*rows, strict=False))
    return next((index for index, column in columns if len(set(column)) > 1), min(map(len, rows)))
