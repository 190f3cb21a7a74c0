"""How soon a small CLIP image tower learns each factor of Scenes under direct supervision, no contrast.

.venv/bin/python scripts/bench/factor_probe.py --data outputs/scenes40k --position-std 0.5 --samples 16384
"""

import argparse

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionConfig, CLIPVisionModel

from vision_moe.data.captions import open_captions
from vision_moe.data.sampler import EpochBatchSampler
from vision_moe.data.scene_factors import FACTOR_VALUES

_FACTORS = ("shape", "color", "texture", "position")
_REPORT = 4096


def _tower(position_std: float) -> tuple[CLIPVisionModel, nn.ModuleList]:
    """The image tower of scenes_dense.yaml and a linear head per factor."""
    config = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        image_size=64,
        patch_size=8,
        attn_implementation="eager",
    )
    tower = CLIPVisionModel(config)
    nn.init.normal_(tower.embeddings.position_embedding.weight, std=position_std)
    return tower, nn.ModuleList([nn.Linear(192, len(FACTOR_VALUES[factor])) for factor in _FACTORS])


def _pixels(images: list[Image.Image]) -> torch.Tensor:
    stacked_BHWC = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    return (stacked_BHWC.permute(0, 3, 1, 2).float() / 255 - 0.45) / 0.27


def main() -> None:
    """Prints the training accuracy of each factor over the last 4,096 samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of Scenes")
    parser.add_argument("--position-std", type=float, default=0.02, help="start of the position embeddings")
    parser.add_argument("--samples", type=int, default=16384)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    dataset = open_captions(args.data, split="train", caption_field="long")
    tower, heads = _tower(args.position_std)
    optimizer = torch.optim.AdamW(
        [*tower.parameters(), *heads.parameters()], lr=args.learning_rate, weight_decay=0.1, betas=(0.9, 0.98)
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.02, total_iters=50)
    hits, seen = torch.zeros(len(_FACTORS)), 0
    for keys in EpochBatchSampler(len(dataset), args.batch, args.samples // args.batch, seed=0):
        indices = [index for index, _ in keys]
        truths = [dataset.metadata(index)["factors"] for index in indices]
        targets_FB = torch.tensor([[FACTOR_VALUES[f].index(truth[f]) for truth in truths] for f in _FACTORS])
        with torch.autocast("cpu", torch.bfloat16):
            pooled_BD = tower(_pixels([dataset.image(index) for index in indices])).pooler_output
            logits = [head(pooled_BD).float() for head in heads]
        loss = torch.stack(
            [cross_entropy(found, wanted) for found, wanted in zip(logits, targets_FB, strict=True)]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        hits += torch.tensor(
            [(found.argmax(1) == wanted).sum() for found, wanted in zip(logits, targets_FB, strict=True)]
        )
        seen += len(indices)
        if seen % _REPORT == 0:
            print(
                seen, {name: f"{100 * hit / _REPORT:.0f} %" for name, hit in zip(_FACTORS, hits.tolist(), strict=True)}
            )
            hits.zero_()


if __name__ == "__main__":
    main()
