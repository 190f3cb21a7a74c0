"""Dialogues about pictures as training samples: `LlavaDataset`, the index behind it, and the check before a run."""

from mllm.data.dataset import LlavaDataset, Sample, SkippedSample, UnusableSampleError

__all__ = ["LlavaDataset", "Sample", "SkippedSample", "UnusableSampleError"]
