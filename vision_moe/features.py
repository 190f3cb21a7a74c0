"""Features of a whole data set, cached on disk in chunks so that a killed run goes on where it stopped."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import ProcessorMixin

from vision_moe.data.collate import CaptionCollator, image_inputs, text_inputs
from vision_moe.distributed import barrier, is_main, rank, world_size
from vision_moe.files import replacing, write_json
from vision_moe.model.families import text_padding


class Features(NamedTuple):
    """Embeddings of N pictures and of the caption of each in epoch 0."""

    image_ND: Tensor
    """float32[N, D], rows of length 1."""
    text_ND: Tensor
    """float32[N, D], rows of length 1."""


def extract_features(
    model: nn.Module,
    dataset: Dataset[Any],
    processor: ProcessorMixin,
    *,
    cache_dir: Path,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    fingerprint: str,
    num_workers: int = 0,
    autocast_dtype: torch.dtype | None = None,
    chunk_size: int = 4096,
) -> Features:
    """Encodes every picture and its caption of epoch 0; chunks already in the cache are not computed again.

    With several ranks each computes its share of the chunks; all must see the same `cache_dir`.

    Args:
        model: a dual encoder with get_image_features and get_text_features, as CLIPModel.
        dataset: a CaptionDataset.
        processor: image processor and tokenizer of the model.
        cache_dir: folder for the chunks; whatever it holds under another fingerprint is removed.
        batch_size: pairs per forward.
        device: where the model runs; it is moved there.
        fingerprint: names weights and data (see weights_fingerprint and CaptionDataset.fingerprint).
        num_workers: processes that read pictures.
        autocast_dtype: compute dtype of the forward; None: that of the weights.
        chunk_size: samples per file of the cache.

    Raises:
        ValueError: the model gives features that are not finite.
    """
    num_samples = len(dataset)  # type: ignore[arg-type]
    identity: dict[str, str | int] = {
        "fingerprint": fingerprint,
        "num_samples": num_samples,
        "chunk_size": chunk_size,
    }
    if is_main():
        _prepare(cache_dir, identity)
    barrier()
    starts = range(0, num_samples, chunk_size)
    missing = [s for n, s in enumerate(starts) if n % world_size() == rank() and not _file(cache_dir, s).is_file()]
    chunks = [range(start, min(start + chunk_size, num_samples)) for start in missing]
    batches = [list(chunk[i : i + batch_size]) for chunk in chunks for i in range(0, len(chunk), batch_size)]
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=CaptionCollator(processor, padding=text_padding(model.config)),
        num_workers=num_workers,
    )
    encoded = _encode(model, loader, torch.device(device), autocast_dtype)
    # disable=None: no bar where stderr is not a terminal.
    with tqdm(total=sum(map(len, chunks)), desc="features", disable=None if is_main() else True) as bar:
        for chunk in chunks:
            _save(_file(cache_dir, chunk.start), _take(encoded, len(chunk), bar))
    barrier()
    parts = [load_file(_file(cache_dir, start)) for start in starts]
    return Features(torch.cat([p["image"] for p in parts]), torch.cat([p["text"] for p in parts]))


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of all names, shapes, dtypes and values of a model's state."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _encode(
    model: nn.Module, loader: DataLoader[Any], device: torch.device, autocast_dtype: torch.dtype | None
) -> Iterator[Features]:
    """Features batch by batch; the model is in eval mode meanwhile."""
    was_training = model.training
    model.to(device).eval()
    try:
        for batch in loader:
            autocast = nullcontext() if autocast_dtype is None else torch.autocast(device.type, autocast_dtype)
            with torch.inference_mode(), autocast:
                image = model.get_image_features(**{k: v.to(device) for k, v in image_inputs(batch).items()})
                text = model.get_text_features(**{k: v.to(device) for k, v in text_inputs(batch).items()})
            yield Features(_unit_rows(image.pooler_output), _unit_rows(text.pooler_output))
    finally:
        model.train(was_training)


def _unit_rows(features_BD: Tensor) -> Tensor:
    features_BD = features_BD.float().cpu()
    if not bool(features_BD.isfinite().all()):
        raise ValueError("the model gives features that are not finite; its weights have diverged")
    return torch.nn.functional.normalize(features_BD, dim=-1)


def _take(encoded: Iterator[Features], num_rows: int, bar: "tqdm[Any]") -> Features:
    """The next `num_rows` rows; batches end where chunks do."""
    parts: list[Features] = []
    while sum(len(part.image_ND) for part in parts) < num_rows:
        parts.append(next(encoded))
        bar.update(len(parts[-1].image_ND))
    return Features(torch.cat([p.image_ND for p in parts]), torch.cat([p.text_ND for p in parts]))


def _prepare(cache_dir: Path, identity: dict[str, str | int]) -> None:
    """Empties a cache of other features, then signs it."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    signature = cache_dir / "features.json"
    if signature.is_file() and json.loads(signature.read_text(encoding="utf-8")) == identity:
        return
    # The signature goes first: a kill in between must not leave old chunks under it.
    signature.unlink(missing_ok=True)
    for path in cache_dir.glob("chunk-*.safetensors*"):
        path.unlink()
    write_json(signature, identity)


def _file(cache_dir: Path, start: int) -> Path:
    return cache_dir / f"chunk-{start:09d}.safetensors"


def _save(path: Path, features: Features) -> None:
    with replacing(path) as temporary:
        save_file({"image": features.image_ND.contiguous(), "text": features.text_ND.contiguous()}, temporary)
