"""encode and encode_prompt: parity with LLaVA-1.5's preprocessing, other tokenizers, clear errors."""

import importlib.util
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

import mllm.templates
from mllm.conversation import encode, encode_prompt, stop_token_ids

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TWO_TURNS = [
    {"from": "human", "value": "Is there a dog?\n<image>"},
    {"from": "gpt", "value": "Yes."},
    {"from": "human", "value": "Red?"},
    {"from": "gpt", "value": "No, it is not."},
]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def supervised(tokenizer: PreTrainedTokenizerFast, labels: list[int]) -> str:
    return tokenizer.decode([label for label in labels if label != -100])


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not_legacy"])
def golden_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LlamaTokenizer:
    """The tokenizer of the golden cases: VISION_MOE_LLAVA_TOKENIZER (a file), or that of mistral-common."""
    file = os.environ.get("VISION_MOE_LLAVA_TOKENIZER")
    if file is None:
        spec = importlib.util.find_spec("mistral_common")
        if spec is None or not spec.submodule_search_locations:
            pytest.skip("mistral-common 1.13.1, whose tokenizer the golden cases use, is not installed")
        file = f"{spec.submodule_search_locations[0]}/data/tokenizer.model.v1"
    folder = tmp_path_factory.mktemp("tokenizer")
    shutil.copy(file, folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder, legacy=request.param, add_bos_token=True)
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def test_golden_cases_of_llava_are_met_exactly(golden_tokenizer: LlamaTokenizer, shared_data: Path) -> None:
    cases = json.loads((shared_data / "llava_labels" / "cases.json").read_text())
    cases = [case for case in cases if case["legacy"] == golden_tokenizer.legacy]
    assert len(cases) == 10
    for case in cases:
        if all(label == -100 for label in case["labels"]):
            with pytest.raises(ValueError, match="answer is empty"):
                encode(case["conversations"], golden_tokenizer, case["template"])
        else:
            actual = encode(case["conversations"], golden_tokenizer, case["template"])
            assert actual == (case["input_ids"], case["labels"]), case["case"]


def test_random_conversations_agree_with_llavas_counting(golden_tokenizer: LlamaTokenizer) -> None:
    """Where LLaVA's count of re-tokenised rounds works out, its result is ours; where not, ours is an error."""
    rng = random.Random(0)
    words = ["dog", " No", "é", "日本", "😀", "\n", "1.", "  two", "(x)", "USER", "\t", "$5", "a's", ".", ",", "▁"]

    def text(at_least: int) -> str:
        return rng.choice(["", " "]).join(rng.choice(words) for _ in range(rng.randint(at_least, 6)))

    compared = 0
    for _ in range(200):
        texts = [text(1 - i % 2) for i in range(2 * rng.randint(1, 4))]
        has_image = rng.random() < 0.6
        if has_image:
            texts[0] = rng.choice(["<image>\n{}", "{}\n<image>", "{} <image> x", "<image>"]).format(texts[0])
        ids, labels = _by_counting(texts, golden_tokenizer, has_image)
        if all(label == -100 for label in labels):
            with pytest.raises(ValueError, match="empty"):
                encode(turns(*texts), golden_tokenizer)
        else:
            assert encode(turns(*texts), golden_tokenizer) == (ids, labels), texts
            compared += 1
    assert compared > 100


def test_llama_2_conversations_agree_with_llavas_counting(golden_tokenizer: LlamaTokenizer) -> None:
    """LLaVA's preprocess_llama_2 counts tokens as for v1; where its count works out, its labels are ours."""
    rng = random.Random(1)
    words = ["dog", "No", "é", "日本", "1.", "(x)", "\n", "$5", "a's", "."]
    compared = 0
    for _ in range(60):
        texts = [" ".join(rng.choice(words) for _ in range(rng.randint(1, 6))).strip() or "x" for _ in range(2 * 3)]
        if rng.random() < 0.6:
            texts[0] = f"<image>\n{texts[0]}"
        actual_ids, actual = encode(turns(*texts), golden_tokenizer, "llama_2")
        ids, labels = _llama_2_by_counting(texts, golden_tokenizer)
        assert actual_ids == ids
        if any(label != -100 for label in labels):
            assert actual == labels, texts
            compared += 1
    assert compared > 40


def test_v1_supervises_answers_and_their_end_only(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = encode(TWO_TURNS, tiny_tokenizer, "v1")
    assert ids[0] == tiny_tokenizer.bos_token_id
    assert ids.count(-200) == 1
    before, after = ids[1 : ids.index(-200)], ids[ids.index(-200) + 1 :]
    text = tiny_tokenizer.decode(before) + "<image>" + tiny_tokenizer.decode(after)
    assert text == (
        f"{SYSTEM} USER: <image>\nIs there a dog? ASSISTANT: Yes.</s>USER: Red? ASSISTANT: No, it is not.</s>"
    )
    assert supervised(tiny_tokenizer, labels) == " Yes.</s> No, it is not.</s>"
    assert all(label in (-100, id_) for id_, label in zip(ids, labels, strict=True))


def test_plain_drops_the_question_and_ends_with_a_line(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = encode(turns("Describe.\n<image>", "A dog."), tiny_tokenizer, "plain")
    assert ids[:2] == [tiny_tokenizer.bos_token_id, -200]
    assert tiny_tokenizer.decode(ids[2:]) == "A dog.\n"
    assert labels == [-100, -100, *ids[2:]]


def test_chat_gives_the_tokens_of_the_tokenizers_own_template(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = encode(turns("Is there a dog?", "Yes.", "Red?", "\nNo"), tiny_tokenizer, "chat")
    messages = [
        {"role": "user", "content": "Is there a dog?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Red?"},
        {"role": "assistant", "content": "\nNo"},
    ]
    assert ids == tiny_tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert supervised(tiny_tokenizer, labels) == "Yes.<|im_end|>\nNo<|im_end|>"


@pytest.mark.parametrize("template", ["v1", "chat"])
def test_an_empty_answer_between_others_is_not_supervised(
    tiny_tokenizer: PreTrainedTokenizerFast, template: Any
) -> None:
    _, labels = encode(turns("a", "", "b", "Yes"), tiny_tokenizer, template)
    assert supervised(tiny_tokenizer, labels).strip() in ("Yes</s>", "Yes<|im_end|>")


@pytest.mark.parametrize("template", ["v1", "chat"])
def test_the_prompt_is_the_beginning_of_what_was_trained(
    tiny_tokenizer: PreTrainedTokenizerFast, template: Any
) -> None:
    ids, labels = encode(TWO_TURNS, tiny_tokenizer, template)
    for asked, answer in ((TWO_TURNS[:1], "Yes."), (TWO_TURNS[:3], "No, it is not.")):
        prompt = encode_prompt(asked, tiny_tokenizer, template)
        assert ids[: len(prompt)] == prompt
        rest = labels[len(prompt) :]
        first_answer = rest[: rest.index(-100)] if -100 in rest else rest
        assert supervised(tiny_tokenizer, first_answer).startswith((answer, f" {answer}"))


def test_the_plain_prompt_is_the_image_alone(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = encode_prompt(turns("<image>\nWhat is this?"), tiny_tokenizer, "plain")
    assert prompt == [tiny_tokenizer.bos_token_id, -200]


def test_prompts_keep_all_images_of_a_turn(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_prompt(turns("<image> or <image>?"), tiny_tokenizer, "v1").count(-200) == 2
    assert encode(turns("<image> or <image>?", "x"), tiny_tokenizer, "v1")[0].count(-200) == 1


def test_images_get_the_id_asked_for(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode(TWO_TURNS, tiny_tokenizer, image_token_id=7777)[0].count(7777) == 1


def test_stop_tokens_are_what_training_puts_behind_answers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    end = tiny_tokenizer.eos_token_id
    assert stop_token_ids(tiny_tokenizer, "v1") == [end]
    assert stop_token_ids(tiny_tokenizer, "plain") == sorted([end, tiny_tokenizer.encode("\n")[-1]])
    assert stop_token_ids(tiny_tokenizer, "chat") == sorted([end, tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")])


@pytest.mark.parametrize(
    ("conversation", "template", "message"),
    [
        (turns("a", ""), "v1", "last answer is empty"),
        (turns("a", ""), "chat", "nothing in the conversation is supervised"),
        (turns("a", "b", "c"), "v1", "ends with a human turn"),
        (turns("", "b"), "v1", "empty question"),
        ([], "v1", "no human turn"),
        (turns("a", "b")[1:], "v1", "no human turn"),
        ([*turns("a", "b"), {"from": "gpt", "value": "c"}], "v1", "take turns"),
        ([{"from": "system", "value": "a"}], "v1", "from='system'"),
        ([{"from": "human", "value": None}], "v1", "NoneType"),
        (turns("a", "<image>"), "v1", "an answer contains <image>"),
        (turns("a", "b"), "plain", "takes one question with <image>"),
        (turns("<image>a", "b", "c", "d"), "plain", "4 turns"),
        (turns("a", "b"), "v2", "unknown conversation template 'v2'"),
    ],
)
def test_what_cannot_be_trained_on_is_a_clear_error(
    tiny_tokenizer: PreTrainedTokenizerFast, conversation: Any, template: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode(conversation, tiny_tokenizer, template)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "needs a tokenizer with a chat_template"),
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "no token that ends"),
        ("{% for m in messages %}{{ messages|length ~ m['content'] + '</s>' }}{% endfor %}", "rewrites earlier turns"),
    ],
)
def test_an_unusable_chat_template_is_a_clear_error(
    tiny_tokenizer: PreTrainedTokenizerFast, chat_template: str | None, message: str
) -> None:
    tiny_tokenizer.chat_template = chat_template
    with pytest.raises(ValueError, match=message):
        encode(turns("a", "b"), tiny_tokenizer, "chat")


def test_a_prompt_ends_with_a_question(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="must end with a human turn"):
        encode_prompt(turns("a", "b"), tiny_tokenizer)


def _by_counting(texts: list[str], tokenizer: LlamaTokenizer, has_image: bool) -> tuple[list[int], list[int]]:
    """LLaVA-1.5's way with template v1: tokenise rounds again and subtract what a tokenizer adds to them."""

    def ids_of(text: str) -> list[int]:
        return _image_ids(text, tokenizer) if has_image else list(tokenizer(text)["input_ids"])

    prompt = f"{SYSTEM} "
    for index, text in enumerate(texts):
        if "<image>" in text:
            text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
        side, end = (("USER", " "), ("ASSISTANT", "</s>"))[index % 2]
        prompt += f"{side}: {text}{end}" if text else f"{side}:"
    ids = ids_of(prompt)
    labels, position = [-100], 1
    for index, one_round in enumerate(prompt.split("</s>")):
        parts = one_round.split(" ASSISTANT: ")
        if len(parts) != 2:
            break
        shift = int(index > 0 and not tokenizer.legacy)
        length = len(ids_of(one_round)) - shift
        asked = len(ids_of(parts[0] + " ASSISTANT: ")) - 2 - shift
        labels += [-100] * asked + ids[position + asked : position + length]
        position += length
    return ids, labels if position == len(ids) else [-100] * len(ids)


def _llama_2_by_counting(texts: list[str], tokenizer: LlamaTokenizer) -> tuple[list[int], list[int]]:
    system = mllm.templates._LLAMA_2_SYSTEM
    prompt = ""
    for index, text in enumerate(texts):
        if index % 2:
            prompt += f" {text} </s>"
        else:
            asked = text if index else f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
            prompt += f"{'<s>' if index else ''}[INST] {asked} [/INST]"
    ids = _image_ids(prompt, tokenizer)
    labels, position = [-100], 1
    for one_round in prompt.split("</s>")[:-1]:
        asked, told = one_round.split("[/INST] ")
        assert told
        length = len(_image_ids(one_round, tokenizer))
        num_asked = len(_image_ids(asked + "[/INST] ", tokenizer)) - 2
        labels += [-100] * num_asked + ids[position + num_asked : position + length]
        position += length
    return ids, labels if position == len(ids) else [-100] * len(ids)


def _image_ids(text: str, tokenizer: LlamaTokenizer) -> list[int]:
    """LLaVA's tokenizer_image_token: chunks on their own, one start token."""
    chunks = [tokenizer(chunk)["input_ids"] for chunk in text.split("<image>")]
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, -200, *chunk[1:]]
    return ids
