"""The small Llama's training: its tokenizer, its text, and that a killed run goes on exactly."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from mllm.conversation import IGNORE_INDEX
from mllm.lm_text import PackedRows, longest_captions, read_pictures, render, split
from mllm.pretrain_lm import PretrainLMConfig, build_llama, run
from mllm.tokenizer import SMALLEST_VOCABULARY, train_tokenizer

_TEXT = "Hello, wörld 12.50!\n  \tx  y <b> 你好 🙂"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for name, answer in (("pretrain", "a red star above a blue ring"), ("finetune", "Yes")):
        turns = [{"from": "human", "value": "Is it there?\n<image>"}, {"from": "gpt", "value": answer}]
        samples = [{"id": str(i), "image": f"{i}.jpg", "conversations": turns} for i in range(12)]
        (folder / f"llava_{name}.json").write_text(json.dumps(samples))
    return folder


@pytest.fixture
def config(scenes, tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2}
    training = {"num_tokens": 6 * 64, "row_length": 64, "batch_size": 2, "num_held_out": 2, "save_steps": 1}
    return PretrainLMConfig(data=scenes, output=tmp_path / "run", **sizes, **training)


@pytest.mark.parametrize("vocab_size", [SMALLEST_VOCABULARY, 300])
def test_tokenizer_encodes_any_text_and_gives_it_back(vocab_size, tmp_path):
    tokenizer = train_tokenizer(["Is there a red star? Yes"] * 5, vocab_size)
    tokenizer.save_pretrained(tmp_path)
    for fast in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = fast(_TEXT)["input_ids"]
        assert ids[0] == fast.bos_token_id
        assert fast.unk_token_id not in ids
        assert fast.decode(ids, skip_special_tokens=True) == _TEXT


def test_tokenizer_spells_numbers_digit_by_digit():
    tokenizer = train_tokenizer(["1234 1234 1234"] * 9, 300)
    assert len(tokenizer("1234", add_special_tokens=False)["input_ids"]) == 4


def test_tokenizer_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 260"):
        train_tokenizer(["a"], 259)


def test_picture_is_given_by_its_longest_caption_and_answers_alone_are_supervised(scenes):
    samples = json.loads((scenes / "llava_pretrain.json").read_text())[:1]
    samples += json.loads((scenes / "llava_finetune.json").read_text())[:1]
    captions = longest_captions(samples)
    assert captions == {"0.jpg": "a red star above a blue ring"}
    tokenizer = train_tokenizer([], SMALLEST_VOCABULARY)
    stream = list(render(samples[1:], read_pictures(None, samples), tokenizer, picture_share=1.0, seed=0))
    text = tokenizer.decode([token for token, *_ in stream])
    assert text.endswith("USER: a red star above a blue ring\nIs it there? ASSISTANT: Yes</s>")
    assert tokenizer.decode([label for _, label, _ in stream if label != IGNORE_INDEX]) == " Yes</s>"
    blind = tokenizer.decode([token for token, *_ in render(samples[1:], {}, tokenizer, picture_share=0.0, seed=0)])
    assert blind.endswith("questions. USER: Is it there? ASSISTANT: Yes</s>")


def test_pictures_in_words_are_read_from_a_file_that_knows_all_of_them(scenes, tmp_path):
    samples = json.loads((scenes / "llava_finetune.json").read_text())
    words = {f"{i}.jpg": ["star", "ring"] for i in range(12)}
    path = tmp_path / "words.json"
    path.write_text(json.dumps(words))
    pictures = read_pictures(path, samples)
    tokenizer = train_tokenizer([], SMALLEST_VOCABULARY)
    text = tokenizer.decode([token for token, *_ in render(samples, pictures, tokenizer, picture_share=1.0, seed=0)])
    assert text.count("USER: star\nIs") + text.count("USER: ring\nIs") == 12
    assert 0 < text.count("USER: star\nIs") < 12
    path.write_text(json.dumps({"0.jpg": ["star"]}))
    with pytest.raises(ValueError, match="no text for 11 pictures"):
        read_pictures(path, samples)


def test_held_out_pictures_are_in_no_training_dialogue(scenes):
    samples = [s for name in ("pretrain", "finetune") for s in json.loads((scenes / f"llava_{name}.json").read_text())]
    train, held_out = split(samples, 3, seed=0)
    assert len(train) == 18
    assert len(held_out) == 6
    assert not {s["image"] for s in train} & {s["image"] for s in held_out}
    with pytest.raises(ValueError, match="must be below the 12 pictures"):
        split(samples, 12, seed=0)


def test_no_dialogue_of_a_row_sees_another_one(scenes, config):
    samples = json.loads((scenes / "llava_pretrain.json").read_text())[:3]
    tokenizer = train_tokenizer([], SMALLEST_VOCABULARY)
    torch.manual_seed(0)
    model = build_llama(config, tokenizer).eval()
    model.config.use_cache = False
    stream = list(render(samples, {}, tokenizer, picture_share=0.0, seed=0))
    starts = [i for i, (_, _, position) in enumerate(stream) if position == 0]
    assert len(starts) == 3
    batch = {name: tensor[None] for name, tensor in PackedRows(stream, len(stream))[0].items()}
    packed_SV = model(**batch).logits[0]
    alone_SV = model(input_ids=batch["input_ids"][:, starts[2] :]).logits[0]
    torch.testing.assert_close(packed_SV[starts[2] :], alone_SV)


def test_cut_dialogues_keep_one_to_three_successive_pairs_and_their_picture():
    turns = [
        {"from": ("human", "gpt")[i % 2], "value": f"q{i // 2}" if i % 2 == 0 else f"a{i // 2}"} for i in range(10)
    ]
    samples = [{"image": "0.jpg", "conversations": turns}] * 40
    tokenizer = train_tokenizer([], SMALLEST_VOCABULARY)
    stream = render(samples, {"0.jpg": ["star"]}, tokenizer, picture_share=1.0, cut_share=1.0, seed=0)
    text = tokenizer.decode([token for token, *_ in stream])
    seen = set()
    for dialogue in text.split("A chat between")[1:]:
        pairs = re.findall(r"USER: (star\n)?q(\d) ASSISTANT: a(\d)", dialogue)
        numbers = [int(question) for _, question, _ in pairs]
        assert [shown != "" for shown, _, _ in pairs] == [True] + [False] * (len(pairs) - 1)
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert all(question == answer for _, question, answer in pairs)
        seen.add((numbers[0], len(numbers)))
    assert {length for _, length in seen} == {1, 2, 3}
    assert len({first for first, _ in seen}) == 5


def test_rows_that_no_text_fills_are_an_error():
    with pytest.raises(ValueError, match="3 tokens do not fill one row of 4"):
        PackedRows([(1, 1, 0)] * 3, 4)


def test_run_leaves_a_loadable_model_in_the_wanted_type_with_scores(config):
    scores = run(config)
    model = AutoModelForCausalLM.from_pretrained(config.output / "model")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(config.output / "model").eos_token_id
    assert json.loads((config.output / "scores.json").read_text()) == scores
    assert scores["num_dialogues"] == 4
    assert scores["answer_perplexity_with_picture"] > 1
    assert scores["num_yes_no"] == 2
    assert {"config.yaml", "environment.json", "metrics.jsonl"} <= {path.name for path in config.output.iterdir()}


def test_killed_run_ends_with_the_same_weights_as_an_unbroken_one(config, tmp_path, monkeypatch):
    run(config)
    broken = replace(config, output=tmp_path / "broken")
    save_checkpoint = Trainer._save_checkpoint

    def save_and_die(self, *args, **kwargs):
        save_checkpoint(self, *args, **kwargs)
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    run(broken)
    expected, got = (load_file(c.output / "model" / "model.safetensors") for c in (config, broken))
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
