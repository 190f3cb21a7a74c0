"""What every MoE block of a model decides about the tokens of a data set, block by block as the model runs.

Blocks are watched where they are, so that any model with `MoEMLP` blocks will do: the modality is that of the pass in
which a block runs. One tower for both modalities is seen twice, each modality alone: if experts have places in
evaluation, its tokens do not compete with the other's here.

Shapes: B pictures or captions, S sequence, V valid tokens, D model dim, E experts, K experts chosen per token.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from vision_moe.data.collate import CaptionCollator, image_inputs, text_inputs
from vision_moe.model.families import max_text_tokens, text_padding
from vision_moe.model.tower import RoutedMLP
from vision_moe.moe.layer import MoEMLP
from vision_moe.moe.router import RouterOutput

MODALITIES = ("vision", "text")


class Visit(NamedTuple):
    """One pass of a batch through one MoE block.

    Attributes:
        modality: "vision" or "text".
        block: position of the block in its tower.
        mlp: the mixture.
        index_B: int64[B], positions in the data set.
        token_V: int64[V], positions of the valid tokens among B * S.
        x_VD: float[V, D], what the mixture was given.
        routed: the router's output.
        experts_VK: int64[V, K], or [V, E] with expert choice: the experts that computed each token, E where none did.
    """

    modality: str
    block: int
    mlp: MoEMLP
    index_B: Tensor
    token_V: Tensor
    x_VD: Tensor
    routed: RouterOutput
    experts_VK: Tensor


def moe_blocks(model: nn.Module) -> dict[MoEMLP, int]:
    """Every mixture of a model with the position of its block in the stack of blocks that holds it.

    Raises:
        ValueError: there is none.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = {
        child: position
        for stack in stacks
        for position, block in enumerate(stack)
        for child in block.children()
        if isinstance(child, MoEMLP)
    }
    if not found:
        raise ValueError(
            f"a {type(model).__name__} without MoE layers has no experts to count; pass a CLIP-MoE"
            " (vision_moe.upcycle makes one)"
        )
    return found


@torch.inference_mode()
def trace(
    model: Any,
    processor: Any,
    dataset: Dataset[Any],
    visitors: Sequence[Callable[[Visit], None]],
    *,
    batch_size: int = 64,
    limit: int | None = None,
    num_workers: int = 0,
) -> int:
    """Runs a dual encoder over pairs in evaluation and shows every visitor every pass through every MoE block.

    Args:
        model: a dual encoder with `MoEMLP` blocks, on any device; left in the mode (train or eval) it came in.
        processor: its processor.
        dataset: pairs as `vision_moe.data.captions` gives them; the caption of epoch 0 is read.
        visitors: called with each `Visit`.
        batch_size: pairs a forward pass. Where tokens compete for places over the batch it changes what is dropped.
        limit: run over the first so many pairs only; None = all.
        num_workers: data loading processes.

    Returns:
        How many pairs.

    Raises:
        ValueError: if there are no MoE blocks, or the data set or limit is empty.
    """
    blocks = moe_blocks(model)
    num_samples = len(dataset) if limit is None else min(limit, len(dataset))  # type: ignore[arg-type]
    if num_samples < 1:
        raise ValueError(f"nothing to measure: {len(dataset)} pairs, limit {limit}")  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(
        Subset(dataset, range(num_samples)),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=CaptionCollator(
            processor, max_text_tokens(model.config.get_text_config()), text_padding(model.config)
        ),
    )
    was_training = model.training
    model.eval()
    try:
        for batch in tqdm(loader, desc="routing", leave=False, disable=not sys.stderr.isatty()):
            inputs = {
                name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
                for name, tensor in batch.items()
            }
            with _watched(blocks, "vision", batch["index"], visitors):
                model.get_image_features(**image_inputs(inputs))
            with _watched(blocks, "text", batch["index"], visitors):
                model.get_text_features(**text_inputs(inputs))
    finally:
        model.train(was_training)
    return num_samples


@contextmanager
def _watched(
    blocks: dict[MoEMLP, int], modality: str, index_B: Tensor, visitors: Sequence[Callable[[Visit], None]]
) -> Iterator[None]:
    def show(mlp: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert isinstance(mlp, MoEMLP)
        x_BSD = inputs[0]
        mask_BS = mlp.padding_mask if isinstance(mlp, RoutedMLP) else inputs[1] if len(inputs) > 1 else None
        route = mlp.route(x_BSD, mask_BS)
        where = (modality, blocks[mlp], mlp, index_B)
        visit = Visit(*where, route.token_V, route.x_VD, route.routed, route.experts_VK)
        for visitor in visitors:
            visitor(visit)

    with ExitStack() as stack:
        for mlp in blocks:
            stack.callback(mlp.register_forward_hook(show).remove)
        yield
