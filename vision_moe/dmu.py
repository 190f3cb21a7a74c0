"""Diversified Multiplet Upcycling: MCL stages make experts, a router is trained over them (arXiv:2409.19291).

One stage s = 1 .. num_experts - 1: features of the model of stage s - 1 -> k-means per modality -> labels accumulated
over the stages -> feed-forward weights fine-tuned on batches from one label. Expert 0 is the dense start, expert s the
feed-forward weights of stage s.
"""

import logging
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from vision_moe.cluster import accumulate_labels, kmeans
from vision_moe.distributed import is_main
from vision_moe.features import extract_features, weights_fingerprint
from vision_moe.files import write_json
from vision_moe.mixture import make_mixture
from vision_moe.recipe import TrainConfig
from vision_moe.stage_recipe import StageConfig
from vision_moe.stages import Stage, StageRunner
from vision_moe.upcycle import merge_donors

logger = logging.getLogger(__name__)


class Labels(NamedTuple):
    """Accumulated labels of the training set and, latest first, the coarser ones of earlier stages; int64[N] each."""

    labels_N: Tensor
    ancestors: tuple[Tensor, ...]


def stage_samples(stage: StageConfig, num_samples: int) -> int:
    """Pairs that a stage of DMU sees: its `samples`, or `epochs` passes."""
    return stage.samples if stage.samples is not None else max(1, round(stage.epochs * num_samples))


def total_samples(config: TrainConfig, num_samples: int) -> int:
    """Pairs that all of DMU sees; the baselines get as many."""
    num_stages = config.moe.num_experts - 1
    return num_stages * stage_samples(config.mcl, num_samples) + stage_samples(config.router, num_samples)


def run_dmu(runner: StageRunner, start: Path) -> dict[str, Path]:
    """All of DMU from the dense CLIP in `start`; returns the folders of the stages and of the CLIP-MoE ("dmu")."""
    config = runner.config
    models: dict[str, Path] = {}
    labels: Labels | None = None
    previous = start
    names = [f"mcl{stage}" for stage in range(1, config.moe.num_experts)]
    for number, name in enumerate(names, start=1):
        is_needed = not all(runner.is_finished(later) for later in names[number - 1 :])
        if is_needed and not config.clustering.random_batches:
            labels = _stage_labels(runner, number, previous, labels)
        init = previous if config.clustering.init_from == "previous" else start
        stage = Stage(
            name=name,
            config=config.mcl,
            trainable="ffn",
            samples=stage_samples(config.mcl, len(runner.dataset)),
            labels_N=labels.labels_N if labels else None,
            ancestors=labels.ancestors if labels else (),
            # Or else all experts would see the same batches and be equal; no two stages of any seeds share one.
            shuffle_seed=config.seed * config.moe.num_experts + number if config.clustering.random_batches else None,
        )
        models[name] = previous = runner.run(stage, partial(AutoModel.from_pretrained, init))
    router = Stage(
        name="dmu",
        config=config.router,
        trainable="router",
        samples=stage_samples(config.router, len(runner.dataset)),
    )
    models["dmu"] = runner.run(router, lambda: _merge(runner, start, [models[name] for name in names]))
    if is_main():
        shutil.rmtree(config.output / "features", ignore_errors=True)
    return models


def _stage_labels(runner: StageRunner, number: int, model_folder: Path, previous: Labels | None) -> Labels:
    """Accumulated labels for stage `number`, from features of the model in `model_folder`."""
    config, clustering = runner.config, runner.config.clustering
    folder = config.output / "features" / f"stage{number}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(model_folder)
    features = extract_features(
        model,
        runner.dataset,
        runner.processor,
        cache_dir=folder,
        batch_size=config.feature_batch_size,
        device=device,
        fingerprint=f"{weights_fingerprint(model)}|{runner.dataset.fingerprint}|bf16={config.bf16}",
        num_workers=config.data.num_workers,
        autocast_dtype=torch.bfloat16 if config.bf16 else None,
    )
    seed = config.seed + number
    image = kmeans(features.image_ND, clustering.image_clusters, seed=seed)
    text = kmeans(features.text_ND, clustering.text_clusters, seed=seed)
    labels_N = accumulate_labels(
        previous.labels_N if previous else None,
        image.labels_N,
        text.labels_N,
        clustering.image_clusters,
        clustering.text_clusters,
    )
    sizes = np.unique(labels_N.numpy(), return_counts=True)[1]
    logger.info(
        "clusters for stage %d: %d accumulated labels, %d to %d pictures each",
        number,
        len(sizes),
        sizes.min(),
        sizes.max(),
    )
    if is_main():
        summary = {"accumulated_labels": len(sizes), "sizes": sorted(sizes.tolist(), reverse=True)}
        write_json(config.output / f"mcl{number}" / "clusters.json", summary)
    return Labels(labels_N, (previous.labels_N, *previous.ancestors) if previous else ())


def _merge(runner: StageRunner, start: Path, donors: list[Path]) -> PreTrainedModel:
    models = [AutoModel.from_pretrained(donor) for donor in donors]
    return make_mixture(runner, runner.config.moe, partial(merge_donors, AutoModel.from_pretrained(start), models))
