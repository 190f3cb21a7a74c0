"""Every command explains itself on one screen with an example and names the nearest of what it does not know; every
command that README and docs show has the flags and recipes that they give it."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from mllm.recipe import LlavaConfig
from vision_moe.assets import find_model
from vision_moe.config import parse
from vision_moe.fields import all_fields
from vision_moe.recipe import TrainConfig

COMMANDS = (
    "demo.app",
    "eval.caption_subset",
    "eval.compare",
    "eval.experiment",
    "eval.factors",
    "eval.imagenet_o",
    "eval.mirror",
    "eval.report",
    "eval.retrieval",
    "eval.run",
    "eval.tower_experiment",
    "eval.yes_no",
    "eval.zero_shot",
    "mllm.caption_loss",
    "mllm.captions_to_conversations",
    "mllm.chat",
    "mllm.convert.from_llava",
    "mllm.convert.to_llava",
    "mllm.data.check",
    "mllm.lm_scores",
    "mllm.merge",
    "mllm.pretrain_lm",
    "mllm.train",
    "vision_moe.analysis",
    "vision_moe.convert.__main__",
    "vision_moe.convert.dinov2",
    "vision_moe.curves",
    "vision_moe.data.check",
    "vision_moe.data.scenes",
    "vision_moe.doctor",
    "vision_moe.flops",
    "vision_moe.train",
)
LINES, COLUMNS = 50, 120
CHECKOUT = Path(__file__).resolve().parent.parent
PAGES = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").rglob("*.md"))]
SCRIPTS = {"scripts/train_encoder.sh": "vision_moe.train", "scripts/llava_finetune.sh": "mllm.train"}


@pytest.fixture
def started(monkeypatch, capsys):
    """Runs a command's main with arguments; gives its exit status, and what it wrote to stdout and stderr."""

    def start(module, *args):
        monkeypatch.setattr(sys, "argv", [module, *args])
        # argparse wraps to the terminal.
        monkeypatch.setenv("COLUMNS", str(COLUMNS))
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(module).main()
        return ended.value.code, *capsys.readouterr()

    return start


@pytest.mark.parametrize("module", COMMANDS)
def test_help_fits_a_screen_and_has_an_example(module, started):
    status, text, _ = started(module, "--help")
    assert status == 0
    lines = text.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    example = text.partition("example:\n")[2].splitlines()[0]
    name = module.removesuffix(".__main__")
    scripts = {"vision_moe.train": "bash scripts/train_encoder.sh", "mllm.train": "bash scripts/llava_finetune.sh"}
    assert example.strip().startswith(scripts.get(module, f".venv/bin/python -m {name}"))


def test_every_command_is_listed_here():
    packages = [CHECKOUT / name for name in ("vision_moe", "mllm", "eval", "demo")]
    files = [path for package in packages for path in package.rglob("*.py")]
    found = [path for path in files if '__name__ == "__main__"' in path.read_text(encoding="utf-8")]
    assert {".".join(path.relative_to(CHECKOUT).with_suffix("").parts) for path in found} == set(COMMANDS)


def shown(page: Path) -> list[str]:
    """Lines of a page's bash blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    return [line.strip() for line in "\n".join(blocks).replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_a_page_shows_have_their_flags_and_recipes(page, started):
    for line in shown(page):
        module = re.search(r"python -m ([\w.]+)", line) or re.search(r"(scripts/[\w/]+\.\w+)", line)
        if module is None:
            assert line.startswith((".venv/bin/mkdocs build", "OMP_NUM_THREADS=1 python -c")), line
            continue
        name = SCRIPTS.get(module[1], module[1])
        if name.startswith("scripts/"):
            known = (CHECKOUT / name).read_text(encoding="utf-8")
        else:
            name = name if name in COMMANDS else f"{name}.__main__"
            _, known, _ = started(name, "--help", "all")
        flags = re.findall(r"(?<!\S)\[?(--[a-zA-Z][\w.-]*)", line.partition(module[0])[2])
        unknown = set(flags) - set(re.findall(r"--[a-zA-Z][\w.-]*", known)) - {"--smoke", "--help"}
        assert not unknown, f"{line}: {unknown}"
        for recipe in re.findall(r"(?<!\S)(?:vision_moe|mllm|eval)/\S+\.yaml", line):
            assert (CHECKOUT / recipe).is_file(), recipe


def test_a_flag_that_a_page_should_not_show_is_seen(tmp_path, started):
    page = tmp_path / "page.md"
    page.write_text("```bash\n.venv/bin/python -m eval.factors --model DIR \\\n    --dataa SCENES\n```\n")
    with pytest.raises(AssertionError, match="--dataa"):
        test_commands_that_a_page_shows_have_their_flags_and_recipes(page, started)


@pytest.mark.parametrize(
    ("cls", "flags", "wanted"),
    [
        (TrainConfig, ["--mcl.sampels", "3"], "--mcl.samples"),
        (TrainConfig, ["--align.sampels", "3"], "--align.samples"),
        (TrainConfig, ["--learning_rate", "1"], "--dense.learning_rate or --mcl.learning_rate"),
        (TrainConfig, ["--methods", "[dm]"], "dmu"),
        (LlavaConfig, ["--image-folder", "x"], "--image_folder"),
        (LlavaConfig, ["--finetune.llm_rl", "1"], "--finetune.llm_lr"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_flag_that_is_unknown_gets_the_nearest(cls, flags, wanted, capsys):
    required = ["--output", "o", *(["--data.train", "d"] if cls is TrainConfig else [])]
    with pytest.raises(SystemExit) as ended:
        parse(cls, [*required, *flags])
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert re.search(rf"did you mean .*{re.escape(wanted)}", text)
    assert len(text.splitlines()) <= 14


def test_a_field_of_a_recipe_that_is_unknown_gets_the_nearest(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {trian: x}\noutput: y\n")
    with pytest.raises(SystemExit):
        parse(TrainConfig, [str(recipe)])
    assert "did you mean --data.train?" in capsys.readouterr().err


def test_a_recipe_that_is_not_there_gets_the_nearest(capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, [str(CHECKOUT / "vision_moe" / "recipes" / "scene.yaml")])
    assert "scenes.yaml?" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_not_looked_up_on_the_hub():
    with pytest.raises(FileNotFoundError, match="did you mean scenes-clip"):
        find_model("scenes-clp")
    with pytest.raises(FileNotFoundError, match="no model folder outputs/no/model"):
        find_model("outputs/no/model")
    assert find_model("openai/clip-vit-base-patch16") == "openai/clip-vit-base-patch16"
    assert Path(find_model("scenes-clip"), "config.json").is_file()


def test_commands_without_recipes_suggest_too(started):
    status, _, text = started("eval.retrieval", "--model", "m", "--data", "d", "--protocl", "coco5k")
    assert status == 2
    assert "did you mean --protocol?" in text
    _, _, text = started("eval.retrieval", "--model", "m", "--data", "d", "--protocol", "coco5")
    assert "did you mean coco5k?" in text


def test_help_of_a_field_and_of_a_group_tells_everything(capsys):
    for name, wanted in (("seed", "--seed  int, default 0"), ("mcl", "--mcl.learning_rate  float, default 1.0e-05")):
        with pytest.raises(SystemExit):
            parse(TrainConfig, ["--help", name])
        assert wanted in capsys.readouterr().out


def test_defaults_of_a_group_are_those_of_the_recipe_that_holds_it():
    """Stage finetune trains the language model by default, and stage pretrain does not."""
    defaults = {field.name: field.default for field in all_fields(LlavaConfig)}
    assert (defaults["pretrain.llm"], defaults["finetune.llm"]) == ("frozen", "full")
    assert defaults["output"] is None
    assert all(field.text for field in all_fields(LlavaConfig))
