"""eval.yes_no: every question of a dialogue is asked alone, and counted for its picture."""

import json

import pytest
from PIL import Image

from eval.report import main as report
from eval.yes_no import YesNoConfig, ask, main
from mllm.generate import load


@pytest.fixture
def dialogues(tmp_path):
    """write(answers of each picture): a LLaVA JSON about red pictures beside their folder."""

    def write(*pictures):
        samples = []
        for number, answers in enumerate(pictures):
            Image.new("RGB", (32, 32), "red").save(tmp_path / f"{number}.png")
            turns = []
            for index, answer in enumerate(answers):
                text = f"Is there a red wall in the image? {index}"
                turns += [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
            turns[0]["value"] = f"<image>\n{turns[0]['value']}"
            samples.append({"id": f"s{number}", "image": f"{number}.png", "conversations": turns})
        (tmp_path / "data.json").write_text(json.dumps(samples))
        return {"data": tmp_path / "data.json", "image_folder": tmp_path, "device": "cpu"}

    return write


def test_each_question_is_asked_alone(llava_folder, dialogues, tmp_path):
    answers = ask(YesNoConfig(model=str(llava_folder), batch_size=2, **dialogues(["Yes", "No."], ["no"], ["Yes"])))
    assert answers.truths == ["yes", "no", "no", "yes"]
    assert answers.picture_Q.tolist() == [0, 0, 1, 2]
    chat = load(llava_folder, device="cpu")
    alone = [{"role": "user", "content": "Is there a red wall in the image? 1"}]
    assert answers.said[1] == chat.generate(alone, [Image.open(tmp_path / "0.png")], max_new_tokens=4)


def test_the_command_leaves_a_record_with_its_samples(llava_folder, dialogues, tmp_path, monkeypatch, capsys):
    flags = [f"--{name}={value}" for name, value in dialogues(["Yes", "No"]).items()]
    output = tmp_path / "out" / "yes_no.json"
    monkeypatch.setattr("sys.argv", ["yes_no", "--model", str(llava_folder), *flags, "--output", str(output)])
    main()
    written = json.loads(output.read_text())
    assert written["result"]["accuracy"]["n"] == 2
    assert written["result"]["true_yes_ratio"] == 0.5
    assert output.with_suffix(".samples.safetensors").is_file()
    table, _, _ = capsys.readouterr().out.partition("\n\nwritten: ")
    report([str(output)])
    assert table in capsys.readouterr().out


@pytest.mark.parametrize(("answer", "image", "message"), [("Maybe", "0.png", "Yes or No"), ("Yes", [], "one picture")])
def test_what_is_no_yes_no_question_is_an_error_that_names_the_sample(llava_folder, dialogues, answer, image, message):
    given = dialogues([answer])
    samples = json.loads(given["data"].read_text())
    samples[0]["image"] = image
    given["data"].write_text(json.dumps(samples))
    with pytest.raises(ValueError, match=f"'s0'.*{message}"):
        ask(YesNoConfig(model=str(llava_folder), **given))
