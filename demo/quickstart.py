"""Finds what a quick start left, so that the demo needs no flags."""

import json
from pathlib import Path
from typing import NamedTuple

OUTPUTS = Path(__file__).resolve().parent.parent / "outputs"
_RUNS = ("quickstart", "quickstart_smoke")


class QuickStart(NamedTuple):
    """What a run of scripts/quickstart.sh holds of what the demo shows; None where there is none.

    model: the LLaVA; encoder: the CLIP-MoE; dense: the CLIP that was fine-tuned on the same pairs; pictures: the folder
    of test pictures.
    """

    model: Path | None = None
    encoder: Path | None = None
    dense: Path | None = None
    pictures: Path | None = None


def find(run: Path | None = None, *, outputs: Path = OUTPUTS) -> QuickStart:
    """The parts of a run.

    Args:
        run: its folder; None = in `outputs`, the whole run before the smoke one.
        outputs: where the quick start puts its runs.

    Raises:
        FileNotFoundError: there is no run with a LLaVA in it; the message says what to run.
    """
    runs = [outputs / name for name in _RUNS] if run is None else [run]
    for folder in runs:
        found = parts(folder)
        if found.model is not None:
            return found
    unfinished = next((folder for folder in runs if folder.is_dir()), None)
    state = (
        f"the quick start in {unfinished} has not come to its LLaVA yet (the same command goes on where it stopped)"
        if unfinished
        else f"no --model was given, and there is no quick start in {runs[0]}"
    )
    raise FileNotFoundError(
        f"{state}.\n"
        "  Make a model:   bash scripts/quickstart.sh      18 minutes on two cores; with --smoke two and a half\n"
        "  Or name yours:  python -m demo.app --model DIR  a folder that mllm.train wrote"
    )


def check_llava(folder: str) -> None:
    """Tells a LLaVA's folder, or an adapter's, from everything else that looks like a model.

    Raises:
        FileNotFoundError: there is no such folder, or no model in it.
        ValueError: it holds another kind of model.
    """
    path = Path(folder)
    if (path / "adapter_config.json").is_file():
        return
    config = path / "config.json"
    if not config.is_file():
        what = "is no folder" if not path.is_dir() else "has no config.json"
        raise FileNotFoundError(f"{folder} {what}; the demo chats with a LLaVA that mllm.train wrote")
    kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    if "llava" not in str(kind):
        raise ValueError(
            f"{folder} holds a {kind!r}, but the demo chats with a LLaVA. mllm.train makes one of an encoder: "
            f"bash scripts/llava_finetune.sh mllm/recipes/scenes.yaml --vision {folder} (README.md)"
        )


def parts(run: Path) -> QuickStart:
    """What a run's folder holds so far."""

    def there(path: Path, file: str) -> Path | None:
        return path if (path / file).exists() else None

    return QuickStart(
        model=there(run / "llava" / "model", "config.json"),
        encoder=there(run / "encoder" / "dmu" / "model", "config.json"),
        dense=there(run / "encoder" / "direct" / "model", "config.json"),
        pictures=there(run / "scenes" / "images" / "test", "."),
    )
