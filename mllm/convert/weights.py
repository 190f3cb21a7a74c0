"""The weights of a folder in Hugging Face's layout, whole or in shards, as safetensors or tensor-only .bin."""

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from vision_moe.convert.state_file import read_state

_SINGLE = ("model.safetensors", "pytorch_model.bin")
_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder; a .bin is opened for tensors alone.

    Raises:
        FileNotFoundError: the folder has no weights, or a shard is not there.
        ValueError: a file holds more than tensors, or the shards lack what the index names.
    """
    for name in _SINGLE:
        if (folder / name).is_file():
            return read_state(folder / name)
    for name in _INDEX:
        if (folder / name).is_file():
            return _read_shards(folder, folder / name)
    raise FileNotFoundError(f"{folder} holds no weights; one of {', '.join((*_SINGLE, *_INDEX))} must be there")


def write_weights(state: Mapping[str, Tensor], folder: Path) -> None:
    """Writes safetensors, in shards where they are large, as transformers of any version reads them."""
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    # Older versions of transformers refuse a file that does not name its framework.
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    state: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        state |= read_state(folder / shard)
    missing = sorted(places.keys() - state.keys())
    if missing:
        raise ValueError(f"{index} names weights that its shards do not hold: {missing}")
    return state
