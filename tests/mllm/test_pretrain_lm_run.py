"""The small Llama's training: its tokenizer, its text, and that a killed run goes on exactly."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from mllm.branches import collate_rows
from mllm.conversation import IGNORE_INDEX
from mllm.lm_scores import main as lm_scores_main
from mllm.lm_text import (
    DialogueRows,
    encode_chain,
    keep_questions,
    longest_captions,
    read_dialogues,
    read_pictures,
    split,
)
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
    training = {"num_dialogues": 6, "batch_size": 2, "num_held_out": 2, "save_steps": 1}
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


def _rows(samples, pictures, picture_share, tree_share=0.0, num_rows=12):
    tokenizer = train_tokenizer([], SMALLEST_VOCABULARY)
    shares = {"picture_share": picture_share, "tree_share": tree_share}
    return DialogueRows(samples, pictures, tokenizer, num_rows=num_rows, seed=0, **shares), tokenizer


def test_picture_is_given_by_its_longest_caption_and_answers_alone_are_supervised(scenes):
    samples = read_dialogues(scenes)
    assert longest_captions(samples)["0.jpg"] == "a red star above a blue ring"
    asked = [sample for sample in samples if sample["conversations"][1]["value"] == "Yes"]
    for share, told in ((1.0, "a red star above a blue ring\n"), (0.0, "")):
        rows, tokenizer = _rows(asked, read_pictures(None, samples), share)
        text = tokenizer.decode(rows[0]["input_ids"])
        assert text.endswith(f"questions. USER: {told}Is it there? ASSISTANT: Yes</s>")
        assert tokenizer.decode([label for label in rows[0]["labels"] if label != IGNORE_INDEX]) == " Yes</s>"


def test_pictures_in_words_are_read_from_a_file_that_knows_all_of_them(scenes, tmp_path):
    samples = read_dialogues(scenes)[12:]
    path = tmp_path / "words.json"
    path.write_text(json.dumps({f"{i}.jpg": ["star", "ring"] for i in range(12)}))
    rows, tokenizer = _rows(samples, read_pictures(path, samples), 1.0)
    texts = [tokenizer.decode(rows[i]["input_ids"]) for i in range(12)]
    assert {word for text in texts for word in ("star", "ring") if f"USER: {word}\nIs" in text} == {"star", "ring"}
    path.write_text(json.dumps({"0.jpg": ["star"]}))
    with pytest.raises(ValueError, match="no text for 11 pictures"):
        read_pictures(path, samples)


def test_every_pass_shows_each_dialogue_once_in_a_new_order(scenes):
    samples = [{**sample, "image": f"{i}.jpg"} for i, sample in enumerate(read_dialogues(scenes)[:6])]
    rows, tokenizer = _rows(samples, {f"{i}.jpg": [f"picture {i}"] for i in range(6)}, 1.0)
    seen = [re.search(r"picture (\d)", tokenizer.decode(rows[i]["input_ids"]))[1] for i in range(12)]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list("012345")
    assert seen[:6] != seen[6:]


def test_branch_of_a_tree_is_answered_as_if_it_had_been_asked_alone(config):
    questions = ("Is it a star?", "Is it red?", "What is it, then?")
    turns = [
        turn
        for question in questions
        for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": f"{len(question)} yes"})
    ]
    rows, tokenizer = _rows([{"image": "0.jpg", "conversations": turns}], {"0.jpg": ["a red star"]}, 1.0, 1.0, 1)
    short = encode_chain({"conversations": turns[:2]}, None, tokenizer)
    torch.manual_seed(0)
    model = build_llama(config, tokenizer).eval()
    # Beside a shorter row, so that there is padding.
    batch = collate_rows([rows[0], short], tokenizer.pad_token_id)
    logits_SV = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits[0]
    supervised = torch.tensor(rows[0]["labels"]) != IGNORE_INDEX
    for number in range(3):
        alone = encode_chain({"conversations": turns[2 * number : 2 * number + 2]}, "a red star", tokenizer)
        alone_SV = model(torch.tensor([alone["input_ids"]])).logits[0]
        answer = torch.tensor(alone["labels"]) != IGNORE_INDEX
        branch = (torch.tensor(rows[0]["segments"]) == number + 1) & supervised
        torch.testing.assert_close(logits_SV[: len(branch)][branch], alone_SV[answer])


def test_only_the_questions_that_match_are_kept_with_their_answers():
    turns = [{"from": "human", "value": "<image>\nIs there a star?"}, {"from": "gpt", "value": "Yes"}]
    others = [{"from": "human", "value": "Describe it."}, {"from": "gpt", "value": "Is there a star? Yes."}]
    samples = [{"image": "0.jpg", "conversations": others + turns}, {"image": "1.jpg", "conversations": others}]
    assert keep_questions(samples, "Is there|How many") == [{"image": "0.jpg", "conversations": turns}]
    with pytest.raises(ValueError, match="no question of 2 dialogues matches 'How many'"):
        keep_questions(samples, "How many")
    with pytest.raises(ValueError, match=r"regular expression, but got '\('"):
        keep_questions(samples, "(")


def test_held_out_pictures_are_in_no_training_dialogue(scenes):
    samples = read_dialogues(scenes)
    train, held_out = split(samples, 3, seed=0)
    assert len(train) == 18
    assert len(held_out) == 6
    assert not {s["image"] for s in train} & {s["image"] for s in held_out}
    with pytest.raises(ValueError, match="must be below the 12 pictures"):
        split(samples, 12, seed=0)


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


def test_a_run_goes_on_from_the_model_of_another(config, tmp_path):
    run(config)
    first = config.output / "model"
    # A rate of almost nothing: the weights must be those of the first run, not new ones; the sizes are the folder's.
    still = replace(config, output=tmp_path / "second", init=first, learning_rate=1e-12, hidden_size=64, seed=1)
    run(still)
    before, after = (load_file(folder / "model.safetensors") for folder in (first, still.output / "model"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        torch.testing.assert_close(tensor, before[name])
    assert (
        AutoTokenizer.from_pretrained(still.output / "model").get_vocab()
        == AutoTokenizer.from_pretrained(first).get_vocab()
    )


def test_the_scores_command_gives_the_scores_of_the_run(config, capsys):
    # Under autocast, which the Trainer leaves on its model, the numbers would differ in the third digit.
    wanted = run(replace(config, dtype="float32", bf16=False))
    capsys.readouterr()
    model = str(config.output / "model")
    lm_scores_main(["--model", model, "--data", str(config.data), "--num_pictures", str(config.num_held_out)])
    assert json.loads(capsys.readouterr().out) == pytest.approx(wanted)
