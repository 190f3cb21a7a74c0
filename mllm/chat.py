"""Talks to a LLaVA in the terminal, or answers one question in a script.

    python -m mllm.chat --model DIR --image FILE [--image FILE2] [--question TEXT]

Answers are streamed; the tower runs once for each picture of a conversation. In the terminal `/image FILE` adds a
picture to the next question, `/clear` starts anew and `/exit` leaves. Ctrl-C stops an answer, not the program.
"""

import contextlib
import re
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from PIL import Image, ImageOps
from torch import Tensor

from mllm.conversation import IMAGE_TOKEN
from mllm.generate import Chat, load
from mllm.images import read_image
from mllm.quantization import Quantization
from vision_moe.config import parse

LoadIn = Literal["4bit", "8bit", "bf16", "fp16", "fp32"]
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_QUANTIZATIONS: dict[str, Quantization] = {"4bit": "4bit", "8bit": "8bit"}
_HELP = "/image FILE adds a picture to the next question, /clear starts anew, /exit leaves, Ctrl-C stops an answer"


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Chat with a LLaVA in the terminal.

    Example:
        .venv/bin/python -m mllm.chat --model outputs/llava/model --image photo.jpg --question 'What is this?'
    """

    model: str
    """Folder of a model or an adapter that mllm.train wrote."""
    image: list[str] = field(default_factory=list)
    """Picture of the first question; several times for several pictures."""
    question: str | None = None
    """Ask this alone, print the answer and leave."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_p: float = 1.0
    """Share of the probability mass that tokens are drawn from; counts above temperature 0."""
    max_new_tokens: int = 512
    """Length of an answer at most."""
    load_in: LoadIn | None = None
    """Type of the weights, 4bit and 8bit for the language model's alone; None keeps the checkpoint's."""
    device: str | None = None
    """Torch device; None takes the GPU if there is one."""


class Sampling(NamedTuple):
    """How answers are drawn; see `Chat.generate`."""

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 512


class Conversation:
    """The turns so far, and what the tower made of their pictures.

    Args:
        chat: the model.
        sampling: of every answer.
    """

    def __init__(self, chat: Chat, sampling: Sampling) -> None:
        self.chat = chat
        self.sampling = sampling
        self.messages: list[dict[str, str]] = []
        self._features: list[Tensor] = []
        self._num_placed = 0

    def add(self, picture: Image.Image) -> None:
        """Lays a picture beside the next question, in front of it unless the question says `<image>` itself."""
        self._features += self.chat.image_features([picture])

    def clear(self) -> None:
        """Forgets the turns and the pictures."""
        self.messages, self._features, self._num_placed = [], [], 0

    def ask(self, question: str) -> Generator[str, None, None]:
        """Streams the pieces of the answer.

        Stopped by closing it or by Ctrl-C, what there is of the answer counts. A question without any answer is
        forgotten, its pictures wait for the next one.

        Raises:
            ValueError: it cannot be asked, see `Chat.generate`.
        """
        num_new = len(self._features) - self._num_placed
        content = question if IMAGE_TOKEN in question else f"{IMAGE_TOKEN}\n" * num_new + question
        messages = [*self.messages, {"role": "user", "content": content}]
        answer = ""
        stream = self.chat.stream(messages, self._features, **self.sampling._asdict())
        try:
            with contextlib.closing(stream):
                for text in stream:
                    piece, answer = text[len(answer) :], text
                    yield piece
        finally:
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": answer}]
                self._num_placed = len(self._features)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    given = sys.argv[1:] if args is None else args
    # The parser's own word for "one more" of a list is --image+.
    config = parse(ChatConfig, [re.sub(r"^--image(?==|$)", "--image+", word) for word in given])
    try:
        pictures = [read_picture(Path(name).expanduser()) for name in config.image]
        conversation = Conversation(
            load(
                config.model,
                dtype=_DTYPES.get(config.load_in or ""),
                device=config.device,
                quantization=_QUANTIZATIONS.get(config.load_in or ""),
            ),
            Sampling(config.temperature, config.top_p, config.max_new_tokens),
        )
        for picture in pictures:
            conversation.add(picture)
        if config.question is not None:
            _print_answer(conversation, config.question)
            return 0
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    talk(conversation)
    return 0


def talk(conversation: Conversation) -> None:
    """Reads questions and commands from the terminal until /exit or the end of input."""
    with contextlib.suppress(ImportError):
        # Line editing and a history for input(), where the platform has them.
        import readline  # noqa: F401
    sys.stdout.write(f"{_HELP}\n")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n/exit or Ctrl-D leaves\n")
            continue
        if line == "/exit":
            return
        try:
            _obey(conversation, line)
        except ValueError as error:
            sys.stdout.write(f"error: {error}\n")
        except KeyboardInterrupt:
            sys.stdout.write(" (stopped)\n")


def read_picture(path: Path) -> Image.Image:
    """Reads a picture, turned the way its camera was held.

    Raises:
        ValueError: it is missing or cannot be decoded.
    """
    return ImageOps.exif_transpose(read_image(path))


def _obey(conversation: Conversation, line: str) -> None:
    """Does what one line of the user says.

    Raises:
        ValueError: an unknown command, or what cannot be read or asked.
    """
    command, _, argument = line.partition(" ")
    if command == "/image":
        if not argument.strip():
            raise ValueError("/image needs the FILE of a picture")
        conversation.add(read_picture(Path(argument.strip()).expanduser()))
    elif command == "/clear":
        conversation.clear()
    elif command.startswith("/"):
        raise ValueError(f"unknown command {command}; {_HELP}")
    elif line:
        _print_answer(conversation, line)


def _print_answer(conversation: Conversation, question: str) -> None:
    with contextlib.closing(conversation.ask(question)) as pieces:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    sys.stdout.write("\n")


if __name__ == "__main__":
    sys.exit(main())
