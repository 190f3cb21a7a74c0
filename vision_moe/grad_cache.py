"""Gradient cache (Gao et al. 2021, arXiv:2101.06983): a contrastive batch larger than memory, exactly.

The batch is embedded in chunks without a graph, the loss gives the gradient of each embedding, and each chunk is
embedded again, with a graph, to send its share of it on to the weights.

B pairs of this rank, D embedding dim.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vision_moe.model.pretrained import MoEPreTrainedModel
from vision_moe.moe.token_mean import ChunkMeans
from vision_moe.replay import Replay

Batch = Mapping[str, Tensor]


def split_batch(inputs: Batch, size: int) -> list[dict[str, Tensor]]:
    """Chunks of at most `size` rows of a batch whose tensors all start with B."""
    parts = {name: tensor.split(size) for name, tensor in inputs.items()}
    return [dict(zip(parts, chunk, strict=True)) for chunk in zip(*parts.values(), strict=True)]


def cached_step(
    model: nn.Module,
    chunks: Sequence[Batch],
    contrastive: Callable[..., Tensor],
    temperature: Sequence[Tensor],
    observe: Callable[[Any], None],
) -> tuple[Tensor, Tensor | None]:
    """One forward and backward over all chunks of a batch; gradients are added to the weights' `.grad`.

    For a model whose embedding of a pair does not depend on its batch the loss, router losses included, is that of the
    plain step, to rounding, with the same gradients: the router losses are functions of means over tokens, which the
    first forwards count over all chunks (`vision_moe.moe.token_mean.ChunkMeans`). The capacity of a mixture is each
    chunk's own. Random numbers (dropout, router noise, patch dropout) are the same in both forwards.

    Args:
        model: returns `image_embeds` and `text_embeds`, float[B_c, D], and perhaps `aux_loss`; may be wrapped in
            DistributedDataParallel, which then reduces gradients once.
        chunks: its inputs.
        contrastive: the loss of image_embeds float[B, D], text_embeds float[B, D] and the tensors of `temperature`.
        temperature: parameters that the loss reads beside the embeddings, whether they train or not.
        observe: called with the outputs of each chunk's second forward.

    Returns:
        float32 scalars: contrastive loss and aux loss, the latter None for a dense model.
    """
    replays, images, texts = [], [], []
    means = ChunkMeans()
    options = {"router_means": means} if isinstance(getattr(model, "module", model), MoEPreTrainedModel) else {}
    with torch.no_grad():
        for chunk in chunks:
            replays.append(Replay(next(iter(chunk.values())).device))
            means.next_chunk()
            outputs = model(**chunk, **options)
            images.append(outputs.image_embeds)
            texts.append(outputs.text_embeds)
    leaves = [torch.cat(images), torch.cat(texts), *(parameter.detach() for parameter in temperature)]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = contrastive(*leaves)
    image_grad_BD, text_grad_BD, *temperature_grads = torch.autograd.grad(loss, leaves)

    means.counted()
    aux_loss = None
    chunk_grads = zip(
        image_grad_BD.split([len(image) for image in images]),
        text_grad_BD.split([len(text) for text in texts]),
        strict=True,
    )
    for number, (chunk, replay, grads) in enumerate(zip(chunks, replays, chunk_grads, strict=True)):
        is_last = number == len(chunks) - 1
        with nullcontext() if is_last else _no_sync(model):
            means.next_chunk()
            with replay.again():
                outputs = model(**chunk, **options)
            observe(outputs)
            # Its gradient is the loss's, by the chain rule; its value means nothing.
            surrogate = (outputs.image_embeds * grads[0]).sum() + (outputs.text_embeds * grads[1]).sum()
            # The whole batch's, with the gradients of this chunk.
            aux_loss = getattr(outputs, "aux_loss", None)
            if aux_loss is not None:
                surrogate = surrogate + aux_loss
            if is_last:
                for parameter, grad in zip(temperature, temperature_grads, strict=True):
                    surrogate = surrogate + (parameter * grad).sum()
            surrogate.backward()
    return loss.detach(), None if aux_loss is None else aux_loss.detach()


def _no_sync(model: nn.Module) -> Any:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
