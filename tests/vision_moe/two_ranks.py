"""Run by test_two_ranks.py twice, with RANK and WORLD_SIZE set: `python two_ranks.py DATA OUT MODEL`."""

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import normalize
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModel,
    CLIPModel,
    CLIPProcessor,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from vision_moe.checkpoint import CheckpointMarker, last_checkpoint
from vision_moe.contrastive import contrastive_loss, sigmoid_loss
from vision_moe.data import open_captions
from vision_moe.data.collate import CaptionCollator
from vision_moe.data.read_config import ReadConfig
from vision_moe.data.shard_source import find_shards
from vision_moe.data.stream import CaptionStream
from vision_moe.data.stream_loader import StreamLoader, load_state
from vision_moe.data.tar_shards import TarShards
from vision_moe.distributed import barrier, gather, is_main, rank, world_size
from vision_moe.features import extract_features
from vision_moe.grad_cache import cached_step, split_batch
from vision_moe.moe.losses import AuxLossWeights, aux_loss
from vision_moe.moe.token_mean import mean_of_ranks
from vision_moe.router_bias import RouterBiasCallback
from vision_moe.trainer import ContrastiveTrainer
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


def router_losses(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each router loss over the tokens of both ranks, the first three of which are rank 0's, and its gradient here."""
    own = slice(0, 3) if is_main() else slice(3, None)
    found = {}
    for name in ("load_balance", "z", "importance", "load", "local_entropy", "global_entropy"):
        logits_TE = inputs["logits"][own].clone().requires_grad_()
        noisy_TE = logits_TE + inputs["noise"][own]
        loss = aux_loss(
            logits_TE,
            noisy_TE,
            inputs["valid"][own],
            top_k=2,
            noise_std=0.5,
            weights=AuxLossWeights(**{name: 1.0}),
            mean=mean_of_ranks,
        )
        (gradient_TE,) = torch.autograd.grad(loss, logits_TE)
        found |= {f"{name}-loss": loss.detach(), f"{name}-gradient": gradient_TE}
    return found


def mixture_gradients(kind: str, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Both losses and every gradient of a mixture under DDP, of this rank's two pairs."""
    own = slice(rank() * 2, rank() * 2 + 2)
    batch = {name: inputs[name][own] for name in ("input_ids", "attention_mask", "pixel_values")}
    # Held, as its hooks go with it.
    wrapped = DistributedDataParallel(model.train())
    outputs = wrapped(**batch)
    contrastive = contrastive_loss(outputs.image_embeds, outputs.text_embeds, model.logit_scale.exp())
    (contrastive + outputs.aux_loss).backward()
    found = {"contrastive": contrastive.detach(), "aux": outputs.aux_loss.detach()}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {f"{kind}-{name}": tensor for name, tensor in found.items()}


def cached_gradients(
    kind: str, model: PreTrainedModel, inputs: dict[str, torch.Tensor], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Losses and every gradient of a model under DDP, this rank's two pairs one after the other."""
    own = slice(rank() * 2, rank() * 2 + 2)
    wrapped = DistributedDataParallel(model.train())
    loss, aux_loss = cached_step(
        wrapped,
        split_batch({name: inputs[name][own] for name in names}, 1),
        lambda image_BD, text_BD, scale: contrastive_loss(image_BD, text_BD, scale.exp()),
        [model.logit_scale],
        lambda outputs: None,
    )
    found = {"contrastive": loss, **({} if aux_loss is None else {"aux": aux_loss})}
    found |= {name: parameter.grad for name, parameter in model.named_parameters()}
    return {f"cached-{kind}-{name}": tensor for name, tensor in found.items()}


class _StopAfterOneStep(TrainerCallback):
    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_training_stop = True


def streamed(shards: Path, out: Path, model_folder: Path) -> dict[str, torch.Tensor]:
    """Pictures that this rank trained on in three steps of a stream, and the weights then: at once, and in two goes."""
    collator = CaptionCollator(CLIPProcessor.from_pretrained(model_folder))
    found = {}
    for name, goes in (("unbroken", [[]]), ("resumed", [[_StopAfterOneStep()], []])):
        seen: list[int] = []
        for callbacks in goes:
            checkpoint = last_checkpoint(out / name)
            reader = TarShards(find_shards(str(shards), "train"))
            stream = CaptionStream(reader, ReadConfig(), rank=rank(), world_size=world_size())
            state = None if checkpoint is None else load_state(Path(checkpoint), rank())
            loader = StreamLoader(stream, collator, batch_size=2, state=state)
            trainer = _Watched(
                seen,
                model=CLIPModel.from_pretrained(model_folder),
                args=_stream_arguments(out / name),
                train_dataset=stream,
                stream_loader=loader,
                callbacks=[*callbacks, CheckpointMarker()],
            )
            trainer.train(resume_from_checkpoint=checkpoint)
        found[f"{name}-seen"] = torch.tensor(seen)
        found |= {f"{name}-{key}": tensor.contiguous() for key, tensor in trainer.model.state_dict().items()}
    return found


class _Watched(ContrastiveTrainer):
    """Notes which pictures it trains on."""

    def __init__(self, seen: list[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seen = seen

    def training_step(self, model: nn.Module, inputs: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        self.seen += inputs["index"].tolist()
        return super().training_step(model, inputs, *args)


def _stream_arguments(folder: Path) -> TrainingArguments:
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "remove_unused_columns": False}
    return TrainingArguments(str(folder), max_steps=3, save_steps=1, learning_rate=1e-3, **fixed)


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
    dataset = open_captions(data / "shards", check_cache=out / "check.json", max_unreadable_share=0.5)
    # The first wait of a run sets the process group up.
    assert dist.is_initialized()
    inputs = load_file(out / "inputs.safetensors")
    found = losses_and_gradients(inputs) | router_losses(inputs)
    found["checkpoint_step"] = checkpoint_steps(out)
    found["ranks"] = gather(torch.tensor([rank()]))
    model, processor = CLIPModel.from_pretrained(model_folder), CLIPProcessor.from_pretrained(model_folder)
    found |= choice_biases(model, inputs)
    found |= cached_gradients("dense", CLIPModel.from_pretrained(model_folder), inputs, ("input_ids", "pixel_values"))
    for kind in ("clip_moe", "limoe"):
        mixture = AutoModel.from_pretrained(model_folder / kind)
        found |= cached_gradients(kind, mixture, inputs, ("input_ids", "attention_mask", "pixel_values"))
    for kind in ("clip_moe", "limoe", "local"):
        found |= mixture_gradients(kind, AutoModel.from_pretrained(model_folder / kind), inputs)
    found |= streamed(data / "stream", out, model_folder)
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
