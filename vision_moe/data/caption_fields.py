"""Captions in the metadata of a picture: all of them, or one drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vision_moe.data.read_config import ReadConfig, all_fields


def captions_of(metadata: dict[str, Any], fields: str, name: str) -> list[str]:
    """Captions of one picture, each on one line.

    Args:
        metadata: the picture's JSON or row.
        fields: key of the captions, or several joined by "+", whose captions are pooled; "captions" also finds a
            "caption", the second turn of ShareGPT4V's form, and "txt".
        name: what to call the picture in messages.

    Raises:
        ValueError: a field has none, or they are not text.
    """
    return [line for field in fields.split("+") for line in _field(metadata, field, name)]


def draw_caption(metadata: dict[str, Any], config: ReadConfig, name: str, key: Sequence[int]) -> str:
    """One caption of a picture, decided by `key` (seed, epoch, picture) alone.

    Raises:
        ValueError: as `captions_of`.
    """
    rng = np.random.default_rng(key)
    captions = captions_of(metadata, all_fields(config), name)
    if config.caption_weights is not None:
        weights = np.array(list(config.caption_weights.values()))
        field = list(config.caption_weights)[int(rng.choice(len(weights), p=weights / weights.sum()))]
        captions = captions_of(metadata, field, name)
    return captions[0] if len(captions) == 1 else captions[int(rng.integers(len(captions)))]


def _field(metadata: dict[str, Any], field: str, name: str) -> list[str]:
    found = metadata.get(field)
    if found is None and field == "captions":
        found = metadata.get("caption", metadata.get("txt", _described(metadata)))
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise ValueError(
            f"{name}: {field!r} must be a string or a list of strings, but got {found!r}; "
            f"its keys are {sorted(metadata)}"
        )
    lines = [" ".join(text.splitlines()).strip() for text in captions]
    if not all(lines):
        raise ValueError(f"{name}: {field!r} holds an empty caption")
    return lines


def _described(metadata: dict[str, Any]) -> str | None:
    """The caption of ShareGPT4V's form: what the assistant answers first."""
    turns = metadata.get("conversations")
    if isinstance(turns, list) and len(turns) > 1 and isinstance(turns[1], dict) and turns[1].get("from") != "human":
        return turns[1].get("value")
    return None
