"""Runs one training stage so that a killed run goes on, and a finished one is not run twice."""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from vision_moe.checkpoint import last_checkpoint, write_folder
from vision_moe.data.captions import CaptionDataset
from vision_moe.data.collate import CaptionCollator
from vision_moe.data.sampler import ClusterBatchSampler, EpochBatchSampler
from vision_moe.distributed import barrier, is_main, rank, world_size
from vision_moe.files import write_json
from vision_moe.freeze import set_trainable
from vision_moe.model.families import ENCODER_BY_TYPE, text_padding
from vision_moe.muon import MuonAdamW
from vision_moe.recipe import MoEConfig, StageConfig, TrainConfig
from vision_moe.router_bias import RouterBiasCallback
from vision_moe.tracking import MetricsCallback
from vision_moe.trainer import ContrastiveTrainer, training_arguments

logger = logging.getLogger(__name__)

# Stages that make the dense start: they learn the logit scale, as CLIP's own training does.
_START_STAGES = ("align", "dense")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage trains, on which batches."""

    name: str
    """Folder below the run's output."""
    config: StageConfig
    """Optimisation."""
    trainable: str
    """Part that trains, see vision_moe.freeze: "all", "text", "projections", "ffn" or "router"."""
    samples: int
    """Pairs seen."""
    labels_N: Tensor | None = None
    """int64[N] accumulated labels: batches come from one label each."""
    parents_N: Tensor | None = None
    """int64[N] coarser labels that small clusters fall back to."""


class StageRunner:
    """Holds what all stages of a run share: recipe, data, processor, folder."""

    def __init__(self, config: TrainConfig, dataset: CaptionDataset, processor: ProcessorMixin) -> None:
        self.config = config
        self.dataset = dataset
        self.processor = processor

    def folder(self, name: str) -> Path:
        """Folder of a stage."""
        return self.config.output / name

    def model_folder(self, name: str) -> Path:
        """Folder of a stage's finished model."""
        return self.folder(name) / "model"

    def is_finished(self, name: str) -> bool:
        """Whether the stage's marker, written last, is there."""
        return (self.folder(name) / "stage.json").is_file()

    def run(self, stage: Stage, build: Callable[[], PreTrainedModel]) -> Path:
        """Trains a stage from `build()` and returns its model folder; a finished stage is left alone.

        Raises:
            ValueError: the data set is smaller than one global batch.
        """
        folder = self.folder(stage.name)
        if self.is_finished(stage.name):
            logger.info("stage %s is finished: %s", stage.name, self.model_folder(stage.name))
            return self.model_folder(stage.name)
        model = build()
        model.set_attn_implementation(self.config.attn_implementation)
        self._set_logit_scale(model, stage)
        trained = set_trainable(model, stage.trainable)
        if stage.trainable in ("all", "text", "projections"):
            for parameter in _temperature(model):
                parameter.requires_grad_(self._trains_logit_scale(stage))
        num_steps = max(1, math.ceil(stage.samples / self.config.global_batch_size))
        sampler = self._sampler(stage, num_steps)
        logger.info("stage %s: %s; trains %s", stage.name, _plan(stage, sampler, num_steps), trained)
        trainer = ContrastiveTrainer(
            model=model,
            args=training_arguments(self.config, stage.config, folder, num_steps),
            train_dataset=self.dataset,
            data_collator=CaptionCollator(self.processor, padding=text_padding(model.config)),
            batch_sampler=sampler,
            label_smoothing=stage.config.label_smoothing,
            groups_N=stage.labels_N if isinstance(sampler, ClusterBatchSampler) else None,
            callbacks=[MetricsCallback(self.config.output, stage.name), RouterBiasCallback()],
            # None: the Trainer's AdamW. Under DeepSpeed, which shards what Muon needs whole, it takes no other.
            optimizers=(_muon(model, stage.config) if stage.config.optimizer == "muon" else None, None),
        )
        checkpoint = last_checkpoint(folder / "checkpoints")
        if checkpoint:
            logger.info("stage %s goes on from %s", stage.name, checkpoint)
        start = time.monotonic()
        trainer.train(resume_from_checkpoint=checkpoint)
        self._finish(stage, trainer, sampler, num_steps, time.monotonic() - start, resumed=bool(checkpoint))
        return self.model_folder(stage.name)

    def _finish(
        self,
        stage: Stage,
        trainer: ContrastiveTrainer,
        sampler: EpochBatchSampler | ClusterBatchSampler,
        num_steps: int,
        seconds: float,
        *,
        resumed: bool,
    ) -> None:
        folder = self.folder(stage.name)
        if is_main():
            model = trainer.accelerator.unwrap_model(trainer.model)
            self.save(model, self.model_folder(stage.name))
            batches = sampler.report() if isinstance(sampler, ClusterBatchSampler) else None
            summary = {
                "name": stage.name,
                "steps": num_steps,
                "samples": num_steps * self.config.global_batch_size,
                "seconds": round(seconds, 1),
                "seconds_cover": "since the resumption" if resumed else "the whole stage",
                "cluster_batches": batches,
            }
            write_json(folder / "stage.json", summary)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        barrier()

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Writes model and processor as one Hugging Face folder, all at once."""

        def write(path: Path) -> None:
            model.save_pretrained(path)
            self.processor.save_pretrained(path)

        write_folder(folder, write)

    def _sampler(self, stage: Stage, num_steps: int) -> EpochBatchSampler | ClusterBatchSampler:
        batch, seed = self.config.global_batch_size, self.config.seed
        if len(self.dataset) < batch:
            raise ValueError(
                f"the training set has {len(self.dataset)} pictures, fewer than one global batch of {batch}; "
                f"lower global_batch_size"
            )
        if stage.labels_N is None or self.config.clustering.random_batches:
            return EpochBatchSampler(len(self.dataset), batch, num_steps, seed, rank(), world_size())
        return ClusterBatchSampler(
            stage.labels_N,
            batch,
            num_steps,
            seed,
            rank(),
            world_size(),
            small_clusters=self.config.clustering.small_clusters,
            parents=stage.parents_N,
        )

    def _trains_logit_scale(self, stage: Stage) -> bool:
        return stage.name in _START_STAGES or self.config.train_logit_scale

    def _set_logit_scale(self, model: PreTrainedModel, stage: Stage) -> None:
        family = ENCODER_BY_TYPE.get(model.config.model_type)
        if family is not None and family.loss == "sigmoid":
            # A scale means nothing there without the bias that was trained with it.
            return
        if self.config.logit_scale is not None and stage.name not in _START_STAGES:
            with torch.no_grad():
                model.logit_scale.fill_(self.config.logit_scale)


def with_router_losses(model: PreTrainedModel, moe: MoEConfig) -> PreTrainedModel:
    """Writes the recipe's router losses into the configuration of both towers, and returns the model."""
    for tower in (model.config.vision_config, model.config.text_config):
        tower.router_aux_loss_coef = moe.router_aux_loss_coef
        tower.router_z_loss_coef = moe.router_z_loss_coef
        tower.balance_top_k = moe.balance_top_k
    return model


def finished_stages(output: Path) -> dict[str, dict[str, object]]:
    """Markers of all finished stages of a run, by name."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(output.glob("*/stage.json"))}


def _temperature(model: PreTrainedModel) -> list[Tensor]:
    """Scale of the logits and, with the sigmoid loss, their bias."""
    return [parameter for name, parameter in model.named_parameters() if name in ("logit_scale", "logit_bias")]


def _muon(model: PreTrainedModel, config: StageConfig) -> MuonAdamW:
    return MuonAdamW(model, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, config.adam_beta2))


def _plan(stage: Stage, sampler: EpochBatchSampler | ClusterBatchSampler, num_steps: int) -> str:
    plan = f"{stage.samples} pairs in {num_steps} steps"
    return f"{plan}, {sampler.report()}" if isinstance(sampler, ClusterBatchSampler) else plan
