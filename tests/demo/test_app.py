"""The demo as its users meet it: a real tiny LLaVA behind a real server, asked by Gradio's own client."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.app import Demo, build, launch
from demo.routing_view import overlay
from mllm.assemble import build_llava
from mllm.generate import Chat
from vision_moe.model import CLIPMoEVisionConfig, CLIPMoEVisionModel
from vision_moe.moe.router import Router


def _tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, so that a streamer, which waits for the end of a word, has something to show at each token."""
    words = [
        "<unk>",
        "<pad>",
        "<s>",
        "</s>",
        "USER",
        "ASSISTANT",
        ":",
        "?",
        ".",
        "is",
        "it",
        *"abcdefghijklmnopqrstuvwxyz",
    ]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def _chat(moe_layers: list[int]) -> Chat:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = CLIPMoEVisionConfig(**sizes, num_hidden_layers=4, image_size=32, patch_size=8, moe_layers=moe_layers)
    tower = CLIPMoEVisionModel(config)
    for module in tower.modules():
        if isinstance(module, Router):
            torch.nn.init.normal_(module.weight, std=1.0)
    tokenizer = _tokenizer()
    llm = LlamaForCausalLM(
        LlamaConfig(
            **sizes, num_hidden_layers=2, vocab_size=len(tokenizer), max_position_embeddings=640, pad_token_id=1
        )
    )
    # Ends and padding never win: an answer is always as long as asked for.
    torch.nn.init.zeros_(llm.lm_head.weight[:4])
    model, processor = build_llava(tower, llm, tokenizer)
    return Chat(model, processor, "v1")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def chat() -> Chat:
    return _chat(moe_layers=[0, 2])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(generator.integers(0, 256, (48, 32, 3), np.uint8)).save(folder / name)
    (folder / "b.txt").write_text("Is there a star?\n")
    return folder


@pytest.fixture(scope="module")
def url(chat: Chat, pictures: Path) -> Iterator[str]:
    app = build(chat, pictures)
    _, local_url, _ = launch(
        app, host="127.0.0.1", port=_free_port(), examples_dir=pictures, prevent_thread_lock=True, quiet=True
    )
    yield local_url
    app.close()


@pytest.fixture
def client(url: str) -> Client:
    return Client(url, verbose=False)


def _ask(client: Client, text: str, *files: Path, tokens: int = 8) -> Any:
    message = {"text": text, "files": [handle_file(file) for file in files]}
    return client.submit(message=message, max_new_tokens=tokens, api_name="/chat")


def test_answer_streams_and_equals_the_models_own(client: Client, chat: Chat, pictures: Path) -> None:
    job = _ask(client, "What is it?", pictures / "a.png", tokens=12)
    expected = chat.generate(
        [{"role": "user", "content": "What is it?"}], [Image.open(pictures / "a.png")], max_new_tokens=12
    )
    assert job.result() == expected
    seen = job.outputs()
    assert len(seen) > 2
    assert all(expected.startswith(text) for text in seen)


def test_follow_up_is_asked_about_the_same_picture(client: Client, chat: Chat, pictures: Path) -> None:
    first = _ask(client, "What is it?", pictures / "a.png").result()
    follow_up = _ask(client, "Sure?").result()
    messages = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Sure?"},
    ]
    assert follow_up == chat.generate(messages, [Image.open(pictures / "a.png")], max_new_tokens=8)


def test_overlay_shows_the_routing_of_the_picture_layer_by_layer(client: Client, chat: Chat, pictures: Path) -> None:
    _ask(client, "What is it?", pictures / "a.png").result()
    demo = Demo(chat)
    # The tower ends at its third block of four, so blocks 0 and 2 are both there.
    assert demo.blocks == [0, 2]
    routing = demo.routing(Image.open(pictures / "a.png"))
    assert routing is not None
    assert len(np.unique(np.stack(routing.expert_maps))) > 1
    for layer, block in enumerate(demo.blocks):
        shown, legend = client.predict(layer=layer, api_name="/routing")
        maps = routing.expert_maps[layer], routing.gate_maps[layer]
        expected = overlay(routing.picture, *maps, num_experts=4, opacity=0.85)
        assert (np.asarray(Image.open(shown)) == np.asarray(expected)).all()
        assert f"Block {block}: patches by first choice" in legend


def test_newest_picture_is_the_current_one(client: Client, chat: Chat, pictures: Path) -> None:
    _ask(client, "What is it?", pictures / "a.png").result()
    _ask(client, "And this?", pictures / "b.png").result()
    shown, _ = client.predict(layer=0, api_name="/routing")
    demo = Demo(chat)
    expected, _ = demo.show(demo.routing(Image.open(pictures / "b.png")), 0)
    assert (np.asarray(Image.open(shown)) == np.asarray(expected)).all()


def test_one_users_picture_is_not_anothers(url: str, pictures: Path) -> None:
    one, other = Client(url, verbose=False), Client(url, verbose=False)
    _ask(one, "What is it?", pictures / "a.png").result()
    shown, legend = other.predict(layer=0, api_name="/routing")
    assert shown is None
    assert "Send a picture" in legend


def test_unreadable_picture_gives_its_reason_and_leaves_the_chat_usable(
    client: Client, pictures: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(AppError, match=r"Cannot read broken.png \(not a known picture format\)"):
        _ask(client, "What is it?", broken).result()
    assert _ask(client, "What is it?", pictures / "a.png").result()


def test_too_long_a_conversation_gives_the_models_own_error(client: Client) -> None:
    with pytest.raises(AppError, match=r"the model reads at most 640; shorten it"):
        _ask(client, "it " * 700).result()


def test_message_is_checked_before_it_enters_the_conversation(chat: Chat) -> None:
    demo = Demo(chat)
    refused = demo.check({"text": "", "files": []})
    assert (refused["is_valid"], refused["message"]) == (False, "Write a question to go with the picture.")
    assert demo.check({"text": "Hello", "files": []})["is_valid"]


def test_dense_tower_is_chatted_with_and_the_panel_says_why_it_is_empty() -> None:
    demo = Demo(_chat(moe_layers=[]))
    picture = Image.new("RGB", (32, 32))
    assert demo.routing(picture) is None
    shown, legend = demo.show(None, 0)
    assert shown is None
    assert "has no experts" in legend
    assert isinstance(build(demo.chat), gr.Blocks)


def test_examples_take_their_questions_from_text_files(chat: Chat, pictures: Path) -> None:
    (interface,) = [block for block in build(chat, pictures).blocks.values() if isinstance(block, gr.Chatbot)]
    assert [example["text"] for example in interface.examples] == ["Describe the image.", "Is there a star?"]


def test_folder_of_examples_without_pictures_is_an_error(chat: Chat, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no pictures"):
        build(chat, tmp_path)
