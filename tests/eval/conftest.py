"""A small POPE on plain pictures, in the form of Scenes; a tiny CLIP and a tiny LLaVA in folders; a judge."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from vision_moe.recipe import ScratchConfig
from vision_moe.scratch import build_clip, train_tokenizer


@pytest.fixture(scope="session")
def pope_folder(tmp_path_factory):
    """Six questions about three pictures, yes and no in turn, in two categories."""
    folder = tmp_path_factory.mktemp("scenes")
    (folder / "images" / "test").mkdir(parents=True)
    lines = []
    for index, color in enumerate(["red", "green", "blue"]):
        image = f"test/{index}.png"
        Image.new("RGB", (32, 32), color).save(folder / "images" / image)
        for label, asked in (("yes", color), ("no", "white")):
            lines.append(
                {
                    "question_id": len(lines) + 1,
                    "image": image,
                    "text": f"Is there a {asked} wall in the image?",
                    "label": label,
                    "category": "random" if index < 2 else "popular",
                }
            )
    (folder / "pope_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A CLIP of 2 + 2 layers and width 32 for pictures of 32 pixels, with random weights."""
    config = ScratchConfig(
        image_size=32,
        patch_size=16,
        hidden_size=32,
        num_vision_layers=2,
        num_text_layers=2,
        num_heads=2,
        projection_dim=16,
        max_text_tokens=12,
        vocab_size=300,
    )
    model, processor = build_clip(config, [f"a {color} picture" for color in ("red", "green", "blue", "white")], seed=0)
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    """A LLaVA with random weights; its language model lies beside it, in `llama`."""
    # Heavy, and most tests of this folder do without; so below.
    from mllm.assemble import assemble

    texts = ["Is there a red wall in the image? Yes. No.", "Answer the question using a single word or phrase."]
    sizes = ScratchConfig(
        image_size=32, patch_size=16, hidden_size=32, num_vision_layers=2, num_text_layers=1, num_heads=2
    )
    clip, _ = build_clip(sizes, texts, seed=0)
    tokenizer = train_tokenizer(texts, 400, 512)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    folder = tmp_path_factory.mktemp("llava")
    llama.save_pretrained(folder / "llama")
    return assemble(clip, llama, tokenizer, folder / "model")


class JudgeEndpoint:
    """A judge on a port of this machine.

    `script` has its replies in turn, the last one for ever: status and body, a pause in seconds, or a function of the
    prompt that gives status and body.
    """

    def __init__(self) -> None:
        self.script: list[Any] = [self.said("1")]
        self.models: tuple[int, str] = (200, json.dumps({"object": "list", "data": []}))
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(*endpoint.models)

            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.asked.append(json.loads(content))
                endpoint.keys.append(self.headers["Authorization"])
                reply = endpoint.script.pop(0) if len(endpoint.script) > 1 else endpoint.script[0]
                if isinstance(reply, float):
                    time.sleep(reply)
                    reply = endpoint.said("late")
                if callable(reply):
                    reply = reply(endpoint.asked[-1]["messages"][0]["content"])
                self._send(*reply)

            def _send(self, status: int, body: str) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    # The client then does not wait as long as it would.
                    self.send_header("retry-after-ms", "1")
                    self.end_headers()
                    self.wfile.write(body.encode())
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up waiting

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @staticmethod
    def said(text: object) -> tuple[int, str]:
        """A proper answer."""
        choice = {"index": 0, "message": {"content": text}}
        usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
        return 200, json.dumps({"model": "stub-1", "choices": [choice], "usage": usage})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def judge_endpoint():
    """A JudgeEndpoint, which says 1 until told otherwise."""
    endpoint = JudgeEndpoint()
    yield endpoint
    endpoint.close()


@pytest.fixture
def make_judge(judge_endpoint, tmp_path):
    """make_judge(**changes of JudgeConfig) -> a Judge that asks the endpoint."""
    from eval.tasks.judged.judge import Judge, JudgeConfig

    def make(**changes):
        settings = {
            "url": judge_endpoint.url,
            "model": "stub",
            "cache": tmp_path / "cache",
            "timeout": 5.0,
            "max_retries": 2,
        }
        return Judge(JudgeConfig(**{**settings, **changes}))

    return make
