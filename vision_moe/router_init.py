"""Routers that start from what they will see: clusters of their own inputs instead of random rows.

T tokens, D model dim, E experts.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from vision_moe.cluster import kmeans
from vision_moe.moe.router import Router


@torch.no_grad()
def router_from_centroids(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    seed: int = 0,
    tokens_per_router: int = 65_536,
    experts_per_cluster: int = 1,
) -> None:
    """Makes the rows of each router the centroids of its inputs, of length 1 (Cluster-aware Upcycling, 2026).

    The inputs are clustered by direction: k-means on rows of length 1, so that the router's largest logit is that of
    the nearest centroid. Padding is left out. Choice biases are left as they are.

    Args:
        model: a CLIP-MoE or one of its towers; its routers are changed in place.
        batches: keyword arguments of the model's forward, on its device.
        seed: of k-means.
        tokens_per_router: cluster the first so many tokens that each router sees.
        experts_per_cluster: consecutive experts that share one centroid; for a model that `upcycle` gave narrow experts
            1 / expert_width_factor, which keeps the parent's function.

    Raises:
        ValueError: the model has no router, the experts do not divide by experts_per_cluster, or a router saw fewer
            tokens than clusters.
    """
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    if not routers:
        raise ValueError(f"{type(model).__name__} has no router to initialize")
    inputs = _router_inputs(model, batches, routers, tokens_per_router)
    for name, router in routers.items():
        num_clusters, rest = divmod(router.num_experts, experts_per_cluster)
        if rest:
            raise ValueError(
                f"num_experts must be a multiple of experts_per_cluster, but got {router.num_experts} with "
                f"{experts_per_cluster} ({name})"
            )
        if len(inputs[name]) < num_clusters:
            raise ValueError(f"{name} saw {len(inputs[name])} tokens, fewer than its {num_clusters} clusters")
        centroids = normalize(kmeans(inputs[name], num_clusters, seed=seed).centroids_KD, dim=-1)
        router.weight.copy_(centroids.repeat_interleave(experts_per_cluster, dim=0))


def _router_inputs(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], routers: Mapping[str, Router], limit: int
) -> dict[str, Tensor]:
    """The first tokens that each router sees, float32[T, D] of length 1 each, in evaluation mode."""
    parts = {name: [router.weight.new_empty(0, router.weight.shape[1]).float()] for name, router in routers.items()}

    def collect(name: str, router: Router, args: tuple[Tensor, ...]) -> None:
        wanted = limit - sum(len(part) for part in parts[name])
        parts[name].append(normalize(args[0][:wanted].float(), dim=-1))

    hooks = [router.register_forward_pre_hook(partial(collect, name)) for name, router in routers.items()]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**batch)
            if all(sum(len(part) for part in rows) >= limit for rows in parts.values()):
                break
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(rows) for name, rows in parts.items()}
