"""Gradient cache (Gao et al. 2021, arXiv:2101.06983): a contrastive batch larger than memory, exactly.

The batch is embedded in chunks without a graph, the loss gives the gradient of each embedding, and each chunk is
embedded again, with a graph, to send its share of it on to the weights.

B pairs of this rank, D embedding dim.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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

    The loss is the contrastive loss of all chunks' embeddings (and, inside `contrastive`, of all ranks') plus
    sum_c B_c / B aux_loss_c. For a model whose embedding of a pair does not depend on its batch this is the contrastive
    loss of the plain step, to rounding, with the same gradients. The router losses and the capacity of a mixture are
    those of each chunk, as they are of each micro-batch under gradient accumulation. Random numbers (dropout, router
    noise, patch dropout) are the same in both forwards.

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
    with torch.no_grad():
        for chunk in chunks:
            replays.append(_Replay(next(iter(chunk.values())).device))
            outputs = model(**chunk)
            images.append(outputs.image_embeds)
            texts.append(outputs.text_embeds)
    leaves = [torch.cat(images), torch.cat(texts), *(parameter.detach() for parameter in temperature)]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = contrastive(*leaves)
    image_grad_BD, text_grad_BD, *temperature_grads = torch.autograd.grad(loss, leaves)

    aux_losses, batch = [], len(image_grad_BD)
    chunk_grads = zip(
        image_grad_BD.split([len(image) for image in images]),
        text_grad_BD.split([len(text) for text in texts]),
        strict=True,
    )
    for number, (chunk, replay, grads) in enumerate(zip(chunks, replays, chunk_grads, strict=True)):
        is_last = number == len(chunks) - 1
        with nullcontext() if is_last else _no_sync(model):
            with replay.again():
                outputs = model(**chunk)
            observe(outputs)
            # Its gradient is the loss's, by the chain rule; its value means nothing.
            surrogate = (outputs.image_embeds * grads[0]).sum() + (outputs.text_embeds * grads[1]).sum()
            if getattr(outputs, "aux_loss", None) is not None:
                aux_losses.append(outputs.aux_loss * (len(grads[0]) / batch))
                surrogate = surrogate + aux_losses[-1]
            if is_last:
                for parameter, grad in zip(temperature, temperature_grads, strict=True):
                    surrogate = surrogate + (parameter * grad).sum()
            surrogate.backward()
    return loss.detach(), torch.stack(aux_losses).sum().detach() if aux_losses else None


class _Replay:
    """The state of the random numbers now, to draw the same again."""

    def __init__(self, device: torch.device) -> None:
        self.devices = [device] if device.type == "cuda" else []
        self.cpu_state = torch.get_rng_state()
        self.cuda_states = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draws what was drawn from that state on; afterwards the random numbers go on as if nothing had been drawn."""
        with torch.random.fork_rng(devices=self.devices):
            torch.set_rng_state(self.cpu_state)
            for device, state in zip(self.devices, self.cuda_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _no_sync(model: nn.Module) -> Any:
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
