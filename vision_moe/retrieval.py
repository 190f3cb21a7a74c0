"""Zero-shot image-text retrieval: embeddings -> recall at k in both directions.

Shapes: N pictures, M captions (several a picture), D embedding dim.

Ties count against the model: a wrong candidate whose cosine is within `TIE` of the right one's stands before
it, so that a collapsed encoder scores 0 and not whatever the order of the data gives.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vision_moe.embedding import PictureSet, embed_images, embed_texts
from vision_moe.intervals import bootstrap_ratio_interval

if TYPE_CHECKING:
    import torch

TIE = 1e-6
"""Closer cosines are equal: float32 products of equal rows differ by 1e-7 with their place in a matrix."""


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
    captions = [dataset.captions(i) for i in range(len(dataset))]
    image_of_text_M = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])
    image_ND = embed_images(model, processor, dataset, batch_size=batch_size, autocast_dtype=autocast_dtype)
    flat = [text for texts in captions for text in texts]
    text_MD = embed_texts(model, processor, flat, autocast_dtype=autocast_dtype)
    return Embeddings(image_ND, text_MD, image_of_text_M)


def ranks(embeddings: Embeddings, chunk: int = 1024) -> Ranks:
    """Ranks of the right answers in both directions, `chunk` rows of the similarity matrix at a time.

    Args:
        embeddings: see `Embeddings`; rows are taken to be unit vectors.
        chunk: rows a block; memory is about chunk * max(N, M) * 5 bytes.

    Raises:
        ValueError: if shapes do not fit, a value is not finite, or a picture has no caption.
    """
    image_ND, text_MD, image_of_text_M = embeddings
    num_images = len(image_ND)
    _check(embeddings)
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
    """Recall at k both ways, as COCO and Flickr report it (all captions of a picture are its right answers).

    Args:
        embeddings: see `Embeddings`.
        ks: the cut-offs.
        seed: of the bootstrap.
        num_resamples: of the bootstrap.

    Returns:
        {"image_to_text": {"R@1": share, ...}, "text_to_image": {...}, "mean_R@1": share, "mean_R@1_interval":
        [low, high] (95 %, bootstrap over pictures), "num_images": N, "num_captions": M}; shares in [0, 1].

    Raises:
        ValueError: as `ranks`.
    """
    found = ranks(embeddings)
    num_images = len(found.image_to_text)
    hits_N = (found.image_to_text == 0).astype(np.float64)
    text_hits_N = np.bincount(embeddings.image_of_text, weights=found.text_to_image == 0, minlength=num_images)
    texts_N = np.bincount(embeddings.image_of_text, minlength=num_images).astype(np.float64)
    low, high = bootstrap_ratio_interval(
        np.stack([hits_N, text_hits_N]),
        np.stack([np.ones(num_images), texts_N]),
        seed=seed,
        num_resamples=num_resamples,
    )
    image_to_text = {f"R@{k}": float((found.image_to_text < k).mean()) for k in ks}
    text_to_image = {f"R@{k}": float((found.text_to_image < k).mean()) for k in ks}
    return {
        "image_to_text": image_to_text,
        "text_to_image": text_to_image,
        "mean_R@1": float((hits_N.mean() + text_hits_N.sum() / texts_N.sum()) / 2),
        "mean_R@1_interval": [low, high],
        "num_images": num_images,
        "num_captions": len(found.text_to_image),
    }


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
    result = retrieval_metrics(embeddings, seed=seed)
    distinct = {text for i in range(len(dataset)) for text in dataset.captions(i)}
    return {**result, "num_distinct_captions": len(distinct)}


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
