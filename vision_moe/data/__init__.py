"""Captioned pictures, their batches, and the built-in data set Scenes."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision_moe.data.captions import CaptionDataset, open_captions
    from vision_moe.data.cluster_sampler import ClusterBatchSampler
    from vision_moe.data.collate import CaptionCollator
    from vision_moe.data.sampler import EpochBatchSampler

_HOMES = {"CaptionDataset": "captions", "open_captions": "captions", "CaptionCollator": "collate"}
_HOMES |= {"ClusterBatchSampler": "cluster_sampler", "EpochBatchSampler": "sampler"}
__all__ = ["CaptionCollator", "CaptionDataset", "ClusterBatchSampler", "EpochBatchSampler", "open_captions"]


def __getattr__(name: str) -> Any:
    # Lazy: drawing Scenes in many processes must not import torch in each.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
