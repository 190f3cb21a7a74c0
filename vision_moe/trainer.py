"""One contrastive stage: transformers' Trainer with the batches and the loss of CLIP training."""

import logging
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from vision_moe.contrastive import contrastive_loss, sigmoid_loss
from vision_moe.data.stream_loader import StreamLoader, save_state
from vision_moe.distributed import world_size
from vision_moe.modality_routing import modality_metrics
from vision_moe.model.families import ENCODER_BY_TYPE
from vision_moe.recipe import StageConfig, TrainConfig
from vision_moe.routing_metrics import RoutingMetrics
from vision_moe.sampled_trainer import SampledTrainer

logger = logging.getLogger(__name__)


class ContrastiveTrainer(SampledTrainer):
    """Trainer whose batches come from a batch sampler of (index, epoch) keys or a stream; loss: contrastive + aux_loss.

    The contrastive loss is the model's family's: InfoNCE, or SigLIP's with its `logit_bias`.

    Args:
        batch_sampler: yields this rank's keys of each global batch.
        stream_loader: gives this rank's batches instead; every checkpoint keeps its state, and it must be made from the
            state of the checkpoint that training resumes from.
        label_smoothing: of InfoNCE's cross-entropies.
        groups_N: int64[N], label of every sample; pairs of different label are no negatives. None: all are.

    Raises:
        ValueError: label smoothing with the sigmoid loss.
    """

    def __init__(
        self,
        *args: Any,
        batch_sampler: Sampler[Any] | None = None,
        stream_loader: StreamLoader | None = None,
        label_smoothing: float = 0.0,
        groups_N: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, batch_sampler=batch_sampler, **kwargs)
        self.stream_loader = stream_loader
        # A stream resumes by its own position; the Trainer would read and drop all batches before it.
        self.args.ignore_data_skip = stream_loader is not None
        family = ENCODER_BY_TYPE.get(self.model.config.model_type)
        self.pairwise = family is not None and family.loss == "sigmoid"
        if self.pairwise and label_smoothing:
            raise ValueError(f"label_smoothing is InfoNCE's; set it to 0 for a {self.model.config.model_type}")
        self.label_smoothing = label_smoothing
        self.groups_N = groups_N
        self._terms: dict[str, list[Tensor]] = {}
        self._routing = RoutingMetrics()
        # The loss is a mean over the global batch already: the Trainer must not divide it by accumulation steps.
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The stream's loader, each rank's own: accelerate would read on rank 0 alone and send the batches out."""
        return super().get_train_dataloader() if self.stream_loader is None else self.stream_loader

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the weights, and this rank's place in the stream beside them.

        In a checkpoint both come before trainer_state.json, without which it does not count as complete.
        """
        super().save_model(output_dir, _internal_call)
        if self.stream_loader is not None:
            save_state(self.stream_loader, Path(output_dir or self.args.output_dir))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Contrastive loss over the batch of all ranks, plus the router losses of an MoE model."""
        index_B = inputs.pop("index")
        outputs = model(**inputs)
        groups_B = None
        if self.groups_N is not None:
            groups_B = self.groups_N[index_B.cpu()].to(outputs.image_embeds.device)
        unwrapped = self.accelerator.unwrap_model(model)
        contrastive = self._contrastive_loss(unwrapped, outputs, groups_B)
        aux = getattr(outputs, "aux_loss", None)
        self._record("contrastive_loss", contrastive)
        self._routing.add(outputs)
        if aux is not None:
            self._record("aux_loss", aux)
        for name, value in modality_metrics(outputs, unwrapped.config).items():
            self._record(name, value)
        loss = contrastive if aux is None else contrastive + aux
        return (loss, outputs) if return_outputs else loss

    def _contrastive_loss(self, model: nn.Module, outputs: Any, groups_B: Tensor | None) -> Tensor:
        embeds = outputs.image_embeds, outputs.text_embeds
        if self.pairwise:
            return sigmoid_loss(*embeds, model.logit_scale.exp(), model.logit_bias, groups_B=groups_B)
        return contrastive_loss(
            *embeds, model.logit_scale.exp(), groups_B=groups_B, label_smoothing=self.label_smoothing
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the loss terms and the routing since the last log."""
        if self.stream_loader is not None:
            # Of all steps: without skipping, the Trainer counts from the resumption.
            self.state.epoch = self.state.global_step / self.state.max_steps
        if "loss" in logs:
            for name, values in self._terms.items():
                logs[name] = float(torch.stack(values).mean())
            self._terms = {}
            logs |= self._routing.pop(self.accelerator.unwrap_model(self.model).config)
        super().log(logs, start_time)

    def _record(self, name: str, value: Tensor) -> None:
        self._terms.setdefault(name, []).append(value.detach().float())


def training_arguments(config: TrainConfig, stage: StageConfig, folder: Path, num_steps: int) -> TrainingArguments:
    """TrainingArguments of one stage; the caller's sampler holds exactly `num_steps` batches."""
    num_processes = world_size()
    if config.global_batch_size % num_processes:
        raise ValueError(
            f"global_batch_size must be a multiple of the number of processes, but got "
            f"{config.global_batch_size} with {num_processes} processes"
        )
    return TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=num_steps,
        per_device_train_batch_size=config.global_batch_size // num_processes,
        learning_rate=stage.learning_rate,
        weight_decay=stage.weight_decay,
        adam_beta2=stage.adam_beta2,
        max_grad_norm=stage.max_grad_norm,
        lr_scheduler_type=stage.schedule,
        warmup_steps=_warmup(stage.warmup_steps, num_steps),
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        dataloader_num_workers=config.data.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=not sys.stderr.isatty(),
        ddp_find_unused_parameters=False,
        deepspeed=None if config.deepspeed is None else str(config.deepspeed),
    )


def _warmup(warmup_steps: float, num_steps: int) -> float:
    """A published warm-up of 200 steps must not swallow a short run: at most a tenth of the steps, and said so."""
    limit = math.ceil(num_steps / 10)
    if warmup_steps < 1 or warmup_steps <= limit:
        return warmup_steps
    logger.warning("warm-up of %d steps cut to %d: the stage has only %d steps", warmup_steps, limit, num_steps)
    return limit
