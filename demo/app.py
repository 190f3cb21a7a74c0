"""The demo: chat with a LLaVA about a picture, and see which expert of its tower took which patch.

    python -m demo.app                                   with the model of the quick start
    python -m demo.app --model DIR [--compare DIR2] [--encoder DIR] [--dense DIR] [--pictures FOLDER] [--run FOLDER]

`mllm.generate` makes the prompt, so that the demo asks with the template and the pixels the model was trained with.
"""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gradio as gr

from demo.encoders import Encoder, Search
from demo.page import build, launch
from demo.pictures import PictureFolder
from demo.quickstart import QuickStart, check_llava, find, parts
from demo.service import Service
from demo.uploads import Uploads
from mllm.generate import Chat, load
from vision_moe.config import parse
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Chat with a LLaVA and see which expert of its vision tower took which patch.

    Example:
        .venv/bin/python -m demo.app --model outputs/scenes_llava/model --pictures outputs/scenes/images/test
    """

    model: str | None = None
    """Folder of a model that mllm.train wrote; None takes the quick start's."""
    run: Path | None = None
    """Folder of a quick start: the model, encoders and pictures that are not named come from there."""
    compare: str | None = None
    """Folder of a second one, asked side by side."""
    encoder: str | None = None
    """CLIP-MoE that the search and the experts of sentences use."""
    dense: str | None = None
    """Dense CLIP that the search sets beside it."""
    pictures: Path | None = None
    """Folder of pictures to search, and to see the experts' favorite patches of."""
    num_pictures: int = 200
    """So many of them are used, evenly spread."""
    examples: Path | None = None
    """Folder of example pictures, NAME.txt beside one holding its question; None takes those of `pictures`."""
    host: str = "127.0.0.1"
    """Interface to listen on; 0.0.0.0 lets other machines in."""
    port: int = 7860
    """Port to listen on."""
    password_file: Path | None = None
    """File whose first line is the password that the page asks for, with the user name demo."""
    answer_seconds: float = 120.0
    """Time limit of one answer."""
    max_queue: int = 64
    """Questions that may wait; more are turned away."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights; None keeps the checkpoint's."""
    device: str | None = None
    """Torch device; None takes the GPU if there is one."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the language models quantized."""


def make_service(config: DemoConfig, uploads: Uploads) -> Service:
    """Loads what the config names, and what it leaves out from the quick start if it names no model.

    Raises:
        FileNotFoundError: a model or the pictures are missing; the message says what to do.
        ValueError: a folder holds another kind of model.
    """
    found = _found(config)
    encoder, dense = config.encoder or found.encoder, config.dense or found.dense
    folder = config.pictures or found.pictures
    pictures = None if folder is None else PictureFolder(folder, config.num_pictures)
    encoders = {
        name: Encoder(str(path), config.device)
        for name, path in (("Dense", dense), ("CLIP-MoE", encoder))
        if path is not None
    }
    return Service(
        _load(str(config.model or found.model), config),
        uploads,
        compared=None if config.compare is None else _load(config.compare, config),
        encoder=encoders.get("CLIP-MoE"),
        search=Search(encoders, pictures) if encoders and pictures else None,
        pictures=pictures,
        seconds=config.answer_seconds,
    )


def _found(config: DemoConfig) -> QuickStart:
    if config.model is None:
        return find(config.run)
    return QuickStart() if config.run is None else parts(config.run)


def _load(folder: str, config: DemoConfig) -> Chat:
    check_llava(folder)
    logger.info("loading %s", folder)
    return load(folder, dtype=config.dtype, device=config.device, quantization=config.quantization)


def upload_folder() -> Path:
    """Where Gradio keeps what users send: GRADIO_TEMP_DIR, or a folder of its own among the temporary files."""
    return Path(gr.Blocks(analytics_enabled=False).GRADIO_CACHE)


def _password(file: Path | None) -> str | None:
    if file is None:
        return None
    lines = file.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise ValueError(f"{file} has no password in its first line")
    return lines[0].strip()


def main(args: list[str] | None = None) -> None:
    """Entry point of `python -m demo.app`."""
    setup_logging()
    config = parse(DemoConfig, args)
    try:
        password = _password(config.password_file)
        service = make_service(config, Uploads(upload_folder()))
        examples = config.examples or (service.pictures.folder if service.pictures else None)
        app = build(service, examples, name=Path(config.model).name if config.model else "quick start")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(f"demo: {error}")
    if password is None and config.host not in ("127.0.0.1", "localhost", "::1"):
        logger.warning("listening on %s without a password (--password_file): whoever reaches it can ask", config.host)
    launch(app, host=config.host, port=config.port, password=password, max_queue=config.max_queue)


if __name__ == "__main__":
    main()
