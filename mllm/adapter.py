"""What a stage with LoRA trained, as a folder of its own: an ordinary PEFT adapter, and what it was trained on.

`adapter_config.json` and `adapter_model.safetensors` are PEFT's, with the parts that trained in full as its
`modules_to_save`; `llava_adapter.json` names the base model and fingerprints its weights, so that nothing need be told
from names; the processor is the stage's.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from mllm.images import AspectRatio
from mllm.lora import ADAPTER_NAME
from mllm.quantization import Quantization
from mllm.tower_fingerprint import record_tower
from vision_moe.checkpoint import write_folder
from vision_moe.files import weights_sha256, write_json

# In front of the names of PEFT's files: its wrapper around the model.
PREFIX = "base_model.model."
INFO_FILE, CONFIG_FILE, WEIGHTS_FILE = "llava_adapter.json", "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterInfo:
    """On what an adapter was trained.

    Attributes:
        base: folder of the base model.
        base_fingerprint: of its weights, see `vision_moe.files.weights_sha256`.
        quantization: in which the base was held in training; its folder is not quantised.
        image_aspect_ratio: how pictures became square in training.
        vision_tower_fingerprint: of the tower after training, see `mllm.tower_fingerprint`.
    """

    base: str
    base_fingerprint: str
    quantization: Quantization | None
    image_aspect_ratio: AspectRatio
    vision_tower_fingerprint: str


def save_adapter(
    folder: Path, model: PreTrainedModel, state: Mapping[str, Tensor], info: AdapterInfo, processor: ProcessorMixin
) -> None:
    """Writes what trained in a model with adapters.

    Args:
        folder: to be written; appears when it is whole.
        model: after `mllm.lora.add_lora`.
        state: its `state_dict()`, or all of it that trained, gathered where weights are split over ranks.
        info: on what it was trained.
        processor: that the model was trained with.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = _trained_in_full(trained)
    whole = tuple(f"model.{part}." for part in parts)
    tensors = {
        PREFIX + name.replace(f".{ADAPTER_NAME}.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in state.items()
        if name in trained or name.startswith(whole)
    }
    config: LoraConfig = copy.deepcopy(model.peft_config[ADAPTER_NAME])
    config.base_model_name_or_path = info.base
    config.modules_to_save = parts or None
    config.inference_mode = True

    def write(target: Path) -> None:
        config.save_pretrained(target)
        save_file(tensors, target / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(target / INFO_FILE, asdict(info))
        processor.save_pretrained(target)

    write_folder(folder, write)


def is_adapter(folder: str | Path) -> bool:
    """Whether `save_adapter` wrote this folder."""
    return (Path(folder) / INFO_FILE).is_file()


def read_info(folder: Path) -> AdapterInfo:
    """Reads on what an adapter was trained.

    Raises:
        ValueError: it is no adapter of `mllm.train`.
    """
    if not is_adapter(folder):
        raise ValueError(f"{folder} is no adapter of mllm.train: it has no {INFO_FILE}")
    return AdapterInfo(**json.loads((folder / INFO_FILE).read_text(encoding="utf-8")))


def find_base(folder: Path, moved_to: Path | None = None) -> Path:
    """Folder of the model that an adapter was trained on, its weights checked.

    Args:
        folder: the adapter.
        moved_to: where the base model is now; None = where it was.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its weights are not those that the adapter was trained on.
    """
    info = read_info(folder)
    base = Path(info.base) if moved_to is None else moved_to
    if not base.is_dir():
        raise FileNotFoundError(
            f"the model that {folder} was trained on is not at {base}; python -m mllm.merge takes --base DIR"
        )
    found = weights_sha256(base)
    if found != info.base_fingerprint:
        raise ValueError(
            f"{base} holds other weights (fingerprint {found[:12]}) than {folder} was trained on "
            f"({info.base_fingerprint[:12]}); it cannot take this adapter"
        )
    return base


def attach(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Joins an adapter to its base model: merged into whole weights, beside quantised ones.

    Raises:
        ValueError: the adapter's file lacks weights, or holds others.
    """
    wrapped = PeftModel.from_pretrained(model, folder)
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        differing = set(file.keys()) ^ set(get_peft_model_state_dict(wrapped))
    if differing:
        raise ValueError(f"{folder} does not fit its base model; only one of them has {sorted(differing)}")
    info = read_info(folder)
    is_quantized = getattr(model, "is_quantized", False)
    joined = wrapped.get_base_model() if is_quantized else wrapped.merge_and_unload()
    joined.config.image_aspect_ratio = info.image_aspect_ratio
    joined.config.vision_tower_fingerprint = info.vision_tower_fingerprint
    if not is_quantized:
        # PEFT's merge rounds otherwise than ours.
        record_tower(joined)
    return joined


def load_tensors(folder: Path) -> tuple[dict[str, Tensor], float]:
    """An adapter's tensors by the names of its model, and the scale alpha / r of its products B A."""
    config = LoraConfig.from_pretrained(folder)
    tensors = load_file(folder / WEIGHTS_FILE)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}, config.lora_alpha / config.r


def _trained_in_full(trained: set[str]) -> list[str]:
    """Modules of the inner model that hold all that trained without adapters: whole parts, or in a tower with adapters
    the routers and experts."""
    names = {name.removeprefix("model.") for name in trained}
    inside = "vision_tower." if any(name.startswith("vision_tower.") and ".lora_" in name for name in names) else None
    return sorted(
        {
            name.rpartition(".")[0] if inside and name.startswith(inside) else name.partition(".")[0]
            for name in names
            if ".lora_" not in name
        }
    )
