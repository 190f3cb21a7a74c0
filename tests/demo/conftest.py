"""A real tiny LLaVA behind a real server, with a dense one to compare, the small CLIP, and a user's browser."""

import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from demo.encoders import Encoder, Search
from demo.page import build, launch
from demo.pictures import PictureFolder
from demo.service import Service
from demo.uploads import Uploads
from mllm.assemble import build_llava
from mllm.generate import Chat
from vision_moe.assets import resolve_model
from vision_moe.model import CLIPMoEVisionConfig, CLIPMoEVisionModel
from vision_moe.moe.router import Router
from vision_moe.processor import load_processor
from vision_moe.upcycle import upcycle

_WORDS = (
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
)


# The background-networking flags keep Chromium itself from looking for hosts outside.
_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
_TIMEOUT_MS = 90_000


class Served(NamedTuple):
    """The demo as it runs.

    url: where; service: what it shows; pictures: the folder it searches.
    """

    url: str
    service: Service
    pictures: Path


def _tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, so that a streamer, which waits for the end of a word, has something to show at each token."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session")
def make_chat() -> Callable[[list[int]], Chat]:
    """make_chat(moe_layers): a LLaVA whose tower has 4 blocks, of which it uses 3, and 4 x 4 patches."""

    def make(moe_layers: list[int]) -> Chat:
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
        return Chat(*build_llava(tower, llm, tokenizer), "v1")

    return make


@pytest.fixture(scope="session")
def chat(make_chat: Callable[[list[int]], Chat]) -> Chat:
    """A LLaVA with experts in blocks 0 and 2."""
    return make_chat([0, 2])


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a.png, and b.png with a question of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(generator.integers(0, 256, (48, 32, 3), np.uint8)).save(folder / name)
    (folder / "b.txt").write_text("Is there a star?\n")
    return folder


@pytest.fixture(scope="session")
def moe_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small CLIP as a CLIP-MoE with random routers."""
    folder = tmp_path_factory.mktemp("encoder")
    dense = CLIPModel.from_pretrained(resolve_model("scenes-clip"))
    model = upcycle(dense, num_experts=4, num_experts_per_tok=2)
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, Router):
            torch.nn.init.normal_(module.weight, std=0.2)
    model.save_pretrained(folder)
    load_processor(resolve_model("scenes-clip")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def served(
    chat: Chat,
    make_chat: Callable[[list[int]], Chat],
    pictures: Path,
    moe_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    """The whole demo, served on a free port of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        uploads = tmp_path_factory.mktemp("uploads")
        patch.setenv("GRADIO_TEMP_DIR", str(uploads))
        folder = PictureFolder(pictures, limit=8)
        encoders = {"Dense": Encoder("scenes-clip", "cpu"), "CLIP-MoE": Encoder(str(moe_encoder), "cpu")}
        service = Service(
            chat,
            Uploads(uploads),
            compared=make_chat([]),
            encoder=encoders["CLIP-MoE"],
            search=Search(encoders, folder),
            pictures=folder,
        )
        app = build(service, pictures)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        _, url, _ = launch(app, port=port, prevent_thread_lock=True, quiet=True)
        yield Served(url.rstrip("/"), service, pictures)
        app.close()


@pytest.fixture
def generating() -> Callable[[], bool]:
    """Whether a model is generating in this process right now."""
    return lambda: any(type(thread).__name__ == "Generation" for thread in threading.enumerate())


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    """One browser for all tests: its cache saves loading the page's scripts again."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install playwright)")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=list(_FLAGS))
        yield browser.new_context(viewport={"width": 1360, "height": 860})
        browser.close()


class Page:
    """One user's page, by what a user does."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.requests: list[str] = []
        page.on("request", lambda request: self.requests.append(request.url))
        page.set_default_timeout(_TIMEOUT_MS)
        page.goto(url)
        page.wait_for_selector("#box textarea")

    def ask(self, text: str, *pictures: Path) -> None:
        if pictures:
            self.page.set_input_files("#box input[type=file]", [str(path) for path in pictures])
            self.page.wait_for_selector("#box img")
        self.page.fill("#box textarea", text)
        self.page.press("#box textarea", "Enter")

    @property
    def answers(self) -> list[str]:
        return [" ".join(text.split()) for text in self.page.locator("#window .bot.message").all_inner_texts()]

    def wait_until_idle(self) -> None:
        self.page.wait_for_selector("#box button.submit-button")

    def answer_length(self, tokens: int) -> None:
        field = self.page.get_by_label("number input for Answer length, tokens at most").locator("visible=true")
        if not field.count():
            self.page.get_by_role("button", name="Answer settings").locator("visible=true").click()
        slider = self.page.get_by_label("range slider for Answer length, tokens at most").locator("visible=true")
        # Settings that have just opened may take back what is typed before the page has heard of it.
        settled = 0
        for _ in range(300):
            if slider.input_value() != str(tokens):
                field.fill(str(tokens))
                field.press("Enter")
                settled = 0
            self.page.wait_for_timeout(100)
            settled += slider.input_value() == str(tokens)
            if settled == 3:
                return
        raise AssertionError(f"the answer length does not stay at {tokens}")

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()


@pytest.fixture
def page(context: Any, served: Any) -> Iterator[Page]:
    page = Page(context.new_page(), served.url)
    yield page
    page.page.close()
