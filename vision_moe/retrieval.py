"""Zero-shot image-text retrieval: embeddings -> recall at k in both directions.

Shapes: N pictures, M captions (several a picture), D embedding dim.

Ties count against the model: a wrong candidate whose cosine is within `TIE` of the right one's stands before
it, so that a collapsed encoder scores 0 and not whatever the order of the data gives.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vision_moe.embedding import CaptionedPictures, PictureSet, embed_images, embed_texts
from vision_moe.intervals import bootstrap_ratio_interval, bootstrap_ratio_intervals

if TYPE_CHECKING:
    import torch

TIE = 1e-6
"""Closer cosines are equal: float32 products of equal rows differ by 1e-7 with their place in a matrix."""

WAYS = ("image_to_text", "text_to_image")

_SCORES_AT_ONCE = 1 << 25


class Embeddings(NamedTuple):
    """Unit embeddings of a captioned data set.

    image: float32[N, D]; text: float32[M, D]; image_of_text: int[M], the picture that each caption describes.
    """

    image: NDArray[np.float32]
    text: NDArray[np.float32]
    image_of_text: NDArray[np.int64]


class Ranks(NamedTuple):
    """How many wrong candidates stand before the first right one; 0 = found at the first place.

    image_to_text: int[N], wrong captions before the picture's best own one; text_to_image: int[M].
    """

    image_to_text: NDArray[np.int64]
    text_to_image: NDArray[np.int64]


def embed(
    model: Any,
    processor: Any,
    dataset: PictureSet,
    *,
    batch_size: int = 64,
    autocast_dtype: "torch.dtype | None" = None,
) -> Embeddings:
    """Embeds every picture and all of its captions (`dataset.captions(i)`); arguments as `embed_images`."""
    texts, image_of_text_M = all_captions(dataset)
    image_ND = embed_images(model, processor, dataset, batch_size=batch_size, autocast_dtype=autocast_dtype)
    text_MD = embed_texts(model, processor, texts, autocast_dtype=autocast_dtype)
    return Embeddings(image_ND, text_MD, image_of_text_M)


def all_captions(dataset: CaptionedPictures) -> tuple[list[str], NDArray[np.int64]]:
    """The M captions of all pictures, picture by picture, and int64[M], the picture that each describes."""
    captions = [dataset.captions(i) for i in range(len(dataset))]
    image_of_text_M = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
    return [text for texts in captions for text in texts], image_of_text_M


def ranks(embeddings: Embeddings, chunk: int | None = None) -> Ranks:
    """Ranks of the right answers in both directions, `chunk` rows of the similarity matrix at a time.

    Args:
        embeddings: see `Embeddings`; rows are taken to be unit vectors.
        chunk: rows a block; None = as many as make 32 million scores, about 0.4 GB.

    Raises:
        ValueError: if shapes do not fit, a value is not finite, or a picture has no caption.
    """
    image_ND, text_MD, image_of_text_M = embeddings
    num_images = len(image_ND)
    _check(embeddings)
    chunk = chunk or max(1, _SCORES_AT_ONCE // max(num_images, len(text_MD)))
    image_to_text_N = np.empty(num_images, dtype=np.int64)
    for start in range(0, num_images, chunk):
        scores_NM = image_ND[start : start + chunk] @ text_MD.T
        own_NM = image_of_text_M[None, :] == np.arange(start, start + len(scores_NM))[:, None]
        best_N1 = np.where(own_NM, scores_NM, -np.inf).max(axis=1, keepdims=True)
        image_to_text_N[start : start + chunk] = ((scores_NM >= best_N1 - TIE) & ~own_NM).sum(axis=1)
    text_to_image_M = np.empty(len(text_MD), dtype=np.int64)
    for start in range(0, len(text_MD), chunk):
        scores_MN = text_MD[start : start + chunk] @ image_ND.T
        own_M1 = image_of_text_M[start : start + chunk, None]
        right_M1 = np.take_along_axis(scores_MN, own_M1, axis=1)
        # The right picture reaches its own score, hence the 1.
        text_to_image_M[start : start + chunk] = (scores_MN >= right_M1 - TIE).sum(axis=1) - 1
    return Ranks(image_to_text_N, text_to_image_M)


def retrieval_metrics(
    embeddings: Embeddings, *, ks: Sequence[int] = (1, 5, 10), seed: int = 0, num_resamples: int = 1000
) -> dict[str, Any]:
    """`recalls` of the ranks of these embeddings; arguments and errors as there and in `ranks`."""
    return recalls(ranks(embeddings), embeddings.image_of_text, ks=ks, seed=seed, num_resamples=num_resamples)


def recalls(
    found: Ranks,
    image_of_text_M: NDArray[np.int64],
    *,
    ks: Sequence[int] = (1, 5, 10),
    seed: int = 0,
    num_resamples: int = 1000,
) -> dict[str, Any]:
    """Recall at k both ways, as COCO and Flickr report it (all captions of a picture are its right answers).

    Args:
        found: see `Ranks`.
        image_of_text_M: int[M], the picture that each caption describes.
        ks: the cut-offs.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.

    Returns:
        {"image_to_text": {"R@1": share, ...}, "text_to_image": {...}, "image_to_text_interval": {"R@1": [low,
        high], ...}, "text_to_image_interval": {...}, "mean_R@1": share, "mean_R@1_interval": [low, high],
        "num_images": N, "num_captions": M}; shares in [0, 1]; intervals are 95 %, bootstrap over pictures.
    """
    result: dict[str, Any] = {f"{way}{end}": {} for way in WAYS for end in ("", "_interval")}
    for k in ks:
        hits_2N, questions_2N = hits_by_picture(found, image_of_text_M, k)
        intervals = bootstrap_ratio_intervals(hits_2N, questions_2N, seed=seed, num_resamples=num_resamples)
        shares_2 = hits_2N.sum(axis=1) / questions_2N.sum(axis=1)
        for way, share, interval in zip(WAYS, shares_2.tolist(), intervals, strict=True):
            result[way][f"R@{k}"] = share
            result[f"{way}_interval"][f"R@{k}"] = list(interval)
    hits_2N, questions_2N = hits_by_picture(found, image_of_text_M, 1)
    interval = bootstrap_ratio_interval(hits_2N, questions_2N, seed=seed, num_resamples=num_resamples)
    return {
        **result,
        "mean_R@1": float((hits_2N.sum(axis=1) / questions_2N.sum(axis=1)).mean()),
        "mean_R@1_interval": list(interval),
        "num_images": len(found.image_to_text),
        "num_captions": len(found.text_to_image),
    }


def hits_by_picture(
    found: Ranks, image_of_text_M: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What each picture adds to R@k in either direction, in the order of `WAYS`; R@k is the ratio of the sums.

    Args:
        found: see `Ranks`.
        image_of_text_M: int[M], the picture that each caption describes.
        k: the cut-off.

    Returns:
        float[2, N] hits and float[2, N] questions: one a picture, and one a caption.
    """
    num_images = len(found.image_to_text)
    text_hits_N = np.bincount(image_of_text_M, weights=found.text_to_image < k, minlength=num_images)
    texts_N = np.bincount(image_of_text_M, minlength=num_images)
    hits_2N = np.stack([(found.image_to_text < k).astype(np.float64), text_hits_N])
    return hits_2N, np.stack([np.ones(num_images), texts_N.astype(np.float64)])


def retrieval(
    model: Any,
    processor: Any,
    dataset: PictureSet,
    *,
    batch_size: int = 64,
    seed: int = 0,
    autocast_dtype: "torch.dtype | None" = None,
) -> dict[str, Any]:
    """`retrieval_metrics` of a model on a data set, plus "num_distinct_captions".

    Fewer distinct captions than captions means that some questions have no single answer: two pictures share
    their words, the tie counts against the model, and 100 % cannot be reached.
    """
    embeddings = embed(model, processor, dataset, batch_size=batch_size, autocast_dtype=autocast_dtype)
    return {**retrieval_metrics(embeddings, seed=seed), "num_distinct_captions": num_distinct_captions(dataset)}


def num_distinct_captions(dataset: PictureSet) -> int:
    """How many different captions a data set has."""
    return len({text for i in range(len(dataset)) for text in dataset.captions(i)})


def _check(embeddings: Embeddings) -> None:
    image_ND, text_MD, image_of_text_M = embeddings
    if image_ND.ndim != 2 or text_MD.ndim != 2 or image_ND.shape[1] != text_MD.shape[1]:
        raise ValueError(f"need float[N, D] and float[M, D], but got {image_ND.shape} and {text_MD.shape}")
    if image_of_text_M.shape != (len(text_MD),):
        raise ValueError(f"need one picture index a caption, int[{len(text_MD)}], but got {image_of_text_M.shape}")
    if not (np.isfinite(image_ND).all() and np.isfinite(text_MD).all()):
        raise ValueError("an embedding is not finite, and comparisons with it mean nothing")
    missing = np.setdiff1d(np.arange(len(image_ND)), image_of_text_M)
    if missing.size or len(np.setdiff1d(image_of_text_M, np.arange(len(image_ND)))):
        raise ValueError(
            f"each of the {len(image_ND)} pictures needs a caption and each caption a picture; "
            f"pictures without: {missing[:5]}"
        )
