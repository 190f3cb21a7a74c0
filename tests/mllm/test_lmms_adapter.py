"""The adapter as lmms-eval sees it: found by its entry point, strict about what it cannot do."""

from types import SimpleNamespace

import pytest
import torch
from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from PIL import Image

from mllm.lmms_adapter import VisionMoeLlava, manifest


class EchoChat:
    """Answers with the question, twice, a stop string and a blank line between."""

    def __init__(self):
        self.batches = []
        self.model = SimpleNamespace(device=torch.device("cpu"))
        self.processor = SimpleNamespace(image_processor=SimpleNamespace(image_mean=[0.5, 0.5, 0.5]))

    def generate_batch(self, conversations, **settings):
        self.batches.append(([messages[0]["content"] for messages, _ in conversations], settings))
        return [f" {messages[0]['content']}\n\nSTOP again" for messages, _ in conversations]


@pytest.fixture
def make(monkeypatch):
    """Builds the adapter around an EchoChat, with four documents of a task named t."""

    def build(**options):
        monkeypatch.setattr("mllm.lmms_adapter.load", lambda *args, **kwargs: EchoChat())
        lm = VisionMoeLlava("folder", **options)
        documents = [{"images": [Image.new("RGB", (4, 4))] * count} for count in (1, 2, 0, 1)]
        lm.task_dict = {"t": {"test": documents}}
        return lm

    return build


def _request(doc_id, text, **settings):
    return SimpleNamespace(args=(text, settings, lambda doc: doc["images"], doc_id, "t", "test"))


def test_lmms_eval_finds_the_model_by_its_entry_point():
    assert get_model("vision_moe_llava") is VisionMoeLlava
    assert manifest().model_id == "vision_moe_llava"
    assert issubclass(VisionMoeLlava, lmms)


def test_lmms_evals_command_line_form_builds_it(monkeypatch):
    seen = {}
    monkeypatch.setattr("mllm.lmms_adapter.load", lambda *args, **kwargs: seen.update(kwargs) or EchoChat())
    config = {"batch_size": 4, "max_batch_size": None, "device": None}
    lm = VisionMoeLlava.create_from_arg_string("pretrained=folder,dtype=float32,max_new_tokens=9", config)
    assert (lm.batch_size, lm.max_new_tokens, seen["dtype"]) == (4, 9, "float32")


def test_answers_come_in_the_order_of_the_requests_and_batches_share_settings(make):
    lm = make(batch_size=2)
    requests = [
        _request(0, "short", max_new_tokens=3),
        _request(2, "another length", max_new_tokens=3),
        _request(3, "other settings", max_new_tokens=8),
        _request(0, "mid length", max_new_tokens=3),
    ]
    answers = lm.generate_until(requests)
    texts = ["<image>\nshort", "another length", "<image>\nother settings", "<image>\nmid length"]
    assert [answer.split("\n\nSTOP")[0] for answer in answers] == texts
    assert [len(batch) for batch, _ in lm.chat.batches] == [2, 1, 1]
    assert {settings["max_new_tokens"] for _, settings in lm.chat.batches} == {3, 8}


def test_every_picture_gets_its_place_unless_the_task_gave_it_one(make):
    lm = make()
    lm.generate_until([_request(1, "compare"), _request(1, "<image> or <image>?")])
    contents = sorted(text for batch, _ in lm.chat.batches for text in batch)
    assert contents == ["<image>\n<image>\ncompare", "<image> or <image>?"]


def test_stop_strings_cut_but_the_few_shot_delimiter_does_not(make):
    lm = make()
    assert lm.generate_until([_request(2, "hi", until=["STOP"])]) == ["hi"]
    assert lm.generate_until([_request(2, "hi", until=["\n\n"])]) == ["hi\n\nSTOP again"]


def test_greedy_settings_stay_greedy_and_the_cap_holds(make):
    lm = make(max_new_tokens=16)
    lm.generate_until([_request(0, "x", max_new_tokens=128, do_sample=False, temperature=0.7, top_p=0.9)])
    assert lm.chat.batches[0][1] == {"max_new_tokens": 16, "temperature": 0.0}


def test_settings_without_effect_are_named(make, caplog):
    make().generate_until([_request(0, "x", max_new_tokens=1, until=["\n"], repetition_penalty=1.2)])
    assert "repetition_penalty" in caplog.text
    assert "until" not in caplog.text


def test_a_video_is_refused_by_name(make):
    lm = make()
    lm.task_dict["t"]["test"][0]["images"] = ["clip.mp4"]
    with pytest.raises(ValueError, match="pictures only"):
        lm.generate_until([_request(0, "what happens?")])


def test_likelihoods_are_refused_with_a_way_out(make):
    with pytest.raises(NotImplementedError, match="generate_until"):
        make().loglikelihood([])
    with pytest.raises(NotImplementedError, match="generate_until"):
        make().generate_until_multi_round([])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": "auto"}, {"max_new_tokens": 0}])
def test_values_out_of_range_are_refused(make, options):
    with pytest.raises(ValueError, match="at least 1"):
        make(**options)
