"""What the models of an experiment get right, picture by picture, so that they can be compared in pairs.

R parts of a measure (two directions of retrieval, or the factors), N pictures, D embedding dim.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import stdev
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedModel

from eval.encoder import load_encoder
from vision_moe.data.captions import open_captions
from vision_moe.embedding import Pictures, PictureSet
from vision_moe.embedding_cache import CachedEncoder
from vision_moe.factors import PictureSlice, factor_hits, read_variants
from vision_moe.files import replacing
from vision_moe.intervals import bootstrap_ratio_interval
from vision_moe.retrieval import WAYS, Embeddings, all_captions, hits_by_picture, ranks


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """What is asked of a model."""

    kind: Literal["retrieval", "factors"]
    """Retrieval: R@1 in both directions; factors: the true caption among captions that differ in one factor."""
    data: Path
    """Folder of shards."""
    split: str = "test"
    """Shards `{split}-*.tar` are read."""
    caption_field: str = "long"
    """Captions that count in retrieval."""
    factors: list[str] = field(default_factory=list)
    """Factors that count; all if empty."""
    start: int = 0
    """First picture that is asked about."""
    stop: int | None = None
    """The one after the last; null = all to the end."""


class Hits(NamedTuple):
    """What was right: hits float[R, N] of questions float[R, N]; the score is the mean over R of the ratio of sums."""

    hits: NDArray[np.float64]
    questions: NDArray[np.float64]

    @property
    def score(self) -> float:
        """Share in [0, 1]."""
        return float((self.hits.sum(axis=1) / self.questions.sum(axis=1)).mean())


class Encoders:
    """One encoder, or several whose unit embeddings are averaged.

    Args:
        models: of one architecture.
        processor: of all of them.
        cache_dir: where the embeddings of each model are kept, so that an ensemble of measured models costs nothing.
        bf16: bfloat16 autocast.
    """

    def __init__(
        self, models: Sequence[PreTrainedModel], processor: Any, cache_dir: Path | None = None, bf16: bool = False
    ) -> None:
        dtype = torch.bfloat16 if bf16 else None
        self._encoders = [CachedEncoder(model, processor, cache_dir, autocast_dtype=dtype) for model in models]

    def images(self, pictures: Pictures, fingerprint: str) -> NDArray[np.float32]:
        """Unit embeddings float32[N, D]."""
        return _mean_direction([encoder.images(pictures, fingerprint) for encoder in self._encoders])

    def texts(self, texts: list[str]) -> NDArray[np.float32]:
        """Unit embeddings float32[len(texts), D]."""
        return _mean_direction([encoder.texts(texts) for encoder in self._encoders])


def measure(config: MeasureConfig, encoders: Encoders) -> Hits:
    """What the encoders get right.

    Raises:
        ValueError: the pictures have no such factors.
    """
    dataset = open_captions(config.data, split=config.split, caption_field=config.caption_field)
    pictures: PictureSet = PictureSlice(dataset, config.start, config.stop)
    image_ND = encoders.images(pictures, f"{dataset.fingerprint}[{config.start}:{config.stop}]")
    if config.kind == "retrieval":
        texts, image_of_text_M = all_captions(pictures)
        found = ranks(Embeddings(image_ND, encoders.texts(texts), image_of_text_M))
        return Hits(*hits_by_picture(found, image_of_text_M, 1))
    return _factors(part_names(config), read_variants(pictures), image_ND, encoders)


def part_names(config: MeasureConfig) -> list[str]:
    """Names of the R parts of a measure: both ways of retrieval, or the factors.

    Raises:
        ValueError: the pictures have no such factors.
    """
    if config.kind == "retrieval":
        return [way.replace("_", " ") for way in WAYS]
    dataset = open_captions(config.data, split=config.split, caption_field=config.caption_field)
    known = sorted({factor for of in read_variants(dataset) for factor in of})
    if missing := set(config.factors) - set(known):
        raise ValueError(f"{config.data}, split {config.split!r}, has no variants of {sorted(missing)}; it has {known}")
    return list(config.factors) or known


def cached(file: Path, compute: Callable[[], Hits]) -> Hits:
    """`compute()`, kept in a file."""
    if not file.is_file():
        found = compute()
        with replacing(file) as temporary:
            save_file({name: np.ascontiguousarray(array) for name, array in found._asdict().items()}, temporary)
    return Hits(**load_file(file))


def any_of(found: Sequence[Hits]) -> Hits:
    """The oracle: a picture's questions as the member answers them that gets most of them right."""
    return Hits(np.max([of.hits for of in found], axis=0), found[0].questions)


def mean_of(found: Sequence[Hits]) -> Hits:
    """The mean over seeds."""
    return Hits(np.mean([of.hits for of in found], axis=0), found[0].questions)


def difference(found: Sequence[Hits], other: Sequence[Hits]) -> dict[str, Any]:
    """What the first have above the others, each a mean over its seeds, paired picture by picture.

    Returns:
        "difference" and its 95 % "interval" (bootstrap over pictures).
    """
    a, b = mean_of(found), mean_of(other)
    interval = bootstrap_ratio_interval(a.hits - b.hits, a.questions, seed=0)
    return {"difference": a.score - b.score, "interval": list(interval)}


def summary(found: Sequence[Hits], baseline: Sequence[Hits]) -> dict[str, Any]:
    """Scores over the seeds, and the `difference` to the baseline's.

    Returns:
        "mean", "deviation" (None of one seed), "difference" and "interval".
    """
    scores = [hits.score for hits in found]
    return {
        "mean": mean_of(found).score,
        "deviation": stdev(scores) if len(scores) > 1 else None,
        **difference(found, baseline),
    }


def soup(models: Sequence[PreTrainedModel]) -> PreTrainedModel:
    """The first model with the mean of all weights (model soups, Wortsman et al. 2022, arXiv:2203.05482)."""
    states = [model.state_dict() for model in models]
    with torch.no_grad():
        for name, tensor in states[0].items():
            if tensor.is_floating_point():
                tensor.copy_(torch.stack([state[name] for state in states]).mean(dim=0))
    return models[0]


def load_all(folders: Sequence[Path]) -> tuple[list[PreTrainedModel], Any]:
    """Models of one architecture and their processor."""
    loaded = [load_encoder(str(folder)) for folder in folders]
    return [model for model, _ in loaded], loaded[0][1]


def _factors(
    names: Sequence[str],
    variants: Sequence[Mapping[str, list[str]]],
    image_ND: NDArray[np.float32],
    encoders: Encoders,
) -> Hits:
    asked = [{name: of[name] for name in names if name in of} for of in variants]
    hits = factor_hits(image_ND, asked, encoders.texts)
    hits_RN = np.zeros((len(names), len(variants)))
    questions_RN = np.zeros_like(hits_RN)
    for row, name in enumerate(names):
        for index, hit in hits[name].items():
            hits_RN[row, index], questions_RN[row, index] = hit, 1
    return Hits(hits_RN, questions_RN)


def _mean_direction(embeddings: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    mean_ND = np.mean(embeddings, axis=0)
    unit_ND: NDArray[np.float32] = mean_ND / np.linalg.norm(mean_ND, axis=1, keepdims=True)
    return unit_ND
