"""State dicts in files: `.pt` is never unpickled beyond tensors, and appears whole or not at all."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vision_moe.files import replacing

SUFFIXES = (".pt", ".safetensors")
# What DistributedDataParallel puts before each name in open_clip's training checkpoints.
_DDP = "module."


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.safetensors` file, or of a torch file that holds a state dict or an open_clip training checkpoint.

    Raises:
        ValueError: the file is a TorchScript archive, or holds other things than tensors.
    """
    if path.suffix == ".safetensors":
        return load_file(path)
    is_zip = zipfile.is_zipfile(path)
    if is_zip and any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
        raise ValueError(
            f"{path} is a TorchScript archive, a program; save its tensors alone: "
            f"torch.save(torch.jit.load(path, map_location='cpu').state_dict(), 'state.pt')"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and is not opened, because a pickle can run any code; save its "
            f"state_dict() alone"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = {name.removeprefix(_DDP): value for name, value in content["state_dict"].items()}
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict, but a {type(content).__name__} that is not one of tensors")
    return dict(content)


def write_state(state: Mapping[str, Tensor], path: Path) -> None:
    """Writes a state dict as `.pt` or `.safetensors`."""
    with replacing(path) as temporary:
        if path.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
        else:
            torch.save(dict(state), temporary)
