"""Trains LLaVA-1.5 from one recipe: `python -m mllm.train RECIPE.yaml [--field value ...]`.

Tower, projector and language model are first put together into one model folder; stage pretrain and stage finetune then
each load a folder and leave a folder. Started again, it goes on where it stopped. For more than one process:
`bash scripts/llava_finetune.sh RECIPE.yaml`.
"""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

from transformers import LlavaProcessor

import vision_moe.model  # noqa: F401  (registers CLIP-MoE with the Auto classes)
from mllm.assemble import assemble
from mllm.deepspeed_setup import init_deepspeed
from mllm.language_model import resolve_language_model
from mllm.recipe import LlavaConfig, enabled_stages
from mllm.stage_recipe import StageConfig
from mllm.stages import StageRunner, is_finished
from mllm.tower import resolve_tower
from vision_moe.config import parse
from vision_moe.data.scenes import ScenesArguments, generate
from vision_moe.distributed import barrier, is_main
from vision_moe.interruption import says_how_to_go_on
from vision_moe.launcher import die_with_launcher
from vision_moe.run_folder import check_folder, claim_folder, same_products
from vision_moe.trackers import check_trackers
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)

_SMOKE = Path(__file__).parent / "recipes" / "smoke.yaml"
# Fields that may differ between a run and its continuation.
_FREE_FIELDS = ("logging_steps", "save_steps", "report_to", "num_workers", "hang_timeout")


def main() -> None:
    """Entry point."""
    die_with_launcher()
    setup_logging()
    config = parse(LlavaConfig, smoke=_SMOKE)
    with says_how_to_go_on(config.output):
        model = run(config)
    logger.info("the model is in %s", model)


def run(config: LlavaConfig) -> Path:
    """Runs the enabled stages of a recipe; returns the folder of the finished model.

    Raises:
        ValueError: a stage names no data, or the output folder holds a run of another recipe.
        FileNotFoundError: data or pictures are not where the recipe says.
        ModuleNotFoundError: a tracker or DeepSpeed is not installed.
    """
    check_trackers(config.report_to)
    check_folder(config, config.output, _FREE_FIELDS)
    if config.deepspeed != "none":
        init_deepspeed()
    claim_folder(config, config.output)
    with same_products(config.output):
        return _run_stages(with_data(config))


def _run_stages(config: LlavaConfig) -> Path:
    """Runs the stages of a recipe whose data are all named; returns the folder of the finished model."""
    stages = enabled_stages(config)
    folders = [config.output / name / "model" for name, _ in stages[:-1]] + [config.output / "model"]
    start = config.output / "start"
    if not is_finished(config.output / stages[0][0]):
        _build_start(config, start)
    runner = StageRunner(config, LlavaProcessor.from_pretrained(_first_existing([*reversed(folders), start])))
    for (name, stage), source, target in zip(stages, [start, *folders], folders, strict=False):
        runner.run(name, stage, source, target)
    # The adapter of a first stage with LoRA needs its base model.
    if is_main() and not stages[0][1].has_lora:
        shutil.rmtree(start, ignore_errors=True)
        shutil.rmtree(config.output / "vision", ignore_errors=True)
    barrier()
    return folders[-1]


def _build_start(config: LlavaConfig, start: Path) -> None:
    """Puts the untrained LLaVA together on rank 0, in plain memory: nothing of DeepSpeed is active yet."""
    if is_main() and not start.is_dir():
        assemble(
            resolve_tower(config.vision, config.output / "vision"),
            resolve_language_model(config.llm),
            None,
            start,
            template=config.template,
            image_aspect_ratio=config.image_aspect_ratio,
            select_layer=config.select_layer,
            projector=config.projector,
            seed=config.seed,
        )
    barrier()


def with_data(config: LlavaConfig) -> LlavaConfig:
    """The recipe with Scenes, made below its output, where a stage names no data.

    Raises:
        ValueError: a stage names no data, and the recipe makes none.
        FileNotFoundError: what a stage names is not there.
    """
    scenes = config.output / "scenes"
    wants_scenes = [name for name, stage in enabled_stages(config) if stage.data is None]
    if wants_scenes and not config.scenes:
        raise ValueError(
            f"stage {' and '.join(wants_scenes)} names no data; give --{wants_scenes[0]}.data FILE.json "
            f"--image_folder DIR, or --scenes N for the built-in pictures"
        )
    if wants_scenes:
        if is_main():
            generate(scenes, ScenesArguments(num=config.scenes, num_test=max(1, config.scenes // 10), seed=config.seed))
        barrier()
    return replace(
        config,
        pretrain=_stage_with_data(config.pretrain, scenes, "llava_pretrain.json"),
        finetune=_stage_with_data(config.finetune, scenes, "llava_finetune.json"),
    )


def _stage_with_data(stage: StageConfig, scenes: Path, name: str) -> StageConfig:
    if not stage.enabled:
        return stage
    if stage.data is None:
        return replace(stage, data=scenes / name, image_folder=scenes / "images")
    if not stage.data.is_file():
        raise FileNotFoundError(f"no data file {stage.data}")
    return stage


def _first_existing(folders: list[Path]) -> Path:
    return next(folder for folder in folders if folder.is_dir())


if __name__ == "__main__":
    main()
