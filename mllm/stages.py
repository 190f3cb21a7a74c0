"""Runs the two stages of a LLaVA recipe so that a killed run goes on, and a finished stage is not run twice."""

import gc
import json
import logging
import math
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments, set_seed

from mllm.adapter import AdapterInfo, save_adapter
from mllm.data import LlavaDataset
from mllm.deepspeed_setup import keep_blocks_whole, zero_stage
from mllm.evaluation import TaskEvaluation
from mllm.generate import Chat
from mllm.images import set_aspect_ratio
from mllm.llava_card import write_llava_card
from mllm.lora import merged_state
from mllm.merge import merge_adapter
from mllm.model import LlavaMoEForConditionalGeneration
from mllm.parts import set_trainable
from mllm.preflight import preflight
from mllm.quantization import accept_own_state, quantization_config
from mllm.recipe import LlavaConfig
from mllm.sampler import DialogueBatchSampler
from mllm.stage_recipe import StageConfig
from mllm.tower_fingerprint import record_tower
from mllm.trainer import LlavaTrainer
from mllm.training_arguments import training_arguments
from mllm.training_batch import training_collator
from mllm.watchdog import HangWatchdog
from vision_moe.checkpoint import CheckpointMarker, last_checkpoint, write_folder
from vision_moe.distributed import barrier, is_main, rank, world_size
from vision_moe.files import weights_sha256, write_json
from vision_moe.interruption import stops_after_a_step
from vision_moe.metrics_callback import MetricsCallback
from vision_moe.trackers import tracker_callbacks

logger = logging.getLogger(__name__)


class StageRunner:
    """Runs one stage after the other; each starts from the model folder that the one before left.

    Args:
        config: the recipe.
        processor: tokenizer and image processor of the run's model.
    """

    def __init__(self, config: LlavaConfig, processor: ProcessorMixin) -> None:
        self.config = config
        self.processor = processor

    def run(self, name: str, stage: StageConfig, start: Path, target: Path) -> None:
        """Trains a stage from the model folder `start` and leaves the model in `target`.

        Raises:
            ValueError: the batch sizes do not fit the number of processes, or the data is not as it must be.
        """
        folder = self.config.output / name
        if is_finished(folder):
            logger.info("stage %s is finished: %s", name, target)
            self._clean(folder)
            return
        set_seed(self.config.seed)
        dataset = self._dataset(stage, start, folder / "data_index.safetensors")
        samples = stage.samples if stage.samples is not None else math.ceil(stage.epochs * len(dataset))
        num_steps = math.ceil(samples / stage.global_batch_size)
        # Before the model: under ZeRO-3 these arguments make from_pretrained split every weight over the ranks.
        args = training_arguments(self.config, stage, folder, num_steps)
        model = self._load(start, stage, args.device)
        trained = set_trainable(model, stage)
        trainer = self._trainer(name, stage, model, args, dataset, num_steps)
        if stage.evaluation.tasks:
            chat = partial(Chat, processor=self.processor, template=self.config.template)
            trainer.add_callback(TaskEvaluation(trainer, stage.evaluation, chat))
        self._log_plan(name, stage, num_steps, trained)
        preflight(trainer, stage, folder / "checkpoints")
        checkpoint = last_checkpoint(folder / "checkpoints")
        if checkpoint:
            logger.info("stage %s goes on from %s", name, checkpoint)
        began = time.monotonic()
        watchdog = HangWatchdog(folder, self.config.hang_timeout)
        with stops_after_a_step(trainer, self.config.output), watchdog.watching(trainer):
            trainer.train(resume_from_checkpoint=checkpoint)
        summary = {
            "name": name,
            "steps": num_steps,
            "samples": num_steps * stage.global_batch_size,
            "parameters": trained,
            "seconds": round(time.monotonic() - began, 1),
            "seconds_cover": "since the resumption" if checkpoint else "the whole stage",
        }
        self._save(trainer, stage, start, target)
        if is_main():
            for written in (target, *([target.with_name("adapter")] if stage.has_lora else [])):
                write_llava_card(self.config, name, written, summary)
            write_json(folder / "stage.json", summary)
        barrier()
        self._clean(folder)
        # Frees this stage's engine and gradients before the next stage loads its model.
        del trainer, model
        gc.collect()

    def _dataset(self, stage: StageConfig, start: Path, index_cache: Path) -> LlavaDataset:
        config = json.loads((start / "config.json").read_text(encoding="utf-8"))
        assert stage.data is not None, "mllm.train fills in the data of every stage"
        image_processor = self.processor.image_processor
        set_aspect_ratio(image_processor, stage.image_aspect_ratio or self.config.image_aspect_ratio)
        return LlavaDataset(
            stage.data,
            stage.image_folder or self.config.image_folder,
            self.processor.tokenizer,
            image_processor,
            stage.template or self.config.template,
            num_image_tokens=config["image_seq_length"],
            max_length=self.config.max_length,
            bad_samples=self.config.bad_samples,
            index_cache=index_cache,
            independent_turns=stage.independent_turns,
        )

    def _trainer(
        self,
        name: str,
        stage: StageConfig,
        model: PreTrainedModel,
        args: TrainingArguments,
        dataset: LlavaDataset,
        num_steps: int,
    ) -> LlavaTrainer:
        lengths = None
        if stage.group_by_modality_length:
            lengths = np.where(dataset.has_image, dataset.lengths, -dataset.lengths)
        sampler = DialogueBatchSampler(
            len(dataset),
            stage.global_batch_size,
            num_steps,
            self.config.seed,
            rank=rank(),
            world_size=world_size(),
            accumulation=stage.accumulation(world_size()),
            lengths=lengths,
        )
        return LlavaTrainer(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=training_collator(stage, self.config, self.processor.tokenizer.pad_token_id),
            batch_sampler=sampler,
            learning_rates=stage.learning_rates,
            step_router_losses=stage.step_router_losses,
            callbacks=[
                MetricsCallback(self.config.output, name),
                *tracker_callbacks(self.config.report_to, self.config.output / name),
                CheckpointMarker(),
            ],
        )

    def _load(self, start: Path, stage: StageConfig, device: torch.device) -> LlavaMoEForConditionalGeneration:
        # DeepSpeed computes in bfloat16 and keeps float32 masters; autocast without it wants float32 weights.
        dtype = torch.bfloat16 if self.config.bf16 and self.config.deepspeed != "none" else torch.float32
        quantized: dict[str, Any] = {}
        if stage.quantization is not None:
            compute_dtype = torch.bfloat16 if self.config.bf16 else torch.float32
            config = quantization_config(stage.quantization, compute_dtype)
            quantized = {"quantization_config": config, "device_map": {"": device}}
        model, report = LlavaMoEForConditionalGeneration.from_pretrained(
            start,
            dtype=dtype,
            attn_implementation=self.config.attn_implementation,
            output_loading_info=True,
            **quantized,
        )
        if quantized:
            accept_own_state(model)
        if zero_stage(self.config.deepspeed) == 3:
            keep_blocks_whole(model)
        wrong = {name: sorted(keys) for name, keys in report.items() if keys}
        if wrong:
            raise ValueError(f"{start} does not hold this model: {wrong}")
        model.config.use_cache = False
        return model

    def _save(self, trainer: LlavaTrainer, stage: StageConfig, start: Path, target: Path) -> None:
        # All ranks take part: ZeRO-3 gathers every weight.
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
        if not is_main():
            return
        model = trainer.accelerator.unwrap_model(trainer.model)
        aspect_ratio = stage.image_aspect_ratio or self.config.image_aspect_ratio
        if stage.has_lora:
            # The language model may be quantised; the tower never is.
            tower = {name: tensor for name, tensor in state.items() if name.startswith("model.vision_tower.")}
            record_tower(model, merged_state(tower, stage.lora.alpha / stage.lora.r))
            info = AdapterInfo(
                base=str(start.resolve()),
                base_fingerprint=weights_sha256(start),
                quantization=stage.quantization,
                image_aspect_ratio=aspect_ratio,
                vision_tower_fingerprint=model.config.vision_tower_fingerprint,
            )
            save_adapter(target.with_name("adapter"), model, state, info, self.processor)
            merge_adapter(target.with_name("adapter"), target)
            return
        record_tower(model, state)
        # Gathered weights are copies, so save_pretrained would not see that the head is the embedding's.
        for tied in model.all_tied_weights_keys:
            state.pop(tied, None)
        model.config.image_aspect_ratio = aspect_ratio
        model.config.use_cache = True

        def write(folder: Path) -> None:
            # Under the model's own names: the "original" ones that save_pretrained would go back to depend on how the
            # model was loaded, and what ZeRO-3 then writes cannot be read again.
            model.save_pretrained(folder, state_dict=state, save_original_format=False)
            self.processor.save_pretrained(folder)

        write_folder(target, write)

    def _log_plan(self, name: str, stage: StageConfig, num_steps: int, trained: dict[str, dict[str, int]]) -> None:
        logger.info(
            "stage %s: %d steps of %d dialogues = %d per forward x %d processes x %d accumulated forwards",
            name,
            num_steps,
            stage.global_batch_size,
            stage.per_device_batch_size,
            world_size(),
            stage.accumulation(world_size()),
        )
        for part, counts in trained.items():
            rate = f"learning rate {stage.learning_rates[part]:g}" if counts["trained"] else "frozen"
            logger.info("  %s: trains %d of %d parameters, %s", part, counts["trained"], counts["all"], rate)

    def _clean(self, folder: Path) -> None:
        if is_main():
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        barrier()


def is_finished(folder: Path) -> bool:
    """Whether a stage's marker, written last, is there."""
    return (folder / "stage.json").is_file()
