"""Does a LLaVA look at the picture? `python -m mllm.caption_loss --model DIR --data JSON --image_folder DIR`.

The loss of held-out answers with their own picture, and with a blank one (the mean colour, all zeros after
normalisation). A model that ignores its pictures has the same loss twice.
"""

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import LlavaProcessor, PreTrainedModel

from mllm.collate import LlavaCollator
from mllm.conversation import IGNORE_INDEX
from mllm.data import LlavaDataset
from mllm.model import LlavaMoEForConditionalGeneration
from vision_moe.config import parse
from vision_moe.files import write_json
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CaptionLossConfig:
    """Compares the loss of answers with their picture and with a blank one.

    Example:
        .venv/bin/python -m mllm.caption_loss --model outputs/llava/model --data captions.json --image_folder images
    """

    model: Path
    """Folder of the LLaVA."""
    data: Path
    """LLaVA JSON whose samples all have pictures."""
    image_folder: Path
    """Folder that picture names are relative to."""
    output: Path | None = None
    """JSON file to write; the result is printed in any case."""
    limit: int | None = None
    """Samples to take from the beginning; all if None."""
    batch_size: int = 16
    """Samples per forward."""
    max_length: int = 2048
    """Longest sample in tokens."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where the model runs."""


def main() -> None:
    """Entry point."""
    setup_logging()
    config = parse(CaptionLossConfig)
    result = caption_loss(config)
    if config.output is not None:
        write_json(config.output, result)
    sys.stdout.write(json.dumps(result) + "\n")


class SampleLosses(NamedTuple):
    """Of N samples.

    Attributes:
        image_N: float64[N], nats over all supervised tokens of a sample, with its picture.
        blank_N: float64[N], with a blank one.
        tokens_N: int64[N], its supervised tokens.
    """

    image_N: Tensor
    blank_N: Tensor
    tokens_N: Tensor


def caption_loss(config: CaptionLossConfig) -> dict[str, Any]:
    """Measures both losses.

    Returns:
        "loss_image" and "loss_blank", nats per supervised token over all `num_tokens` tokens of `num_samples` samples;
        "share_image_better", the share of samples whose own loss is lower with their picture.

    Raises:
        ValueError: a sample has no picture, or is malformed.
    """
    losses = sample_losses(config)
    num_tokens = int(losses.tokens_N.sum())
    return {
        "loss_image": float(losses.image_N.sum()) / num_tokens,
        "loss_blank": float(losses.blank_N.sum()) / num_tokens,
        "share_image_better": float((losses.image_N < losses.blank_N).double().mean()),
        "num_tokens": num_tokens,
        "num_samples": len(losses.tokens_N),
    }


def sample_losses(config: CaptionLossConfig) -> SampleLosses:
    """Measures both losses of each sample; raises what `caption_loss` does."""
    model = LlavaMoEForConditionalGeneration.from_pretrained(config.model).to(config.device).eval()
    processor = LlavaProcessor.from_pretrained(config.model)
    dataset = LlavaDataset(
        config.data,
        config.image_folder,
        processor.tokenizer,
        processor.image_processor,
        model.config.conversation_template,
        num_image_tokens=model.config.image_seq_length,
        max_length=config.max_length,
    )
    if not all(dataset.has_image):
        raise ValueError(f"{config.data} has samples without a picture; remove them")
    number = len(dataset) if config.limit is None else min(config.limit, len(dataset))
    loader = DataLoader(
        Subset(dataset, range(number)),
        batch_size=config.batch_size,
        collate_fn=LlavaCollator(processor.tokenizer.pad_token_id),
    )
    parts = []
    for batch in tqdm(loader, disable=not sys.stderr.isatty()):
        batch = {name: tensor.to(config.device) for name, tensor in batch.items()}
        image_B, tokens_B = _answer_losses(model, batch)
        blank_B, _ = _answer_losses(model, {**batch, "pixel_values": torch.zeros_like(batch["pixel_values"])})
        parts.append((image_B.double().cpu(), blank_B.double().cpu(), tokens_B.cpu()))
    return SampleLosses(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@torch.inference_mode()
def _answer_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed loss of each sample's supervised tokens, float32[B], and their numbers, int64[B]."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    targets_BS = batch["labels"][:, 1:]
    supervised_BS = targets_BS != IGNORE_INDEX
    # The head is a large part of a small language model's cost.
    logits_NV = model.lm_head(model.model(**inputs).last_hidden_state[:, :-1][supervised_BS]).float()
    loss_BS = logits_NV.new_zeros(targets_BS.shape)
    loss_BS[supervised_BS] = cross_entropy(logits_NV, targets_BS[supervised_BS], reduction="none")
    return loss_BS.sum(dim=1), supervised_BS.sum(dim=1)


if __name__ == "__main__":
    main()
