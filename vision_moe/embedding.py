"""Pictures and texts -> unit embeddings of a dual encoder, for evaluation.

Shapes: N pictures, M texts, D embedding dim.
"""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class Pictures(Protocol):
    """Pictures by position."""

    def __len__(self) -> int:
        """Number of pictures."""
        ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """A mapping with the PIL picture under "image"."""
        ...


class CaptionedPictures(Pictures, Protocol):
    """Pictures and their captions."""

    def captions(self, index: int) -> list[str]:
        """All captions of one picture."""
        ...


class PictureSet(CaptionedPictures, Protocol):
    """What evaluation needs of captioned pictures; `vision_moe.data.captions.CaptionDataset` is one."""

    def metadata(self, index: int) -> dict[str, Any]:
        """The picture's raw JSON."""
        ...


def embed_images(
    model: Any,
    processor: Any,
    dataset: Pictures,
    *,
    batch_size: int = 64,
    autocast_dtype: "torch.dtype | None" = None,
) -> NDArray[np.float32]:
    """Embeds every picture of a data set.

    Args:
        model: a dual encoder with `get_image_features` (CLIPModel, CLIPMoEModel, ...), on any device.
        processor: its processor.
        dataset: the pictures.
        batch_size: pictures a forward pass.
        autocast_dtype: run the forward pass under autocast in this type; None = the weights' own type.

    Returns:
        float32[N, D] with unit rows.

    Raises:
        ValueError: if the data set is empty or an embedding is not finite.
    """
    if len(dataset) == 0:
        raise ValueError("got a data set without pictures; check the folder and the split")
    blocks = []
    with _inference(model, autocast_dtype):
        for start in _progress(range(0, len(dataset), batch_size), "images"):
            images = [dataset[i]["image"] for i in range(start, min(start + batch_size, len(dataset)))]
            inputs = processor.image_processor(images=images, return_tensors="pt")
            # NaFlex takes integers beside the pixels.
            inputs = {
                name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
                for name, tensor in inputs.items()
            }
            blocks.append(_unit_rows(model.get_image_features(**inputs).pooler_output, "picture", start))
    return np.concatenate(blocks)


def embed_texts(
    model: Any,
    processor: Any,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    autocast_dtype: "torch.dtype | None" = None,
) -> NDArray[np.float32]:
    """Embeds texts; equal texts are run once and so get equal embeddings, whatever batch they fall into.

    Args:
        model: a dual encoder with `get_text_features`, on any device.
        processor: its processor; texts are cut at the text tower's positions (how many fill them is logged).
        texts: M texts.
        batch_size: texts a forward pass.
        autocast_dtype: as in `embed_images`.

    Returns:
        float32[M, D] with unit rows.

    Raises:
        ValueError: if there is no text or an embedding is not finite.
    """
    if not texts:
        raise ValueError("got no text to embed; check the caption field")
    from vision_moe.model.families import max_text_tokens, text_padding

    # By length, so that a batch holds little padding; then by the text itself, so that the order is fixed.
    unique = sorted(set(texts), key=lambda text: (len(text), text))
    max_length = max_text_tokens(model.config.get_text_config())
    padding = text_padding(model.config)
    blocks, num_full = [], 0
    with _inference(model, autocast_dtype):
        for start in _progress(range(0, len(unique), batch_size), "texts"):
            tokens = processor.tokenizer(
                unique[start : start + batch_size],
                padding=padding,
                truncation=True,
                max_length=max_length,
                return_attention_mask=True,
                return_tensors="pt",
            )
            mask = tokens["attention_mask"]
            num_full += int((mask.sum(dim=1) >= max_length).sum())
            # SigLIP's padding is part of the text.
            masked = {} if padding == "max_length" else {"attention_mask": mask.to(model.device)}
            output = model.get_text_features(input_ids=tokens["input_ids"].to(model.device), **masked)
            blocks.append(_unit_rows(output.pooler_output, "text", start))
    if num_full:
        logger.info(
            "%d of %d texts fill the text tower's %d tokens (cut if longer)",
            num_full,
            len(unique),
            max_length,
        )
    row_of = {text: row for row, text in enumerate(unique)}
    return np.concatenate(blocks)[[row_of[text] for text in texts]]


def _unit_rows(features: "torch.Tensor", noun: str, start: int) -> NDArray[np.float32]:
    features_ND = features.float()
    if not bool(features_ND.isfinite().all()):
        raise ValueError(f"an embedding is not finite (batch from {noun} {start} on); was the model loaded whole?")
    norms_N1 = features_ND.norm(dim=-1, keepdim=True)
    if not bool((norms_N1 > 0).all()):
        raise ValueError(f"an embedding is zero (batch from {noun} {start} on); was the model loaded whole?")
    embeds_ND: NDArray[np.float32] = (features_ND / norms_N1).cpu().numpy()
    return embeds_ND


@contextmanager
def _inference(model: Any, autocast_dtype: "torch.dtype | None") -> Iterator[None]:
    import torch

    was_training = model.training
    model.eval()
    autocast = torch.autocast(model.device.type, autocast_dtype) if autocast_dtype is not None else nullcontext()
    try:
        with torch.inference_mode(), autocast:
            yield
    finally:
        model.train(was_training)


def _progress(steps: range, noun: str) -> "tqdm[int]":
    return tqdm(steps, desc=f"embedding {noun}", leave=False, disable=not sys.stderr.isatty())
