"""The chat in the terminal: one tower pass a picture, commands, Ctrl-C, and one answer for a script."""

import builtins
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import mllm.chat
from mllm.chat import Conversation, Sampling, main, read_picture, talk
from mllm.generate import Chat

QUESTION = "Is there a dog?"


@pytest.fixture
def conversation(make_chat: Callable[..., Chat]) -> Conversation:
    return Conversation(make_chat(), Sampling(max_new_tokens=6))


@pytest.fixture
def type_lines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """type_lines("...", KeyboardInterrupt, ...): what input() gives, line after line, and then the end of input."""

    def arm(*lines: Any) -> None:
        waiting = iter([*lines, EOFError])

        def read(prompt: str) -> str:
            line = next(waiting)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", read)

    return arm


@pytest.fixture
def interrupts_raise() -> Iterator[None]:
    """Test runners' worker processes may ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_answers_of_a_conversation_are_those_of_generate_with_one_tower_pass_a_picture(
    conversation: Conversation, picture: Image.Image
) -> None:
    chat = conversation.chat
    first = {"role": "user", "content": f"<image>\n{QUESTION}"}
    answer = chat.generate([first], [picture], max_new_tokens=6)
    turns = [first, {"role": "assistant", "content": answer}, {"role": "user", "content": "<image>\nAnd here?"}]
    second = chat.generate(turns, [picture, picture.rotate(180)], max_new_tokens=6)

    passes: list[int] = []
    chat.model.model.vision_tower.register_forward_pre_hook(lambda *_: passes.append(1))
    conversation.add(picture)
    assert "".join(conversation.ask(QUESTION)) == answer
    conversation.add(picture.rotate(180))
    assert "".join(conversation.ask("And here?")) == second
    assert conversation.messages == [*turns, {"role": "assistant", "content": second}]
    assert len(passes) == 2


def test_clear_forgets_turns_and_pictures(conversation: Conversation, picture: Image.Image) -> None:
    alone = "".join(conversation.ask(QUESTION))
    conversation.clear()
    conversation.add(picture)
    list(conversation.ask("A"))
    conversation.clear()
    assert "".join(conversation.ask(QUESTION)) == alone
    assert len(conversation.messages) == 2


def test_a_question_that_cannot_be_asked_leaves_the_conversation_as_it_was(
    conversation: Conversation, picture: Image.Image
) -> None:
    conversation.add(picture)
    with pytest.raises(ValueError, match=r"1 picture\(s\) for 2 <image>"):
        list(conversation.ask("<image> or <image>?"))
    assert conversation.messages == []
    list(conversation.ask(QUESTION))
    assert conversation.messages[0]["content"] == f"<image>\n{QUESTION}"


def test_commands_and_mistakes_are_answered_and_the_program_goes_on(
    conversation: Conversation, picture: Image.Image, type_lines: Any, tmp_path: Path, capsys: Any
) -> None:
    picture.save(tmp_path / "a b.png")
    type_lines(
        "/image",
        f"/image {tmp_path}/none.png",
        "/clean",
        "",
        f"/image {tmp_path}/a b.png",
        KeyboardInterrupt,
        QUESTION,
        "/exit",
        "never read",
    )
    talk(conversation)
    shown = capsys.readouterr().out
    for text in ("/image needs the FILE", "cannot read the picture", "none.png", "unknown command /clean", "/exit or"):
        assert text in shown
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    assert conversation.messages[0]["content"] == f"<image>\n{QUESTION}"
    assert f"{conversation.messages[1]['content']}\n" in shown


@pytest.mark.usefixtures("interrupts_raise")
def test_ctrl_c_stops_the_answer_and_not_the_program(
    make_chat: Callable[..., Chat], type_lines: Any, capsys: Any
) -> None:
    conversation = Conversation(make_chat(), Sampling(max_new_tokens=300))
    whole = conversation.chat.generate([{"role": "user", "content": QUESTION}], max_new_tokens=300)
    steps: list[int] = []

    def count(*_: Any) -> None:
        steps.append(1)
        if len(steps) == 100:
            os.kill(os.getpid(), signal.SIGINT)

    hook = conversation.chat.model.model.language_model.register_forward_pre_hook(count)
    type_lines(QUESTION)
    talk(conversation)
    hook.remove()
    assert 100 <= len(steps) < 300
    assert "(stopped)" in capsys.readouterr().out
    answer = conversation.messages[1]["content"]
    assert whole.startswith(answer)
    assert 0 < len(answer) < len(whole)


def test_with_a_question_only_the_answer_is_printed(
    make_chat: Callable[..., Chat], picture: Image.Image, tmp_path: Path, capsys: Any
) -> None:
    chat = make_chat()
    files = []
    for name, image in (("a.png", picture), ("b.png", picture.rotate(180))):
        image.save(tmp_path / name)
        files += ["--image", str(tmp_path / name)]
    expected = chat.generate([{"role": "user", "content": "A or B?"}], [picture, picture.rotate(180)], 6)
    capsys.readouterr()
    given = ["--model", str(tmp_path / "model"), *files, "--device", "cpu", "--max_new_tokens", "6"]
    assert main([*given, "--question", "A or B?"]) == 0
    assert capsys.readouterr().out == expected + "\n"


def test_a_broken_picture_is_a_message_and_a_status_before_the_model_is_loaded(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    assert main(["--model", "nowhere", f"--image={tmp_path}/a.jpg", "--question", QUESTION]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: cannot read the picture {tmp_path}/a.jpg")
    assert captured.out == ""


@pytest.mark.parametrize(("load_in", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, None)])
def test_load_in_names_the_type_of_the_weights(
    make_chat: Callable[..., Chat], monkeypatch: pytest.MonkeyPatch, load_in: str | None, dtype: torch.dtype | None
) -> None:
    saved = make_chat().model
    loaded: list[Chat] = []
    load = mllm.chat.load
    monkeypatch.setattr(mllm.chat, "load", lambda *args, **kwargs: loaded.append(load(*args, **kwargs)) or loaded[0])
    flags = [] if load_in is None else ["--load_in", load_in]
    assert (
        main(["--model", saved.name_or_path, "--device", "cpu", "--question", "A", "--max_new_tokens=1", *flags]) == 0
    )
    assert loaded[0].model.dtype == (dtype or saved.dtype)


def test_pictures_are_turned_the_way_the_camera_was_held(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 2)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == (2, 4)
