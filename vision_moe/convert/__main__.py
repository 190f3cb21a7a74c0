"""Foreign CLIPs to transformers folders and back: `python -m vision_moe.convert SRC DST`; docs/convert.md.

SRC is read for what it is: a state dict of the official CLIP-MoE code, one of OpenAI's or open_clip's dense models, an
open_clip folder, or a transformers folder or hub name. DST is a transformers folder, or, if it ends in .pt or
.safetensors, the state dict of the official code (CLIP-MoE) or of open_clip (dense).
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModel, CLIPImageProcessor, CLIPModel, CLIPProcessor

from vision_moe.checkpoint import write_folder
from vision_moe.command_help import CommandParser
from vision_moe.convert.official import from_official, is_official, to_official
from vision_moe.convert.open_clip import architecture, from_state, to_open_clip
from vision_moe.convert.processor import OPENAI_VOCAB, image_processor, openai_tokenizer, resized
from vision_moe.convert.state_file import SUFFIXES, read_state, write_state
from vision_moe.model import CLIPMoEModel
from vision_moe.positions import resize_image
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)

OPEN_CLIP_CONFIG, _WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"


class Source(NamedTuple):
    """What SRC holds.

    Attributes:
        model: in our names.
        folder: SRC where it is a transformers model, which has a processor of its own.
        preprocess: an open_clip folder's settings of the pictures.
    """

    model: CLIPModel
    folder: str | None = None
    preprocess: Mapping[str, Any] | None = None


def convert(
    src: str,
    dst: Path,
    num_experts_per_tok: int | None = None,
    open_clip_name: str | None = None,
    image_size: int | None = None,
) -> None:
    """Converts SRC to DST; see the flags in `main`.

    Raises:
        ValueError: SRC needs a flag that is missing, has no use for one that is given, or cannot be expressed in DST.
    """
    source = _read(src, num_experts_per_tok, open_clip_name)
    writes_state = dst.suffix in SUFFIXES
    if source.folder is not None and not writes_state and image_size is None:
        raise ValueError(
            f"{src} is a transformers model already: name a DST that ends in {' or '.join(SUFFIXES)} for its state "
            f"dict in foreign names, or pass --image-size"
        )
    if image_size is not None:
        resize_image(source.model, image_size)
    if writes_state:
        write_state(_foreign_state(source.model), dst)
    else:
        _write_folder(source, dst)
    logger.info("written: %s", dst)


def main() -> None:
    """Entry point."""
    parser = CommandParser(
        __doc__,
        ".venv/bin/python -m vision_moe.convert clip-moe-4-2-sharegpt4v.pt outputs/clip_moe --num-experts-per-tok 2",
    )
    parser.add_argument("src", help="state dict, open_clip folder, transformers folder or hub name")
    parser.add_argument("dst", type=Path, help="folder, or file ending in .pt or .safetensors")
    parser.add_argument(
        "--num-experts-per-tok",
        "--num_experts_per_tok",
        type=int,
        help="experts of each token, needed for official CLIP-MoE files, which do not tell; 2 in the released ones",
    )
    parser.add_argument(
        "--open-clip-name",
        "--open_clip_name",
        help="open_clip's name of the model, needed for dense state dicts, which tell neither heads nor activation: "
        "ViT-B-32, ...; OpenAI's weights take the names that end in -quickgelu",
    )
    parser.add_argument(
        "--image-size", "--image_size", type=int, help="pixels per side that the image positions are interpolated to"
    )
    setup_logging()
    convert(**vars(parser.parse_args()))


def _read(src: str, num_experts_per_tok: int | None, open_clip_name: str | None) -> Source:
    path = Path(src)
    state = read_state(path) if path.is_file() else None
    official = state is not None and is_official(state)
    for flag, value, wanted, kind in (
        ("--num-experts-per-tok", num_experts_per_tok, official, "an official CLIP-MoE state dict"),
        ("--open-clip-name", open_clip_name, state is not None and not official, "a dense state dict"),
    ):
        if wanted != (value is not None):
            raise ValueError(f"{src} is {kind} and needs {flag}" if wanted else f"{flag} is for {kind}; {src} is none")
    if state is not None:
        if num_experts_per_tok is not None:
            return Source(from_official(state, num_experts_per_tok))
        assert open_clip_name is not None
        return Source(from_state(state, architecture(_packaged_config(open_clip_name))))
    if (path / OPEN_CLIP_CONFIG).is_file():
        settings = json.loads((path / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))
        found = architecture(settings["model_cfg"])
        return Source(from_state(read_state(path / _WEIGHTS), found), preprocess=settings.get("preprocess_cfg"))
    model = AutoModel.from_pretrained(src)
    if not isinstance(model, CLIPModel):
        raise ValueError(f"{src} must hold a CLIPModel or a CLIPMoEModel, but holds a {type(model).__name__}")
    return Source(model, folder=src)


def _packaged_config(name: str) -> dict[str, Any]:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError('open_clip is not installed: pip install "vision-moe[open_clip]"') from error
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(f"open_clip has no model {name!r}; it has {', '.join(open_clip.list_models())}")
    return config


def _foreign_state(model: CLIPModel) -> Any:
    if isinstance(model, CLIPMoEModel) and any(
        tower.moe_block_indices for tower in (model.config.vision_config, model.config.text_config)
    ):
        return to_official(model)
    return to_open_clip(model)


def _write_folder(source: Source, folder: Path) -> None:
    processor = _processor(source)

    def write(target: Path) -> None:
        source.model.save_pretrained(target)
        processor.save_pretrained(target)

    write_folder(folder, write)


def _processor(source: Source) -> CLIPProcessor | CLIPImageProcessor:
    vision, text = source.model.config.vision_config, source.model.config.text_config
    if source.folder is not None:
        own = CLIPProcessor.from_pretrained(source.folder)
        images = resized(own.image_processor, vision.image_size)
        return CLIPProcessor(image_processor=images, tokenizer=own.tokenizer)
    images = image_processor(vision.image_size, source.preprocess)
    if text.vocab_size != OPENAI_VOCAB:
        logger.warning(
            "no tokenizer is written: the vocabulary has %d tokens and is not OpenAI's %d",
            text.vocab_size,
            OPENAI_VOCAB,
        )
        return images
    return CLIPProcessor(image_processor=images, tokenizer=openai_tokenizer(text.max_position_embeddings))


if __name__ == "__main__":
    main()
