"""Which factors of a picture an encoder keeps: the true caption against copies with one factor changed.

A contrastive model keeps what suffices to tell its batch apart and drops the rest (Robinson et al. 2021, "Can
contrastive learning avoid shortcut solutions?"). On Scenes every test picture carries, for each factor, its
long caption and false ones that differ in this factor alone, so what is kept can be read factor by factor.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vision_moe.embedding import PictureSet, embed_images, embed_texts
from vision_moe.intervals import wilson_interval
from vision_moe.retrieval import TIE

if TYPE_CHECKING:
    import torch


# By factor: the true caption, then the false ones.
Variants = dict[str, list[str]]


class PictureSlice:
    """Pictures of a data set from `start` to before `stop`, or to its end.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, dataset: PictureSet, start: int, stop: int | None = None) -> None:
        self._dataset = dataset
        self._range = range(len(dataset))[start:stop]
        if not self._range:
            raise ValueError(f"there is no picture from {start} to before {stop} in a data set of {len(dataset)}")

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._dataset[self._range[index]]

    def captions(self, index: int) -> list[str]:
        return self._dataset.captions(self._range[index])

    def metadata(self, index: int) -> dict[str, Any]:
        return self._dataset.metadata(self._range[index])


def is_nearest(image_D: NDArray[np.float32], variants_VD: NDArray[np.float32]) -> bool:
    """Whether the first of V unit text embeddings is strictly the nearest to a picture's; a tie is a miss."""
    scores_V = variants_VD @ image_D
    return bool((scores_V[0] > scores_V[1:] + TIE).all())


def factor_accuracy(
    model: Any,
    processor: Any,
    dataset: PictureSet,
    *,
    limit: int | None = None,
    batch_size: int = 64,
    autocast_dtype: "torch.dtype | None" = None,
) -> dict[str, dict[str, Any]]:
    """Share of pictures that are nearest to their true caption, among captions changed in one factor.

    Args:
        model: a dual encoder (CLIPModel, CLIPMoEModel), on any device.
        processor: its CLIPProcessor.
        dataset: pictures whose metadata hold "variants": {factor: [true caption, false captions...]}.
        limit: measure the first so many pictures only; None = all.
        batch_size: pictures a forward pass.
        autocast_dtype: run the forward passes under autocast in this type.

    Returns:
        {factor: {"accuracy", "n", "chance", "interval"}}, factors by name: shares in [0, 1]; chance is the mean
        of 1 / number of variants; interval is Wilson's, 95 %. A picture without variants of a factor is not in
        its n.

    Raises:
        ValueError: if no picture has variants (the train split has none), or a list of variants is too short
            or does not differ from the truth.
    """
    if limit is not None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1 (or None for all pictures), but got {limit}")
        dataset = PictureSlice(dataset, 0, limit)
    variants = read_variants(dataset)
    image_ND = embed_images(model, processor, dataset, batch_size=batch_size, autocast_dtype=autocast_dtype)
    hits = factor_hits(image_ND, variants, partial(embed_texts, model, processor, autocast_dtype=autocast_dtype))
    return {
        factor: _summary(list(found.values()), [1 / len(variants[index][factor]) for index in found])
        for factor, found in hits.items()
    }


def read_variants(dataset: PictureSet) -> list[Variants]:
    """The variants of every picture: {factor: [true caption, false captions...]}, empty where it has none.

    Raises:
        ValueError: as in `factor_accuracy`.
    """
    variants: list[Variants] = [dataset.metadata(i).get("variants", {}) for i in range(len(dataset))]
    _check(variants)
    return variants


def factor_hits(
    image_ND: NDArray[np.float32],
    variants: Sequence[Variants],
    embed: Callable[[list[str]], NDArray[np.float32]],
) -> dict[str, dict[int, bool]]:
    """Whether each picture is nearest to its true caption: {factor: {picture: hit}}, factors by name.

    Args:
        image_ND: unit embeddings of the pictures.
        variants: of each picture.
        embed: M texts -> their unit embeddings float32[M, D].
    """
    texts = list(dict.fromkeys(text for of in variants for texts in of.values() for text in texts))
    row_of = {text: row for row, text in enumerate(texts)}
    text_MD = embed(texts)
    hits: dict[str, dict[int, bool]] = {factor: {} for factor in sorted({name for of in variants for name in of})}
    for index, of in enumerate(variants):
        for factor, candidates in of.items():
            hits[factor][index] = is_nearest(image_ND[index], text_MD[[row_of[text] for text in candidates]])
    return hits


def _summary(hits: list[bool], chances: list[float]) -> dict[str, Any]:
    return {
        "accuracy": sum(hits) / len(hits),
        "n": len(hits),
        "chance": sum(chances) / len(chances),
        "interval": list(wilson_interval(sum(hits), len(hits))),
    }


def _check(variants: list[Variants]) -> None:
    if not any(variants):
        raise ValueError('no picture has "variants" in its JSON; use the test split of Scenes (vision_moe.data.scenes)')
    for index, of in enumerate(variants):
        for factor, texts in of.items():
            if len(texts) < 2 or texts[0] in texts[1:]:
                raise ValueError(
                    f"variants of factor {factor!r} of picture {index} must be [true caption, false ones...],"
                    f" the false ones different from the truth, but got {texts}"
                )
