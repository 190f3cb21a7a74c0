"""The judge against a server in this process that answers by a script: what is retried, counted, cached and refused."""

import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval.tasks.judged.judge import Judge, JudgeConfig, JudgeError, failed
from mllm.tokenizer import train_tokenizer


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def test_an_answer_is_kept_and_a_second_run_asks_nothing(judge_endpoint, make_judge):
    judge_endpoint.script = [judge_endpoint.said("0.5")]
    first = make_judge(key="secret")
    first.preflight()
    assert first.ask("How good?", number).value == 0.5
    assert len(judge_endpoint.asked) == 2
    assert judge_endpoint.keys == ["Bearer secret"] * 2
    assert judge_endpoint.asked[1]["messages"] == [{"role": "user", "content": "How good?"}]
    assert judge_endpoint.asked[1]["temperature"] == 0
    second = make_judge()
    second.preflight()
    verdict = second.ask("How good?", number)
    assert (verdict.value, verdict.model, verdict.cached) == (0.5, "stub-1", True)
    assert len(judge_endpoint.asked) == 2
    # Another model, another judge.
    make_judge(model="other").ask("How good?", number)
    assert len(judge_endpoint.asked) == 3


def test_threads_may_ask_the_same(judge_endpoint, make_judge, tmp_path):
    judge = make_judge()
    with ThreadPoolExecutor(8) as pool:
        verdicts = list(pool.map(lambda index: judge.ask(f"{index % 2}?", number), range(32)))
    assert {verdict.value for verdict in verdicts} == {1}
    assert len(list((tmp_path / "cache").rglob("*"))) == 3  # the folder of this judge, and an answer to each question


def test_failures_of_the_server_are_tried_again(judge_endpoint, make_judge):
    judge_endpoint.script = [(429, "{}"), (500, "oops"), judge_endpoint.said("1")]
    judge = make_judge()
    assert judge.ask("?", number).value == 1
    assert len(judge_endpoint.asked) == 3


def test_a_request_that_takes_too_long_is_tried_again(judge_endpoint, make_judge):
    judge_endpoint.script = [1.0, judge_endpoint.said("1")]
    assert make_judge(timeout=0.2).ask("?", number).value == 1
    assert len(judge_endpoint.asked) == 2


def test_nonsense_is_asked_again_warmer_and_then_counted_and_not_kept(judge_endpoint, make_judge):
    judge = make_judge()
    bodies = ["not JSON", "{}", '{"choices": [{}]}']
    nonsense = [
        judge_endpoint.said("I cannot say"),
        judge_endpoint.said(None),
        judge_endpoint.said("  "),
        *((200, body) for body in bodies),
    ]
    for index, reply in enumerate(nonsense):
        judge_endpoint.script, judge_endpoint.asked = [reply], []
        verdict = judge.ask(f"{index}?", number)
        assert verdict.value is None
        assert verdict.reason
        assert [asked["temperature"] for asked in judge_endpoint.asked] == [0, 0.5, 1.0]
    judge_endpoint.script = [judge_endpoint.said("1")]
    assert judge.ask("0?", number).value == 1


def test_a_refused_key_is_an_error_at_once(judge_endpoint, make_judge):
    judge_endpoint.script = [(401, "{}")]
    with pytest.raises(JudgeError, match="VISION_MOE_JUDGE_URL, _MODEL and _KEY"):
        make_judge().ask("?", number)
    assert len(judge_endpoint.asked) == 1


def test_a_judge_that_has_gone_ends_the_task_instead_of_failing_every_question(judge_endpoint, make_judge):
    judge_endpoint.script = [(503, "{}")]
    judge = make_judge(max_retries=0)
    assert [judge.ask(f"{index}?", number).value for index in range(4)] == [None] * 4
    with pytest.raises(JudgeError, match=r"no answer 5 times in a row.*503"):
        judge.ask("4?", number)


def test_preflight_fails_where_the_judge_does_not_answer(judge_endpoint, make_judge):
    judge_endpoint.models = (404, "{}")
    make_judge().preflight()
    judge_endpoint.script = [(404, '{"error": {"message": "no model stub"}}')]
    with pytest.raises(JudgeError, match="no model stub"):
        make_judge().preflight()
    judge_endpoint.script, judge_endpoint.models = [judge_endpoint.said("1")], (401, "{}")
    with pytest.raises(JudgeError, match="AuthenticationError"):
        make_judge().preflight()
    with pytest.raises(JudgeError, match="cannot be asked"):
        make_judge(url="http://127.0.0.1:9/v1", max_retries=0).preflight()


def test_a_judge_that_has_gone_is_no_error_while_the_cache_knows(judge_endpoint, make_judge):
    judge = make_judge(max_retries=0)
    judge.ask("?", number)
    judge_endpoint.close()
    again = make_judge(max_retries=0)
    again.preflight()
    assert again.ask("?", number).value == 1
    assert again.ask("something else?", number).value is None


def test_the_environment_names_the_judge(tmp_path):
    names = {"VISION_MOE_JUDGE_URL": "http://here/v1", "VISION_MOE_JUDGE_MODEL": "m"}
    config = JudgeConfig.from_environment({**names, "VISION_MOE_JUDGE_CACHE": str(tmp_path)})
    assert (config.url, config.model, config.cache) == ("http://here/v1", "m", tmp_path)
    with pytest.raises(ValueError, match=r"set VISION_MOE_JUDGE_MODEL$"):
        JudgeConfig.from_environment({"VISION_MOE_JUDGE_URL": "http://here/v1"})
    with pytest.raises(ValueError, match="without /chat/completions"):
        JudgeConfig.from_environment({**names, "VISION_MOE_JUDGE_URL": "http://here/v1/chat/completions"})


def test_few_failures_are_counted_and_more_are_an_error():
    assert failed([0] * 98 + [1, 1]) == 2
    with pytest.raises(JudgeError, match="3 of 100 questions were not judged, more than 2%"):
        failed([0] * 97 + [1] * 3)


@pytest.mark.slow
def test_a_model_served_by_transformers_can_be_the_judge(make_judge, tmp_path):
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["Reply with the number 1 and nothing else."] * 4, 320)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    folder = tmp_path / "model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", folder, "--device", "cpu", "--port", str(port)]
    judge = make_judge(url=f"http://127.0.0.1:{port}/v1", model=str(folder), timeout=60.0, max_retries=0)
    with subprocess.Popen(command) as server:
        try:
            _wait_for(judge, seconds=180)
            verdict = judge.ask("How good?", lambda answer: answer, max_tokens=8)
        finally:
            server.terminate()
    assert verdict.value
    assert verdict.reason == ""


def _wait_for(judge: Judge, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            return judge.preflight()
        except JudgeError:
            if time.monotonic() > end:
                raise
            time.sleep(2)
