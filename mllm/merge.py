"""Merges an adapter into its base model: `python -m mllm.merge --adapter DIR --out DIR`.

W + (alpha / r) B A, see `mllm.lora.merged_weight`. The adapter of a quantised base
(QLoRA) goes into the base as it is on disk, not quantised: what few bits lost in training is back, so the merged model
is close to the one that trained and not equal to it. The weights are read and written file by file: no model is built,
and memory holds one file of them.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from mllm.adapter import CONFIG_FILE, INFO_FILE, WEIGHTS_FILE, find_base, load_tensors, read_info
from mllm.lora import merged_weight
from vision_moe.checkpoint import write_folder
from vision_moe.config import parse
from vision_moe.files import write_json
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)

_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merges what a stage with LoRA or QLoRA trained into its base model, as a whole model folder.

    Example:
        .venv/bin/python -m mllm.merge --adapter outputs/llava/adapter --out outputs/merged
    """

    adapter: Path
    """Folder that mllm.train wrote beside the stage's model."""
    out: Path
    """Folder to write; must not exist."""
    base: Path | None = None
    """Where the base model is now, if it was moved."""


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    setup_logging()
    config = parse(MergeConfig, args)
    if config.out.exists():
        raise FileExistsError(f"{config.out} exists; choose another --out, or delete it")
    merge_adapter(config.adapter, config.out, config.base)
    logger.info("the model is in %s", config.out)


def merge_adapter(adapter: Path, out: Path, base: Path | None = None) -> None:
    """Writes the base model of an adapter with the adapter merged into it.

    Args:
        adapter: folder that `mllm.adapter.save_adapter` wrote.
        out: model folder to write; appears when it is whole.
        base: where the base model is now; None = where it was.

    Raises:
        FileNotFoundError: the base model is not there.
        ValueError: it is another one, or the adapter does not fit it.
    """
    info = read_info(adapter)
    source = find_base(adapter, base)
    if info.quantization is not None:
        logger.info("trained on the base in %s; merged into the base as it is, not quantised", info.quantization)

    def write(folder: Path) -> None:
        _copy_files(source, folder, skipped=set())
        _merge_weights(source, adapter, folder)
        # The stage's own processor.
        _copy_files(adapter, folder, skipped={CONFIG_FILE, INFO_FILE, WEIGHTS_FILE})
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        trained = {
            "image_aspect_ratio": info.image_aspect_ratio,
            "vision_tower_fingerprint": info.vision_tower_fingerprint,
        }
        write_json(folder / "config.json", {**config, **trained})

    write_folder(out, write)


def _merge_weights(source: Path, adapter: Path, folder: Path) -> None:
    updates, scale = load_tensors(adapter)
    for path in tqdm(sorted(source.glob("*.safetensors")), desc="merging", disable=None):
        merged = {name: _merged(name, weight, updates, scale) for name, weight in load_file(path).items()}
        save_file(merged, folder / path.name, metadata={"format": "pt"})
    if updates:
        raise ValueError(f"{source} has no weights for these of {adapter}: {sorted(updates)}")


def _merged(name: str, weight: Tensor, updates: dict[str, Tensor], scale: float) -> Tensor:
    """A weight [out, in] with its update; takes from `updates` what it uses."""
    if name in updates:
        return updates.pop(name).to(weight.dtype)
    stem = name.removesuffix(".weight")
    if stem + _DOWN not in updates:
        return weight
    return merged_weight(weight, updates.pop(stem + _DOWN), updates.pop(stem + _UP), scale)


def _copy_files(source: Path, folder: Path, skipped: set[str]) -> None:
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in skipped:
            shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    main()
