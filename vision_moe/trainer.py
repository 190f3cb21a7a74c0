"""One contrastive stage: transformers' Trainer with the batches and the loss of CLIP training."""

import logging
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments

from vision_moe.contrastive import contrastive_loss, sigmoid_loss
from vision_moe.data.stream_loader import StreamLoader, save_state
from vision_moe.distributed import world_size
from vision_moe.grad_cache import cached_step, split_batch
from vision_moe.modality_routing import modality_metrics
from vision_moe.model.families import ENCODER_BY_TYPE
from vision_moe.recipe import TrainConfig
from vision_moe.routing_metrics import RoutingMetrics
from vision_moe.sampled_trainer import SampledTrainer
from vision_moe.stage_recipe import StageConfig
from vision_moe.trackers import run_name
from vision_moe.zero import deepspeed_settings

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
        grad_cache_batch_size: pairs of a forward, see `vision_moe.grad_cache`; None: all of this rank's in one.
        loss_tile: rows of logits at a time, see `vision_moe.contrastive`; None: all.

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
        grad_cache_batch_size: int | None = None,
        loss_tile: int | None = None,
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
        self.grad_cache_batch_size = grad_cache_batch_size
        self.loss_tile = loss_tile
        if self.is_deepspeed_enabled:
            self.model.register_forward_hook(_with_temperature)
        self._terms: dict[str, list[Tensor]] = {}
        self._routing = RoutingMetrics()
        # The loss is a mean over the global batch already: the Trainer must not divide it by accumulation steps.
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The stream's loader, each rank's own: accelerate would read on rank 0 alone and send the batches out."""
        return super().get_train_dataloader() if self.stream_loader is None else self.stream_loader

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the weights, and this rank's place in the stream beside them."""
        super().save_model(output_dir, _internal_call)
        if self.stream_loader is not None:
            save_state(self.stream_loader, Path(output_dir or self.args.output_dir))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one batch, in chunks where there is a gradient cache."""
        if self.grad_cache_batch_size is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = self._prepare_inputs(inputs)
        groups_B = self._groups(inputs.pop("index"))
        unwrapped = self.accelerator.unwrap_model(model)
        contrastive, aux = cached_step(
            model,
            split_batch(inputs, self.grad_cache_batch_size),
            partial(self._contrastive_loss, groups_B=groups_B),
            self._temperature(unwrapped),
            partial(self._observe, unwrapped),
        )
        return self._total(contrastive, aux)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Contrastive loss over the batch of all ranks, plus the router losses of an MoE model."""
        groups_B = self._groups(inputs.pop("index"))
        outputs = model(**inputs)
        unwrapped = self.accelerator.unwrap_model(model)
        embeds = outputs.image_embeds, outputs.text_embeds
        temperature = self._temperature(outputs if self.is_deepspeed_enabled else unwrapped)
        contrastive = self._contrastive_loss(*embeds, *temperature, groups_B=groups_B)
        self._observe(unwrapped, outputs)
        loss = self._total(contrastive, getattr(outputs, "aux_loss", None))
        return (loss, outputs) if return_outputs else loss

    def _groups(self, index_B: Tensor) -> Tensor | None:
        return None if self.groups_N is None else self.groups_N[index_B.cpu()].to(self.args.device)

    def _temperature(self, holder: Any) -> tuple[Tensor, ...]:
        """What the contrastive loss reads beside the embeddings."""
        return (holder.logit_scale, holder.logit_bias) if self.pairwise else (holder.logit_scale,)

    def _contrastive_loss(self, image_BD: Tensor, text_BD: Tensor, *temperature: Tensor, groups_B: Any) -> Tensor:
        scale, *bias = temperature
        if self.pairwise:
            return sigmoid_loss(image_BD, text_BD, scale.exp(), *bias, groups_B=groups_B, tile=self.loss_tile)
        return contrastive_loss(
            image_BD,
            text_BD,
            scale.exp(),
            groups_B=groups_B,
            label_smoothing=self.label_smoothing,
            tile=self.loss_tile,
        )

    def _total(self, contrastive: Tensor, aux: Tensor | None) -> Tensor:
        """The sum of both losses, which are logged apart as well."""
        self._record("contrastive_loss", contrastive)
        if aux is None:
            return contrastive
        self._record("aux_loss", aux)
        return contrastive + aux

    def _observe(self, model: nn.Module, outputs: Any) -> None:
        """Keeps what a forward tells of the routing until it is logged."""
        self._routing.add(outputs)
        for name, value in modality_metrics(outputs, model.config).items():
            self._record(name, value)

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


def _with_temperature(model: nn.Module, args: Any, outputs: Any) -> None:
    """A forward hook: puts scale and bias of the logits into the outputs, as ZeRO-3 takes all parameters apart then."""
    for name in ("logit_scale", "logit_bias"):
        parameter = getattr(model, name, None)
        if parameter is not None:
            outputs[name] = parameter.clone()


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
        # Under DeepSpeed its settings say it.
        bf16=config.bf16 and config.deepspeed is None,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=config.logging_steps,
        save_steps=config.save_steps,
        save_total_limit=2,
        dataloader_num_workers=config.data.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        # Trackers come as callbacks.
        report_to=[],
        run_name=run_name(folder),
        disable_tqdm=not sys.stderr.isatty(),
        ddp_find_unused_parameters=False,
        deepspeed=None if config.deepspeed is None else deepspeed_settings(config.deepspeed, bf16=config.bf16),
    )


def _warmup(warmup_steps: float, num_steps: int) -> float:
    """A published warm-up of 200 steps must not swallow a short run: at most a tenth of the steps, and said so."""
    limit = math.ceil(num_steps / 10)
    if warmup_steps < 1 or warmup_steps <= limit:
        return warmup_steps
    logger.warning("warm-up of %d steps cut to %d: the stage has only %d steps", warmup_steps, limit, num_steps)
    return limit
