"""Gathers what a quick start measured into OUTPUT/report.md, with plots; scripts/quickstart.sh calls it."""

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from mllm.generate import Chat, load
from vision_moe.encoder_report import label, render_tables
from vision_moe.files import write_text
from vision_moe.plots import plot_curves, plot_factors
from vision_moe.tracking import environment

_QUESTIONS = (
    "Describe the image in detail.",
    "What is the background?",
)
_NUM_PICTURES = 6


def main() -> None:
    """Writes report.md and says where it is and how to go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the quick start")
    parser.add_argument("--seconds", type=int, required=True, help="what the run took")
    parser.add_argument("--command", required=True, help="how it was started")
    args = parser.parse_args()
    run: Path = args.run
    encoder = _read(run / "encoder" / "results.json")
    answers, blank = (_read(run / name / "results.json") for name in ("pope", "pope/blank"))
    _plots(run, encoder)
    sections = [
        _head(args.command, args.seconds),
        _pope(answers, blank),
        "## Encoder\n\n" + render_tables(encoder),
        "![accuracy per factor](plots/factors.png)" if "factors" in encoder["models"]["dense"] else "",
        "## Which expert the tokens go to\n\n![utilization per layer](utilization/utilization.png)",
        "## Loss\n\n![encoder](plots/encoder_loss.png)\n\n![LLaVA](plots/llava_loss.png)",
        _samples(run),
        _next_steps(run),
    ]
    report = run / "report.md"
    write_text(report, "\n\n".join(section for section in sections if section) + "\n")
    print(f"\n{_verdict(encoder, answers, blank)}\n\nThe report: {report}\nThe chat:   {_demo(run)}")


def _head(command: str, seconds: int) -> str:
    machine = environment()
    smoke = "\n\n**A smoke run: a few steps of everything. Its numbers mean nothing.**" if "--smoke" in command else ""
    return (
        "# Quick start\n\n"
        f"Measured in one run of `{command}` on {machine['cpu_count']} cores "
        f"({machine['processor']}), "
        f"{seconds // 60} min {seconds % 60} s after installation; commit {machine['commit']}.{smoke}"
    )


def _pope(answers: dict[str, Any], blank: dict[str, Any]) -> str:
    lines = [
        "## Chat: POPE on Scenes",
        "",
        "Yes/no questions about pictures whose attribute combinations no training picture has; half of the answers are "
        'yes. "Blank" shows the same model a grey picture: what it gets from the words alone.',
        "",
        "| pictures | accuracy (95 % interval) | F1 | yes ratio | n |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in (("real", answers), ("blank", blank)):
        scores = found["result"]["pope_scenes"]["yes_no"]
        accuracy = scores["accuracy"]
        low, high = accuracy["interval"]
        cells = (
            name,
            f"{100 * accuracy['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            f"{100 * scores['f1']:.1f}",
            f"{scores['yes_ratio']:.2f}",
            str(accuracy["n"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _plots(run: Path, encoder: dict[str, Any]) -> None:
    plots = run / "plots"
    plot_curves(
        {"": run / "encoder" / "metrics.jsonl"}, plots / "encoder_loss.png", keys=("contrastive_loss", "aux_loss")
    )
    plot_curves({"": run / "llava" / "metrics.jsonl"}, plots / "llava_loss.png")
    rows = encoder["models"]
    if "factors" in rows["dense"]:
        table = {
            label(name): {factor: found["accuracy"] for factor, found in row["factors"].items()}
            for name, row in rows.items()
        }
        chance = {factor: found["chance"] for factor, found in rows["dense"]["factors"].items()}
        plot_factors(table, plots / "factors.png", chance=chance)


def _samples(run: Path) -> str:
    """Answers about the first test pictures, none of them chosen."""
    chat = load(run / "llava" / "model")
    pictures = sorted((run / "scenes" / "images" / "test").glob("*.jpg"))[:_NUM_PICTURES]
    lines = ["## Answers", "", "The first test pictures, not chosen.", "", "| picture | answers |", "| --- | --- |"]
    for path in pictures:
        answers = [f"**{question}** {_ask(chat, path, question)}" for question in _QUESTIONS]
        lines.append(f"| ![{path.stem}]({path.relative_to(run)}) | {'<br>'.join(answers)} |")
    return "\n".join(lines)


def _ask(chat: Chat, path: Path, question: str) -> str:
    with Image.open(path) as image:
        answer = chat.generate([{"role": "user", "content": question}], [image.convert("RGB")], max_new_tokens=64)
    return " ".join(answer.replace("|", "\\|").split())


def _next_steps(run: Path) -> str:
    return f"## Talk to it\n\n```bash\n{_demo(run)}\n```"


def _demo(run: Path) -> str:
    return f".venv/bin/python -m demo.app --run {run}"


def _verdict(encoder: dict[str, Any], answers: dict[str, Any], blank: dict[str, Any]) -> str:
    accuracy, floor = (
        100 * found["result"]["pope_scenes"]["yes_no"]["accuracy"]["value"] for found in (answers, blank)
    )
    rows = {name: 100 * row["retrieval"]["mean_R@1"] for name, row in encoder["models"].items()}
    table = ", ".join(f"{label(name)} {value:.1f}" for name, value in rows.items())
    return (
        f"POPE on Scenes: {accuracy:.1f} % with the pictures, {floor:.1f} % with blank ones.\n"
        f"Retrieval, mean R@1 in %: {table}."
    )


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
