"""Writes a model of ours in LLaVA's layout: `python -m mllm.convert.to_llava --model DIR --out DIR`.

OUT is what LLaVA's own code loads as `llava_llama`: language model and projector, and apart from them the tower, which
config.json names. LLaVA reads the tower of a plain CLIP alone.
"""

import logging
from pathlib import Path

import torch
from transformers import AutoConfig, CLIPImageProcessor, LlavaProcessor, PreTrainedModel

from mllm.convert.llava_config import llava_config
from mllm.convert.names import projector_state
from mllm.convert.weights import write_weights
from mllm.model import LlavaMoEForConditionalGeneration
from mllm.pretrained import load_model, load_processor
from mllm.tower import load_tower
from vision_moe.checkpoint import write_folder
from vision_moe.command_help import CommandParser
from vision_moe.convert.state_file import write_state
from vision_moe.files import write_json
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)

_TOWER_FOLDER = "vision_tower"


def to_llava(model_dir: Path, out_dir: Path, vision: str | None = None, *, projector_only: bool = False) -> None:
    """Converts a model folder; see the flags in `main`.

    Raises:
        ValueError: LLaVA's layout cannot express the model, or `vision` is not the tower that the model has.
    """
    model = load_model(model_dir, device="cpu")
    if vision is None:
        # Ours ends at the layer that is read.
        tower_name, select_layer = str((out_dir / _TOWER_FOLDER).resolve()), -1
    else:
        tower_name, select_layer = vision, _layer_in(vision, model)
    config = llava_config(model, tower_name, select_layer)
    if model.config.vision_config.model_type != "clip_vision_model":
        logger.warning("LLaVA's code loads plain CLIP towers alone, not a %s", model.config.vision_config.model_type)

    def write(folder: Path) -> None:
        write_json(folder / "config.json", config)
        projector = projector_state(model.model.multi_modal_projector)
        if projector_only:
            write_state(projector, folder / "mm_projector.bin")
            return
        write_weights({**_language_state(model), **projector}, folder)
        processor = load_processor(model_dir)
        processor.tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        if vision is None:
            _write_tower(model.model.vision_tower, processor, folder / _TOWER_FOLDER)

    write_folder(out_dir, write)
    logger.info("written: %s", out_dir)


def main(arguments: list[str] | None = None) -> None:
    """Entry point."""
    parser = CommandParser(
        __doc__,
        ".venv/bin/python -m mllm.convert.to_llava --model outputs/scenes_llava/model --out outputs/llava_layout",
    )
    parser.add_argument("--model", dest="model_dir", type=Path, required=True, help="model folder of mllm.train")
    parser.add_argument("--out", dest="out_dir", type=Path, required=True, help="folder to write, replaced if there")
    parser.add_argument(
        "--vision",
        help="folder or hub name of the tower that the model was made with, to name in config.json in place of a copy; "
        "its weights must still be the model's",
    )
    parser.add_argument(
        "--projector-only",
        "--projector_only",
        action="store_true",
        help="write mm_projector.bin and config.json alone, as LLaVA's pretraining does",
    )
    setup_logging()
    to_llava(**vars(parser.parse_args(arguments)))


def _language_state(model: LlavaMoEForConditionalGeneration) -> dict[str, torch.Tensor]:
    state = {f"model.{name}": tensor for name, tensor in model.model.language_model.state_dict().items()}
    if not model.config.tie_word_embeddings:
        state["lm_head.weight"] = model.lm_head.weight.detach()
    return state


def _layer_in(vision: str, model: LlavaMoEForConditionalGeneration) -> int:
    """The hidden state of tower `vision`, counted from its end, that is our tower's last one."""
    own = model.model.vision_tower
    config = AutoConfig.from_pretrained(vision)
    select_layer = own.config.num_hidden_layers - getattr(config, "vision_config", config).num_hidden_layers - 1
    weights = load_tower(vision, select_layer, own.dtype).state_dict() if select_layer < 0 else {}
    state = own.state_dict()
    if weights.keys() != state.keys() or any(not torch.equal(weights[name], state[name]) for name in state):
        raise ValueError(f"{vision} is not the tower of the model, or training has changed it; leave --vision out")
    return select_layer


def _write_tower(tower: PreTrainedModel, processor: LlavaProcessor, folder: Path) -> None:
    if tower.config.model_type != "clip_vision_model":
        tower.save_pretrained(folder)
    else:
        folder.mkdir()
        tower.config.save_pretrained(folder)
        # transformers before version 5 knows the names with this prefix alone; later versions know both.
        write_weights({f"vision_model.{name}": tensor for name, tensor in tower.state_dict().items()}, folder)
    fields = processor.image_processor.to_dict()
    names = ("size", "crop_size", "image_mean", "image_std", "resample")
    CLIPImageProcessor(**{name: fields[name] for name in names}).save_pretrained(folder)


if __name__ == "__main__":
    main()
