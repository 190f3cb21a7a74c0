"""Templates llama_2 and chatml, several pictures in a turn, and supervision with tokenizers of many kinds."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mllm.conversation import encode, encode_prompt, stop_token_ids
from vision_moe.assets import resolve_model

TURNS = [
    {"from": "human", "value": "Is there a dog?\n<image>"},
    {"from": "gpt", "value": "Yes."},
    {"from": "human", "value": "Red?"},
    {"from": "gpt", "value": "No, it is not."},
]
WORDS = ["dog", "No", "Is", "there", "a", "picture", "1.", "(x)", "Describe", "red", "$5", "a's", ".", ",", "café"]
TEXTS = [" ".join(WORDS), "USER: ASSISTANT: Is there a red dog? Yes, there is. 0123456789", "[INST]\n[/INST] <<SYS>>\n"]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Ids as text, -200 as <image>."""
    text, chunk = "", []
    for token_id in [*ids, None]:
        if token_id is None or token_id == -200:
            text += tokenizer.decode(chunk) + ("" if token_id is None else "<image>")
            chunk = []
        else:
            chunk.append(token_id)
    return text


def supervised(labels: list[int]) -> list[int]:
    return [label for label in labels if label != -100]


def _fast(model: Any, trainer: Any, pre_tokenizer: Any, decoder: Any, normalizer: Any = None) -> Any:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator(TEXTS * 8, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _byte_level(prefix: bool) -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return _fast(models.BPE(unk_token="<unk>"), trainer, level, decoders.ByteLevel())


def _unigram() -> Any:
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>")
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="always")
    return _fast(models.Unigram(), trainer, metaspace, decoders.Metaspace())


def _word_piece() -> Any:
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL)
    model = models.WordPiece(unk_token="<unk>")
    lower = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return _fast(model, trainer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), lower)


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte-level BPE": lambda: _byte_level(prefix=False),
    "byte-level BPE with a space in front": lambda: _byte_level(prefix=True),
    "unigram with metaspace": _unigram,
    "lower-case word pieces": _word_piece,
    "packaged Llama": lambda: AutoTokenizer.from_pretrained(resolve_model("scenes-llama")),
    "bytes, no offsets": lambda: ByT5Tokenizer(bos_token="<s>"),
}


@pytest.fixture(params=TOKENIZERS)
def any_tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    tokenizer = TOKENIZERS[request.param]()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return tokenizer


def test_llama_2_writes_rounds_of_instructions(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = encode(TURNS, tiny_tokenizer, "llama_2")
    text = decoded(tiny_tokenizer, ids)
    head, _, rest = text.partition("<</SYS>>\n\n")
    assert head.startswith("<s>[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer")
    assert head.endswith("please don't share false information.\n")
    assert rest == "<image>\nIs there a dog? [/INST] Yes. </s><s>[INST] Red? [/INST] No, it is not. </s>"
    assert tiny_tokenizer.decode(supervised(labels)) == " Yes. </s> No, it is not. </s>"
    assert stop_token_ids(tiny_tokenizer, "llama_2") == [tiny_tokenizer.eos_token_id]


def test_chatml_writes_no_line_breaks_between_messages(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = encode(TURNS, tiny_tokenizer, "chatml")
    assert decoded(tiny_tokenizer, ids) == (
        "<s><|im_start|>system\nAnswer the questions.<|im_end|>"
        "<|im_start|>user\n<image>\nIs there a dog?<|im_end|><|im_start|>assistant\nYes.<|im_end|>"
        "<|im_start|>user\nRed?<|im_end|><|im_start|>assistant\nNo, it is not.<|im_end|>"
    )
    assert tiny_tokenizer.decode(supervised(labels)) == "Yes.<|im_end|>No, it is not.<|im_end|>"
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(tiny_tokenizer, "chatml") == sorted([end, tiny_tokenizer.eos_token_id])


@pytest.mark.parametrize("template", ["llama_2", "chatml"])
def test_the_prompt_is_the_beginning_of_what_was_trained(
    tiny_tokenizer: PreTrainedTokenizerFast, template: Any
) -> None:
    ids, labels = encode(TURNS, tiny_tokenizer, template)
    for asked in (TURNS[:1], TURNS[:3]):
        prompt = encode_prompt(asked, tiny_tokenizer, template)
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt) - 1] == -100
        assert labels[len(prompt)] != -100


@pytest.mark.parametrize("template", ["v1", "plain", "llama_2", "chatml", "chat"])
def test_several_pictures_of_a_turn_are_kept_at_its_head(
    tiny_tokenizer: PreTrainedTokenizerFast, template: Any
) -> None:
    turns = [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "No."}]
    ids, _ = encode(turns, tiny_tokenizer, template, several_images=True)
    assert ids.count(-200) == 2
    if template != "plain":
        assert "<image>\n<image>\nIs  like ?" in decoded(tiny_tokenizer, ids)
    else:
        assert decoded(tiny_tokenizer, ids) == "<s><image><image>No.\n"


@pytest.mark.parametrize("template", ["v1", "plain", "llama_2", "chatml"])
def test_any_tokenizer_supervises_the_answers_and_nothing_else(
    any_tokenizer: PreTrainedTokenizerBase, template: Any
) -> None:
    rng = random.Random(0)
    end = {"v1": any_tokenizer.eos_token, "llama_2": any_tokenizer.eos_token, "chatml": "<|im_end|>", "plain": ""}
    for _ in range(20):
        rounds = 1 if template == "plain" else rng.randint(1, 3)
        texts = [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 5))) for _ in range(2 * rounds)]
        texts[0] = f"<image>\n{texts[0]}"
        turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
        ids, labels = encode(turns, any_tokenizer, template)
        assert all(label in (-100, token_id) for token_id, label in zip(ids, labels, strict=True))
        told = any_tokenizer.decode(supervised(labels))
        expected = "".join(text + end[template] for text in texts[1::2])
        assert "".join(told.split()).lower() == "".join(expected.split()).lower()


def test_a_tokenizer_without_the_tokens_of_chatml_is_an_error(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    plain = _byte_level(prefix=False)
    assert encode(TURNS, plain, "chatml")
    other = AutoTokenizer.from_pretrained(resolve_model("scenes-llama"))
    with pytest.raises(ValueError, match=r"needs <\|im_start\|> and <\|im_end\|> as tokens"):
        encode(TURNS, other, "chatml")


@pytest.mark.parametrize("template", ["llama_2", "chatml"])
def test_an_empty_last_answer_is_an_error(tiny_tokenizer: PreTrainedTokenizerFast, template: Any) -> None:
    with pytest.raises(ValueError, match="last answer is empty"):
        encode([*TURNS[:3], {"from": "gpt", "value": ""}], tiny_tokenizer, template)


@pytest.mark.parametrize("template", ["llama_2", "chatml"])
def test_an_empty_answer_between_others_is_not_supervised(
    tiny_tokenizer: PreTrainedTokenizerFast, template: Any
) -> None:
    _, labels = encode([TURNS[0], {"from": "gpt", "value": ""}, *TURNS[2:]], tiny_tokenizer, template)
    assert tiny_tokenizer.decode(supervised(labels)).strip() in ("No, it is not. </s>", "No, it is not.<|im_end|>")
