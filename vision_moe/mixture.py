"""The mixture that a recipe wants, from a dense model or from donors, with its routers at their start."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from vision_moe.data.collate import CaptionCollator
from vision_moe.data.sampler import EpochBatchSampler
from vision_moe.model.families import text_padding
from vision_moe.moe_recipe import MoEConfig
from vision_moe.router_init import router_from_centroids
from vision_moe.stages import StageRunner


def make_mixture(runner: StageRunner, moe: MoEConfig, make: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """Makes a mixture as a recipe describes it, the same on every rank.

    Args:
        runner: the run.
        moe: the mixture.
        make: `upcycle` or `merge_donors` with its models; takes the other arguments that the two share.
    """
    model = make(
        num_experts_per_tok=moe.num_experts_per_tok,
        layers=moe.tower_layers,
        towers=moe.towers,
        router_std=moe.router_std,
        seed=runner.config.seed,
        **moe.model_fields,
    )
    return init_routers(runner, moe, model)


def init_routers(runner: StageRunner, moe: MoEConfig, model: PreTrainedModel) -> PreTrainedModel:
    """Starts the routers as the recipe says, on every rank alike, and returns the model."""
    if moe.router_init == "centroids":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        router_from_centroids(
            model.to(device),
            batches(runner, device, CaptionCollator(runner.processor, padding=text_padding(model.config))),
            seed=runner.config.seed,
            experts_per_cluster=round(1 / model.config.vision_config.expert_width_factor),
        )
    return model


def batches(runner: StageRunner, device: torch.device, collator: CaptionCollator) -> Iterator[dict[str, Tensor]]:
    """One pass over the training set in random order, the same on every rank."""
    num_samples = len(runner.dataset)
    size = min(runner.config.feature_batch_size, num_samples)
    loader = DataLoader(
        runner.dataset,
        batch_sampler=EpochBatchSampler(num_samples, size, num_samples // size, runner.config.seed),
        collate_fn=collator,
        num_workers=runner.config.data.num_workers,
    )
    for batch in loader:
        del batch["index"]
        yield {name: value.to(device) for name, value in batch.items()}
