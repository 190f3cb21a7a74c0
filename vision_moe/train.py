"""Trains an encoder from one recipe: `python -m vision_moe.train RECIPE.yaml [--field value ...]`.

A dense dual encoder (pretrained, aligned here from two towers, or trained here from nothing) is fine-tuned directly,
upcycled sparsely and made a CLIP-MoE by DMU, each on equally many pairs; a LIMoE is trained from nothing. The run ends
with one table of all of them. Started again, it goes on where it stopped.
"""

import logging
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModel, PreTrainedModel, ProcessorMixin

from vision_moe.assets import find_model
from vision_moe.config import parse
from vision_moe.distributed import barrier, is_main
from vision_moe.dmu import run_dmu, stage_samples, total_samples
from vision_moe.encoder_report import open_eval_data, write_report
from vision_moe.interruption import says_how_to_go_on
from vision_moe.launcher import die_with_launcher
from vision_moe.limoe import build_limoe
from vision_moe.mixture import make_mixture
from vision_moe.model.families import encoder_family
from vision_moe.positions import stretch_text
from vision_moe.processor import load_processor
from vision_moe.recipe import TrainConfig
from vision_moe.run_folder import check_folder, claim_folder, same_products
from vision_moe.scratch import build_clip, build_processor
from vision_moe.stage_recipe import StageConfig
from vision_moe.stages import Stage, StageRunner
from vision_moe.trackers import check_trackers
from vision_moe.tracking import setup_logging
from vision_moe.training_data import TrainingData
from vision_moe.two_towers import join_towers
from vision_moe.upcycle import upcycle

logger = logging.getLogger(__name__)

_SMOKE = Path(__file__).parent / "recipes" / "smoke.yaml"
# Fields that may differ between a run and its continuation.
_FREE_FIELDS = ("logging_steps", "save_steps", "report_to", "report", "methods")


def main() -> None:
    """Entry point."""
    setup_logging()
    die_with_launcher()
    # Rank 0 extracts features while the others wait, possibly for hours.
    PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    config = parse(TrainConfig, smoke=_SMOKE)
    with says_how_to_go_on(config.output):
        run(config)


def run(config: TrainConfig) -> dict[str, Path]:
    """Runs every method of the recipe and writes the report; returns the model folders by name."""
    check_trackers(config.report_to)
    check_folder(config, config.output, _FREE_FIELDS)
    claim_folder(config, config.output)
    with same_products(config.output):
        return _run_methods(config)


def _run_methods(config: TrainConfig) -> dict[str, Path]:
    """The rest of `run`, once the folder is the run's."""
    dataset = TrainingData(config)
    # Opened now, so that a mistake in the recipe does not show after hours.
    pictures = open_eval_data(config) if config.report else None
    start, processor = _start(config, dataset)
    runner = StageRunner(config, dataset, processor)
    models: dict[str, Path] = {} if start is None else {"dense": start}
    baseline = total_samples(config, len(dataset))
    for method in config.methods:
        if method == "direct":
            stage = _full_stage("direct", config.direct, baseline)
            models["direct"] = runner.run(stage, partial(AutoModel.from_pretrained, models["dense"]))
        elif method == "sparse_upcycling":
            stage = _full_stage("sparse_upcycling", config.sparse_upcycling, baseline)
            models["sparse_upcycling"] = runner.run(stage, partial(_sparse_upcycling, runner, models["dense"]))
        elif method == "dmu":
            models |= run_dmu(runner, models["dense"])
        elif method == "limoe":
            samples = stage_samples(config.limoe, len(dataset))
            stage = Stage(name="limoe", config=config.limoe, trainable="all", samples=samples)
            models["limoe"] = runner.run(stage, partial(build_limoe, config, processor))
    if pictures is not None:
        write_report(config, models, processor, pictures)
    return models


def _start(config: TrainConfig, dataset: TrainingData) -> tuple[Path | None, ProcessorMixin]:
    """Folder of the dense model, None where no method needs one, and the processor of all models."""
    if set(config.methods) != {"limoe"}:
        return _dense_start(config, dataset)
    if config.model is not None:
        return None, load_processor(find_model(config.model))
    return None, build_processor(config.scratch, dataset.captions())


def _dense_start(config: TrainConfig, dataset: TrainingData) -> tuple[Path, ProcessorMixin]:
    """Folder of the dense model that everything starts from, and its processor."""
    if config.model is not None:
        source = find_model(config.model)
        processor = load_processor(source)
        runner = StageRunner(config, dataset, processor)
        folder = config.output / "start" / "model"
        if is_main() and not folder.is_dir():
            runner.save(_stretched(config, AutoModel.from_pretrained(source), processor), folder)
        barrier()
        return folder, load_processor(folder)
    if config.towers is not None:
        model, processor = join_towers(config.towers, config.seed)
    else:
        model, processor = build_clip(config.scratch, dataset.captions(), config.seed)
    model = _stretched(config, model, processor)
    runner = StageRunner(config, dataset, processor)
    build: Callable[[], PreTrainedModel] = lambda: model  # noqa: E731
    if config.align is not None:
        samples = stage_samples(config.align, len(dataset))
        stage = Stage(name="align", config=config.align, trainable=config.align_trains, samples=samples)
        aligned = runner.run(stage, build)
        build = partial(AutoModel.from_pretrained, aligned)
    samples = stage_samples(config.dense, len(dataset))
    return runner.run(Stage(name="dense", config=config.dense, trainable="all", samples=samples), build), processor


def _stretched(config: TrainConfig, model: PreTrainedModel, processor: ProcessorMixin) -> PreTrainedModel:
    if config.text_positions is None:
        return model
    if not encoder_family(model.config).stretches_text:
        raise ValueError(f"text_positions stretches CLIP's text tower; leave it out for a {model.config.model_type}")
    processor.tokenizer.model_max_length = config.text_positions
    return stretch_text(model, config.text_positions)


def _full_stage(name: str, config: StageConfig, baseline_samples: int) -> Stage:
    samples = baseline_samples if config.samples is None else config.samples
    return Stage(name=name, config=config, trainable="all", samples=samples)


def _sparse_upcycling(runner: StageRunner, start: Path) -> PreTrainedModel:
    moe = runner.config.sparse_moe
    make = partial(upcycle, AutoModel.from_pretrained(start), num_experts=moe.num_experts)
    return make_mixture(runner, moe, make)


if __name__ == "__main__":
    main()
