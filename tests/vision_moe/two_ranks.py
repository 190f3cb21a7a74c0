"""Run by test_two_ranks.py twice, with RANK and WORLD_SIZE set: `python two_ranks.py DATA OUT MODEL`."""

import sys
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from transformers import CLIPModel, CLIPProcessor, TrainerState, TrainingArguments

from vision_moe.checkpoint import CheckpointMarker, last_checkpoint
from vision_moe.contrastive import contrastive_loss, sigmoid_loss
from vision_moe.data import open_captions
from vision_moe.distributed import barrier, gather, is_main, rank, world_size
from vision_moe.features import extract_features
from vision_moe.grad_cache import cached_step, split_batch
from vision_moe.router_bias import RouterBiasCallback
from vision_moe.upcycle import upcycle

BIAS = torch.tensor([-3.0])


class TwoTowers(nn.Module):
    """Two linear towers and a logit scale; weights are those of `inputs`."""

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.image_tower = nn.Parameter(inputs["image_tower"])
        self.text_tower = nn.Parameter(inputs["text_tower"])
        self.logit_scale = nn.Parameter(inputs["logit_scale"])

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        image_BD = normalize(images @ self.image_tower, dim=-1)
        text_BD = normalize(texts @ self.text_tower, dim=-1)
        return image_BD, text_BD, self.logit_scale.exp()


def losses_and_gradients(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss and every parameter gradient under DDP: InfoNCE in eight settings, the sigmoid loss in two."""
    own = slice(rank() * 4, rank() * 4 + 4)
    found = {}
    groupings = (("plain", None), ("groups", inputs["groups"][own]))
    for (name, groups_B), label_smoothing, tile in product(groupings, (0.0, 0.1), (None, 3)):
        model = DistributedDataParallel(TwoTowers({key: value.clone() for key, value in inputs.items()}))
        embeds = model(inputs["images"][own], inputs["texts"][own])
        loss = contrastive_loss(*embeds, groups_B=groups_B, label_smoothing=label_smoothing, tile=tile)
        loss.backward()
        prefix = f"{name}-{label_smoothing}-{tile}"
        found[f"{prefix}-loss"] = loss.detach()
        for key, parameter in model.module.named_parameters():
            found[f"{prefix}-{key}"] = parameter.grad
    for name, groups_B in (("plain", None), ("groups", inputs["groups"][own])):
        model = DistributedDataParallel(TwoTowers({key: value.clone() for key, value in inputs.items()}))
        loss = sigmoid_loss(*model(inputs["images"][own], inputs["texts"][own]), BIAS, groups_B=groups_B)
        loss.backward()
        found[f"sigmoid-{name}-loss"] = loss.detach()
        for key, parameter in model.module.named_parameters():
            found[f"sigmoid-{name}-{key}"] = parameter.grad
    return found


def choice_biases(dense: CLIPModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The routers' biases after one step of loss-free balancing over this rank's half of the batch."""
    own = slice(rank() * 2, rank() * 2 + 2)
    moe = upcycle(dense, router_std=1.0, router_bias_update_rate=0.01, router_bias_update="z_score").train()
    callback = RouterBiasCallback()
    callback.on_train_begin(None, None, None, model=moe)
    moe(input_ids=inputs["input_ids"][own], pixel_values=inputs["pixel_values"][own])
    callback.on_optimizer_step(None, None, None)
    return {name: tensor for name, tensor in moe.state_dict().items() if name.endswith("choice_bias")}


def cached_gradients(model: CLIPModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss and every gradient of a CLIP under DDP, this rank's two pairs one after the other."""
    own = slice(rank() * 2, rank() * 2 + 2)
    wrapped = DistributedDataParallel(model.train())
    loss, _ = cached_step(
        wrapped,
        split_batch({name: inputs[name][own] for name in ("input_ids", "pixel_values")}, 1),
        lambda image_BD, text_BD, scale: contrastive_loss(image_BD, text_BD, scale.exp()),
        [model.logit_scale],
        lambda outputs: None,
    )
    return {"cached-loss": loss, **{f"cached-{name}": p.grad for name, p in model.named_parameters()}}


def checkpoint_steps(out: Path) -> torch.Tensor:
    """The step that each rank goes on from, of three with a file from each rank, whose newest is then damaged."""
    for step in (1, 2, 3):
        folder = out / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rng_state_{rank()}.pth").write_bytes(bytes(100))
        CheckpointMarker().on_save(
            TrainingArguments(str(out / "checkpoints"), use_cpu=True, report_to=[]),
            TrainerState(global_step=step),
            None,
        )
    if is_main():
        # Rank 1 has written this file.
        (folder / "rng_state_1.pth").write_bytes(bytes(99))
    chosen = last_checkpoint(out / "checkpoints")
    assert chosen is not None
    return torch.tensor([int(chosen.rpartition("-")[2])])


def main(data: Path, out: Path, model_folder: Path) -> None:
    assert not dist.is_initialized()
    assert world_size() == 2
    dataset = open_captions(data, check_cache=out / "check.json", max_unreadable_share=0.5)
    # The first wait of a run sets the process group up.
    assert dist.is_initialized()
    found = losses_and_gradients(load_file(out / "inputs.safetensors"))
    found["checkpoint_step"] = checkpoint_steps(out)
    found["ranks"] = gather(torch.tensor([rank()]))
    model, processor = CLIPModel.from_pretrained(model_folder), CLIPProcessor.from_pretrained(model_folder)
    found |= choice_biases(model, load_file(out / "inputs.safetensors"))
    found |= cached_gradients(CLIPModel.from_pretrained(model_folder), load_file(out / "inputs.safetensors"))
    features = extract_features(
        model, dataset, processor, cache_dir=out / "features", batch_size=2, chunk_size=3, fingerprint="x"
    )
    found |= {"image": features.image_ND, "text": features.text_ND}
    save_file(found, out / f"rank{rank()}.safetensors")
    barrier()
    assert is_main() == (rank() == 0)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
