"""Runs one training stage so that a killed run goes on, and a finished one is not run twice."""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vision_moe.checkpoint import CheckpointMarker, last_checkpoint, write_folder
from vision_moe.data.captions import CaptionDataset
from vision_moe.data.cluster_sampler import ClusterBatchSampler
from vision_moe.data.collate import CaptionCollator
from vision_moe.data.sampler import EpochBatchSampler
from vision_moe.data.stream_loader import StreamLoader, load_state
from vision_moe.distributed import barrier, is_main, rank, sum_over_ranks, world_size
from vision_moe.ema import EMACallback
from vision_moe.encoder_card import write_encoder_card
from vision_moe.files import write_json
from vision_moe.freeze import set_trainable
from vision_moe.interruption import stops_after_a_step
from vision_moe.metrics_callback import MetricsCallback
from vision_moe.model.families import ENCODER_BY_TYPE, text_padding
from vision_moe.muon import MuonAdamW
from vision_moe.patch_dropout import PatchDropoutCallback
from vision_moe.recipe import TrainConfig
from vision_moe.router_bias import RouterBiasCallback
from vision_moe.stage_recipe import StageConfig
from vision_moe.trackers import tracker_callbacks
from vision_moe.trainer import ContrastiveTrainer, training_arguments
from vision_moe.training_data import TrainingData
from vision_moe.zero import gathered_state, scalars_as_vectors

logger = logging.getLogger(__name__)

# Stages that start from nothing: they learn the logit scale, as CLIP's own training does.
_START_STAGES = ("align", "dense", "limoe")


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
    ancestors: tuple[Tensor, ...] = ()
    """int64[N] each, coarser labels that small clusters back off to, the finest first."""
    shuffle_seed: int | None = None
    """Seed of random batches of their own, drawn by index; None takes the recipe's, and streams where the data are."""


class StageRunner:
    """Holds what all stages of a run share: recipe, data, processor, folder."""

    def __init__(self, config: TrainConfig, data: TrainingData, processor: ProcessorMixin) -> None:
        self.config = config
        self.data = data
        self.processor = processor

    @property
    def dataset(self) -> CaptionDataset:
        """The training pictures by index; an error where they are only streamed."""
        return self.data.dataset

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
        scalars = scalars_as_vectors(model) if self.config.deepspeed is not None else []
        model.set_attn_implementation(self.config.attn_implementation)
        self._set_logit_scale(model, stage)
        trained = set_trainable(model, stage.trainable)
        if stage.trainable in ("all", "text", "projections"):
            for parameter in _temperature(model):
                parameter.requires_grad_(stage.name in _START_STAGES or self.config.train_logit_scale)
        num_steps = max(1, math.ceil(stage.samples / self.config.global_batch_size))
        checkpoint = last_checkpoint(folder / "checkpoints")
        collator = CaptionCollator(self.processor, padding=text_padding(model.config))
        loader = self._stream_loader(stage, checkpoint, collator)
        sampler = self._sampler(stage, num_steps) if loader is None else None
        logger.info("stage %s: %s; trains %s", stage.name, _plan(stage, sampler, num_steps), trained)
        trainer = ContrastiveTrainer(
            model=model,
            args=training_arguments(self.config, stage.config, folder, num_steps),
            train_dataset=self.dataset if loader is None else loader.stream,
            data_collator=collator,
            batch_sampler=sampler,
            stream_loader=loader,
            label_smoothing=stage.config.label_smoothing,
            groups_N=stage.labels_N if isinstance(sampler, ClusterBatchSampler) else None,
            grad_cache_batch_size=stage.config.grad_cache_batch_size,
            loss_tile=stage.config.loss_tile,
            callbacks=self._callbacks(stage, model, checkpoint),
            # None: the Trainer's AdamW. Under DeepSpeed, which shards what Muon needs whole, it takes no other.
            optimizers=(_muon(model, stage.config) if stage.config.optimizer == "muon" else None, None),
        )
        if checkpoint:
            logger.info("stage %s goes on from %s", stage.name, checkpoint)
        start = time.monotonic()
        with stops_after_a_step(trainer, self.config.output):
            trainer.train(resume_from_checkpoint=checkpoint)
        batches = sampler.report() if isinstance(sampler, ClusterBatchSampler) else None
        summary = {"cluster_batches": batches, "stream": None if loader is None else _stream_report(loader, trainer)}
        seconds = time.monotonic() - start
        state = None if self.config.deepspeed is None else gathered_state(trainer, scalars)
        if is_main():
            self.save(trainer.accelerator.unwrap_model(trainer.model), self.model_folder(stage.name), state)
        self._finish(stage, num_steps, seconds, resumed=bool(checkpoint), more=summary)
        # Or else ZeRO-3 would split the next model over the ranks as it is loaded.
        unset_hf_deepspeed_config()
        return self.model_folder(stage.name)

    def _callbacks(self, stage: Stage, model: PreTrainedModel, checkpoint: str | None) -> list[TrainerCallback]:
        config = stage.config
        return [
            MetricsCallback(self.config.output, stage.name),
            RouterBiasCallback(),
            *tracker_callbacks(self.config.report_to, self.folder(stage.name)),
            *([PatchDropoutCallback(config.patch_dropout, model)] if config.patch_dropout else []),
            *([EMACallback(config.ema_decay, checkpoint)] if config.ema_decay is not None else []),
            # Last: it lists what the others have written.
            CheckpointMarker(),
        ]

    def _finish(self, stage: Stage, num_steps: int, seconds: float, *, resumed: bool, more: dict[str, Any]) -> None:
        folder = self.folder(stage.name)
        if is_main():
            summary = {
                "name": stage.name,
                "steps": num_steps,
                "samples": num_steps * self.config.global_batch_size,
                "seconds": round(seconds, 1),
                "seconds_cover": "since the resumption" if resumed else "the whole stage",
                **more,
            }
            write_json(folder / "stage.json", summary)
            write_encoder_card(self.config, stage.name)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        barrier()

    def save(self, model: PreTrainedModel, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes model and processor as one Hugging Face folder, all at once; `state`: weights instead of its own."""

        def write(path: Path) -> None:
            model.save_pretrained(path, state_dict=state)
            self.processor.save_pretrained(path)

        write_folder(folder, write)

    def _sampler(self, stage: Stage, num_steps: int) -> EpochBatchSampler | ClusterBatchSampler:
        batch, seed = self.config.global_batch_size, self.config.seed
        if len(self.dataset) < batch:
            raise ValueError(
                f"the training set has {len(self.dataset)} pictures, fewer than one global batch of {batch}; "
                f"lower global_batch_size"
            )
        if stage.labels_N is None:
            own_seed = seed if stage.shuffle_seed is None else stage.shuffle_seed
            return EpochBatchSampler(len(self.dataset), batch, num_steps, own_seed, rank(), world_size())
        small = self.config.clustering.small_clusters
        sizes = (batch, num_steps, seed, rank(), world_size())
        return ClusterBatchSampler(stage.labels_N, *sizes, small_clusters=small, ancestors=stage.ancestors)

    def _stream_loader(self, stage: Stage, checkpoint: str | None, collator: CaptionCollator) -> StreamLoader | None:
        """The loader of a stage that draws at random, where the data are streamed."""
        stream = self.data.stream
        if stream is None or stage.labels_N is not None or stage.shuffle_seed is not None:
            return None
        return StreamLoader(
            stream,
            collator,
            batch_size=self.config.global_batch_size // world_size(),
            num_workers=self.config.data.num_workers,
            pin_memory=torch.cuda.is_available(),
            state=None if checkpoint is None else load_state(Path(checkpoint), rank()),
        )

    def _set_logit_scale(self, model: PreTrainedModel, stage: Stage) -> None:
        family = ENCODER_BY_TYPE.get(model.config.model_type)
        if family is not None and family.loss == "sigmoid":
            # A scale means nothing there without the bias that was trained with it.
            return
        if self.config.logit_scale is not None and stage.name not in _START_STAGES:
            with torch.no_grad():
                model.logit_scale.fill_(self.config.logit_scale)


def finished_stages(output: Path) -> dict[str, dict[str, object]]:
    """Markers of all finished stages of a run, by name."""
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(output.glob("*/stage.json"))}


def _temperature(model: PreTrainedModel) -> list[Tensor]:
    """Scale of the logits and, with the sigmoid loss, their bias."""
    return [parameter for name, parameter in model.named_parameters() if name in ("logit_scale", "logit_bias")]


def _muon(model: PreTrainedModel, config: StageConfig) -> MuonAdamW:
    return MuonAdamW(model, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, config.adam_beta2))


def _stream_report(loader: StreamLoader, trainer: ContrastiveTrainer) -> dict[str, int]:
    counts_K = sum_over_ranks(loader.counts().to(trainer.args.device))
    return dict(zip(("seen", "unreadable", "damaged_shards"), counts_K.tolist(), strict=True))


def _plan(stage: Stage, sampler: EpochBatchSampler | ClusterBatchSampler | None, num_steps: int) -> str:
    plan = f"{stage.samples} pairs in {num_steps} steps"
    if not isinstance(sampler, ClusterBatchSampler):
        return plan
    counts = {name: value for name, value in sampler.report().items() if name != "sizes"}
    return f"{plan}, an epoch of which has {counts}"
