"""The endpoints as programs call them: what they answer, what they refuse, and that users do not meet each other."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError, Status
from PIL import Image

from demo.api import Api
from demo.page import build, launch


@pytest.fixture
def client(served: Any) -> Client:
    return Client(served.url, verbose=False)


def _files(*paths: Path) -> list[Any]:
    return [handle_file(path) for path in paths]


def _generated(served: Any, question: str, *names: str, tokens: int) -> str:
    pictures = [Image.open(served.pictures / name) for name in names]
    return served.service.chat.generate([{"role": "user", "content": question}], pictures, max_new_tokens=tokens)


def test_answer_streams_and_equals_the_models_own(client: Client, served: Any) -> None:
    job = client.submit(
        question="What is it?", pictures=_files(served.pictures / "a.png"), max_new_tokens=12, api_name="/chat"
    )
    expected = _generated(served, "What is it?", "a.png", tokens=12)
    assert job.result() == expected
    assert len(job.outputs()) > 2
    assert all(expected.startswith(text) for text in job.outputs())


def test_follow_up_is_asked_about_the_same_picture(client: Client, served: Any) -> None:
    history = [
        {"role": "user", "content": ["What is it?", *_files(served.pictures / "a.png")]},
        {"role": "assistant", "content": "a b"},
    ]
    answer = client.predict(question="Sure?", history=history, max_new_tokens=8, api_name="/chat")
    messages = [
        {"role": "user", "content": "<image>\nWhat is it?"},
        {"role": "assistant", "content": "a b"},
        {"role": "user", "content": "Sure?"},
    ]
    assert answer == served.service.chat.generate(messages, [Image.open(served.pictures / "a.png")], max_new_tokens=8)


def test_several_pictures_are_asked_about_together(client: Client, served: Any) -> None:
    paths = (served.pictures / "a.png", served.pictures / "b.png")
    answer = client.predict(question="is it", pictures=_files(*paths), max_new_tokens=8, api_name="/chat")
    assert answer == _generated(served, "<image>\n<image>\nis it", "a.png", "b.png", tokens=8)


def test_twenty_users_at_once_each_get_their_own_answer(served: Any) -> None:
    """One answer is made at a time; the others wait in the queue, and none is lost or mixed up."""
    questions = [f"is it {chr(ord('a') + number)}" for number in range(20)]

    def ask(question: str) -> str:
        answer: str = Client(served.url, verbose=False).predict(question=question, max_new_tokens=6, api_name="/chat")
        return answer

    with ThreadPoolExecutor(20) as users:
        answers = list(users.map(ask, questions))
    assert answers == [_generated(served, question, tokens=6) for question in questions]


def test_full_queue_turns_away_with_a_reason_and_keeps_those_who_wait(
    served: Any, generating: Callable[[], bool]
) -> None:
    app, goes_on = build(served.service), threading.Event()
    hook = served.service.chat.model.register_forward_pre_hook(lambda *_: goes_on.wait(60) and None)
    _, url, _ = launch(app, prevent_thread_lock=True, quiet=True, max_queue=1)
    try:
        user = Client(url, verbose=False)
        running = user.submit(question="is it a", max_new_tokens=4, api_name="/chat")
        while not generating():
            time.sleep(0.05)
        waiting = user.submit(question="is it b", max_new_tokens=4, api_name="/chat")
        while waiting.status().code != Status.IN_QUEUE:
            time.sleep(0.05)
        with pytest.raises(QueueError, match="Queue is full"):
            user.submit(question="is it c", max_new_tokens=4, api_name="/chat").result()
        goes_on.set()
        answers = [running.result(), waiting.result()]
    finally:
        goes_on.set()
        hook.remove()
        app.close()
    assert answers == [_generated(served, f"is it {letter}", tokens=4) for letter in "ab"]


def test_one_users_failure_is_not_anothers(served: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    good, bad = Client(served.url, verbose=False), Client(served.url, verbose=False)
    jobs = []
    for _ in range(3):
        jobs.append(good.submit(question="is it", max_new_tokens=6, api_name="/chat"))
        failing = bad.submit(question="is it", pictures=_files(tmp_path / "bad.png"), api_name="/chat")
        with pytest.raises(AppError, match=r"Cannot read bad\.png: its content is not a known picture"):
            failing.result()
    assert {job.result() for job in jobs} == {_generated(served, "is it", tokens=6)}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"question": "it " * 640}, "the model reads at most 640; shorten it"),
        ({"question": "a" * 2001}, "2,001 characters; at most 2,000"),
        ({"question": " "}, "Write a question"),
        ({"question": "a", "top_p": 0.0}, "top_p in "),
        ({"question": "a", "pictures": [{"name": "a.png"}]}, "malformed request: KeyError"),
        ({"question": "a", "history": [{"role": "user"}]}, "malformed request: KeyError"),
    ],
    ids=["context", "characters", "empty", "setting", "no path", "no content"],
)
def test_refusal_says_why(client: Client, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(AppError, match=message):
        client.predict(**request_, api_name="/chat")


def test_routing_gives_each_patchs_expert_and_gate(client: Client, served: Any) -> None:
    found = client.predict(picture=handle_file(served.pictures / "a.png"), api_name="/routing")
    routing = served.service.routing(Image.open(served.pictures / "a.png"))
    # The tower ends at its third block of four, so blocks 0 and 2 are both there.
    assert (found["blocks"], found["num_experts"]) == ([0, 2], 4)
    assert np.array_equal(found["experts"], np.stack(routing.expert_maps))
    assert np.allclose(found["gates"], np.stack(routing.gate_maps), atol=1e-5)
    assert len(np.unique(found["experts"])) > 1


def test_text_routing_gives_each_tokens_expert(client: Client) -> None:
    found = client.predict(sentence="a red circle", api_name="/text_routing")
    assert found["tokens"][1:4] == ["a", "red", "circle"]
    assert found["blocks"] == [0, 1, 2]
    assert np.array(found["experts"]).shape == np.array(found["gates"]).shape == (3, len(found["tokens"]))


def test_search_ranks_by_the_cosine_of_each_encoder(client: Client, served: Any) -> None:
    found = client.predict(sentence="a red circle", number=2, api_name="/search")
    assert list(found) == ["Dense", "CLIP-MoE"]
    for hits in found.values():
        assert len(hits) == 2
        assert hits[0]["cosine"] >= hits[1]["cosine"]
        assert {hit["picture"] for hit in hits} <= {"a.png", "b.png", "c.png"}
    with pytest.raises(AppError, match="0 characters"):
        client.predict(sentence="", api_name="/search")


def test_comparison_gives_both_models_own_answers(client: Client, served: Any) -> None:
    answers = client.predict(
        question="is it", pictures=_files(served.pictures / "a.png"), max_new_tokens=8, api_name="/compare"
    )
    messages, images = [{"role": "user", "content": "is it"}], [Image.open(served.pictures / "a.png")]
    assert answers == [
        chat.generate(messages, images, max_new_tokens=8) for chat in (served.service.chat, served.service.compared)
    ]


def test_only_uploads_can_be_read(client: Client, served: Any) -> None:
    """Neither by an endpoint that takes a path, nor by the address that serves files, nor through a link."""
    outside = served.pictures / "a.png"
    link = served.service.uploads.folder / "link.png"
    link.symlink_to(outside)
    for path in (outside, link, served.service.uploads.folder / ".." / outside.parent.name / "a.png"):
        with pytest.raises(AppError, match=r"was not uploaded here"):
            client.predict(question="is it", pictures=[{"path": str(path)}], api_name="/chat")
        with pytest.raises(AppError, match=r"was not uploaded here"):
            client.predict(picture={"path": str(path)}, api_name="/routing")
    for path in ("/etc/hostname", str(outside), str(Path(__file__)), "pyproject.toml"):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(f"{served.url}/gradio_api/file={path}", timeout=10)
        assert refusal.value.code in (403, 404)


def test_too_large_a_file_is_refused_while_it_arrives(served: Any) -> None:
    files = {"files": ("large.png", bytes(21 * 2**20))}
    refusal = httpx.post(f"{served.url}/gradio_api/upload", files=files)
    assert refusal.status_code == 413
    assert not list(served.service.uploads.folder.rglob("large.png"))


def test_health_tells_what_watches_the_process(served: Any) -> None:
    with urllib.request.urlopen(f"{served.url}/health", timeout=10) as answer:
        found = json.load(answer)
    assert found["status"] == "ok"
    assert found["waiting"] == 0
    assert found["uptime_seconds"] > 0


def test_every_endpoint_is_documented(client: Client) -> None:
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {"/chat", "/compare", "/routing", "/text_routing", "/search"}
    for name, endpoint in named.items():
        written = " ".join(getattr(Api, name[1:]).__doc__.split())
        assert " ".join(endpoint["description"].split()) == written
