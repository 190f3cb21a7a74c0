"""Reads LLaVA's layouts into a model folder of ours: `python -m mllm.convert.from_llava --llava DIR --out DIR`.

--llava is a whole `llava_llama` folder, or, with --projector or --lora, the language model that LLaVA started from.
"""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mllm.assemble import build_llava, save
from mllm.convert.llava_config import LlavaSettings, has_settings, language_config, read_settings
from mllm.convert.names import check_fit, refuse, split_parts, without_peft
from mllm.convert.weights import read_weights
from mllm.templates import Template
from mllm.tower_fingerprint import record_tower
from vision_moe.command_help import CommandParser
from vision_moe.convert.state_file import read_state
from vision_moe.model.families import tower_family
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)

_NON_LORA = "non_lora_trainables.bin"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LlavaSource:
    """The files of one LLaVA."""

    llava: Path
    """Whole `llava_llama` folder, or the language model beneath a projector or an adapter; its tokenizer is taken."""
    projector: Path | None = None
    """mm_projector.bin of LLaVA's pretraining."""
    lora: Path | None = None
    """Folder with PEFT's adapter, which is merged."""
    non_lora_trainables: Path | None = None
    """What trained beside the adapter; None = non_lora_trainables.bin in the adapter's folder."""

    def __post_init__(self) -> None:
        if self.projector is not None and self.lora is not None:
            raise ValueError("give --projector, or --lora with its --non_lora_trainables, and not both")
        if self.non_lora_trainables is not None and self.lora is None:
            raise ValueError("--non_lora_trainables goes with --lora, the folder of its adapter")

    def settings(self) -> LlavaSettings:
        """Of the first config.json that LLaVA wrote: beside the adapter or projector, or of the whole folder."""
        folders = [self.lora, None if self.projector is None else self.projector.parent, self.llava]
        for folder in folders:
            if folder is not None and (folder / "config.json").is_file() and has_settings(_config(folder)):
                return read_settings(_config(folder))
        logger.info("no config.json of LLaVA is beside the weights; taking LLaVA-1.5's settings: %s", LlavaSettings())
        return LlavaSettings()

    def state(self) -> dict[str, Tensor]:
        """All weights but the adapter's, under LLaVA's names; what trained later stands for what it started from."""
        state = without_peft(read_weights(self.llava))
        if self.projector is not None:
            state |= without_peft(read_state(self.projector))
        if self.lora is not None:
            state |= without_peft(read_state(self.non_lora_trainables or self.lora / _NON_LORA))
        return state


def from_llava(
    source: LlavaSource,
    out_dir: Path,
    vision: str | None = None,
    template: Template = "v1",
    dtype: torch.dtype | None = None,
) -> None:
    """Converts LLaVA's files to a model folder.

    Args:
        source: LLaVA's files.
        out_dir: folder to write, replaced if it is there.
        vision: folder or hub name of the CLIP; None = what LLaVA's config.json names.
        template: that the model was trained with; LLaVA's files do not tell.
        dtype: of all weights; None keeps the language model's.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: weights are missing, unexpected or of another shape, or the model is none that ours can be.
    """
    settings = source.settings()
    vision = vision or settings.vision_tower
    if vision is None:
        raise ValueError("LLaVA's config.json names no vision tower; give --vision, a folder or hub name of a CLIP")
    _check_select_feature(vision, settings)
    parts = split_parts(source.state())
    llm = _language_model(language_config(_config(source.llava)), parts.llm, dtype)
    if source.lora is not None:
        llm = _merged(llm, source.lora)
    model, processor = build_llava(
        vision,
        llm,
        source.llava,
        template=template,
        image_aspect_ratio=settings.image_aspect_ratio,
        select_layer=settings.select_layer,
        projector=settings.projector,
        dtype=llm.dtype,
    )
    _load_part("projector", model.model.multi_modal_projector, parts.projector)
    if parts.tower:
        _load_tower(model.model.vision_tower, parts.tower)
        record_tower(model)
    save(model, processor, out_dir)
    logger.info("written: %s", out_dir)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = CommandParser(
        __doc__, ".venv/bin/python -m mllm.convert.from_llava --llava llava-v1.5-7b --out outputs/llava_7b"
    )
    parser.add_argument("--llava", type=Path, required=True, help="llava_llama folder, or the language model")
    parser.add_argument("--projector", type=Path, help="mm_projector.bin of LLaVA's pretraining")
    parser.add_argument("--lora", type=Path, help="folder of LLaVA's LoRA training: adapter and config.json")
    parser.add_argument(
        "--non_lora_trainables", "--non-lora-trainables", type=Path, help=f"{_NON_LORA}, if it is not in --lora"
    )
    parser.add_argument("--vision", help="folder or hub name of the CLIP; default: what LLaVA's config.json names")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, replaced if it is there")
    parser.add_argument(
        "--template", choices=[name for name in get_args(Template) if name != "plain"], default="v1",
        help="conversation template of its training, which LLaVA's files do not tell; v1 is LLaVA-1.5's",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=sorted(_DTYPES), help="of all weights; default: the language model's")
    given = parser.parse_args(arguments)
    setup_logging()
    source = LlavaSource(
        llava=given.llava, projector=given.projector, lora=given.lora, non_lora_trainables=given.non_lora_trainables
    )
    from_llava(source, given.out, given.vision, given.template, _DTYPES.get(given.dtype))


def _config(folder: Path) -> Mapping[str, Any]:
    return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _check_select_feature(vision: str, settings: LlavaSettings) -> None:
    config = AutoConfig.from_pretrained(vision)
    has_class_token = tower_family(getattr(config, "vision_config", config)).class_token
    wanted = "patch" if has_class_token else "cls_patch"
    if settings.select_feature != wanted:
        raise ValueError(
            f"mm_vision_select_feature is {settings.select_feature!r}, but with this tower only {wanted!r} is supported"
        )


def _language_model(config: LlamaConfig, state: dict[str, Tensor], dtype: torch.dtype | None) -> PreTrainedModel:
    dtype = dtype or next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    model, report = LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True
    )
    refuse(
        "language model",
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        reshaped=(str(entry) for entry in report["mismatched_keys"]),
    )
    return model


def _merged(llm: PreTrainedModel, folder: Path) -> PreTrainedModel:
    adapted = PeftModel.from_pretrained(llm, str(folder))
    # PEFT itself only warns of weights that it has no place for.
    check_fit("adapter", load_peft_weights(str(folder), device="cpu"), get_peft_model_state_dict(adapted))
    return adapted.merge_and_unload()


def _load_part(part: str, module: nn.Module, state: dict[str, Tensor]) -> None:
    check_fit(part, state, module.state_dict())
    module.load_state_dict(state)


def _load_tower(tower: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Takes the tower that the checkpoint holds; its blocks behind the layer that is read are left out."""
    blocks = re.compile(re.escape(tower_family(tower.config).blocks) + r"\.(\d+)\..+")
    depth = tower.config.num_hidden_layers
    kept = {}
    for name, tensor in state.items():
        block = blocks.fullmatch(name)
        if block is None or int(block[1]) < depth:
            kept[name] = tensor
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    _load_part("vision tower", tower, kept)
    changed = sum(not torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())
    logger.info(
        "the checkpoint holds the tower's weights, which are taken; %d of %d tensors differ from those of --vision, "
        "which LLaVA's own loader would take unless unfreeze_mm_vision_tower is set",
        changed,
        len(before),
    )


if __name__ == "__main__":
    main()
