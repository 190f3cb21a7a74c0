"""Looks at a recipe's data before a run: `python -m mllm.data.check RECIPE.yaml [--field value ...]`.

Takes the recipe and flags of `python -m mllm.train`. For each stage it prints some samples with what is supervised, and
counts samples, tokens and pictures. It ends with status 1 if the run would stop at a sample or train on nothing.
"""

import itertools
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import vision_moe.model  # noqa: F401  (registers CLIP-MoE with the Auto classes)
from mllm.assemble import build_processor
from mllm.conversation import IGNORE_INDEX
from mllm.data.dataset import LlavaDataset
from mllm.data.findings import Findings, Summary
from mllm.language_model import resolve_language_model
from mllm.recipe import LlavaConfig, enabled_stages
from mllm.stage_recipe import StageConfig
from mllm.tower import resolve_tower
from mllm.train import with_data
from vision_moe.config import parse
from vision_moe.tracking import setup_logging

_SMOKE = Path(__file__).parent.parent / "recipes" / "smoke.yaml"
_SUPERVISED, _MASKED, _PICTURE, _RESET = "\x1b[32m", "\x1b[2m", "\x1b[36m", "\x1b[0m"
_PROBLEMS_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class CheckConfig(LlavaConfig):
    """Checks the data of a LLaVA recipe.

    Example:
        .venv/bin/python -m mllm.data.check mllm/recipes/scenes.yaml --scenes 50
    """

    output: Path = Path("outputs/llava_check")
    """Folder of the run; the index of the data, which a run finds again, and built-in pictures are kept there."""
    show: int = 2
    """Samples to print of each stage."""
    limit: int | None = None
    """Samples to count, spread evenly over the data; all if None."""
    pictures: Literal["decode", "exist"] = "decode"
    """Read every picture to its end, or only see whether it is there."""
    color: Literal["auto", "always", "never"] = "auto"
    """Supervised text in green and the rest dim, or supervised text between [[ and ]]; auto asks the terminal."""


def main() -> None:
    """Entry point."""
    setup_logging(logging.WARNING)
    if not check(parse(CheckConfig, smoke=_SMOKE)):
        sys.exit(1)


def check(config: CheckConfig) -> bool:
    """Prints the report; returns whether a run with this recipe can do.

    Raises:
        ValueError: a stage names no data, or its file is malformed.
        FileNotFoundError: data are not where the recipe says.
    """
    resolved = with_data(config)
    vision, llm = resolve_tower(config.vision, config.output / "vision"), resolve_language_model(config.llm)
    processor, num_image_tokens = build_processor(vision, llm)
    good = True
    for name, stage in enabled_stages(resolved):
        assert stage.data is not None, "with_data fills in the data of every stage"
        dataset = LlavaDataset(
            stage.data,
            stage.image_folder or config.image_folder,
            processor.tokenizer,
            processor.image_processor,
            stage.template or config.template,
            num_image_tokens=num_image_tokens,
            max_length=config.max_length,
            index_cache=config.output / name / "data_index.safetensors",
            independent_turns=stage.independent_turns,
        )
        good &= _check_stage(name, stage, dataset, config)
    return good


def _check_stage(name: str, stage: StageConfig, dataset: LlavaDataset, config: CheckConfig) -> bool:
    _say(f"stage {name}: {stage.data}, template {dataset.template}")
    color = sys.stdout.isatty() if config.color == "auto" else config.color == "always"
    for number in _spread(len(dataset), config.show):
        _say(f"\nsample number {number}: {_shown(dataset, number, color)}")
    summary = Summary()
    findings = Findings(dataset, decode=config.pictures == "decode")
    chosen = Subset(findings, _spread(len(dataset), config.limit))
    loader = DataLoader(chosen, batch_size=16, num_workers=config.num_workers, collate_fn=list)
    with tqdm(total=len(chosen), desc=f"checking {name}", disable=None) as bar:
        for batch in loader:
            for finding in batch:
                summary.add(finding)
            bar.update(len(batch))
    for line in _lines(summary, dataset):
        _say(line)
    verdict = summary.verdict(skips_bad=config.bad_samples == "skip")
    _say(f"  {'ready' if verdict is None else f'NOT READY: {verdict}'}\n")
    return verdict is None


def _lines(summary: Summary, dataset: LlavaDataset) -> Iterator[str]:
    of_all = "" if summary.num_samples == len(dataset) else f" of {len(dataset)}"
    num_text = summary.num_samples - summary.num_with_picture
    yield f"\n  samples: {summary.num_samples}{of_all}, {summary.num_good} good, {num_text} without a picture"
    share = summary.num_supervised / max(1, summary.num_tokens)
    yield (
        f"  tokens: {summary.num_tokens}, {summary.num_supervised} supervised ({share:.1%}), "
        f"{summary.num_image_tokens} of pictures; longest sample {summary.longest}"
    )
    yield (
        f"  cut at max_length {dataset.max_length}: {summary.num_cut_samples} samples, {summary.num_cut_tokens} tokens "
        f"of text lost"
    )
    missing, broken = len(summary.problems["missing"]), len(summary.problems["broken"])
    yield f"  pictures: {summary.num_pictures}, {missing} missing, {broken} broken"
    for kind, problems in summary.problems.items():
        if problems:
            yield f"  {kind}: {len(problems)}"
            yield from (f"    {problem}" for problem in problems[:_PROBLEMS_SHOWN])
            if len(problems) > _PROBLEMS_SHOWN:
                yield f"    and {len(problems) - _PROBLEMS_SHOWN} more"


def _shown(dataset: LlavaDataset, number: int, color: bool) -> str:
    """A sample as text, what is supervised set off from the rest."""
    try:
        encoded = dataset.encoded(number)
    except ValueError as error:
        return f"{error}"
    parts = []
    # Where turns are independent, each is a segment behind what they all see.
    segments = encoded.columns.get("segments", [0] * len(encoded.labels))
    tokens = zip(encoded.input_ids, encoded.labels, segments, strict=True)
    shown_segment = 0
    for (is_image, is_answer, segment), group in itertools.groupby(
        tokens, lambda token: (token[0] == dataset.image_token_id, token[1] != IGNORE_INDEX, token[2])
    ):
        ids = [token_id for token_id, *_ in group]
        parts += ["\n|"] if segment != shown_segment else []
        shown_segment = segment
        text = f"<image x {len(ids)}>" if is_image else dataset.tokenizer.decode(ids)
        style = _PICTURE if is_image else _SUPERVISED if is_answer else _MASKED
        plain = f"[[{text}]]" if is_answer else text
        parts.append(f"{style}{text}{_RESET}" if color else plain)
    num_supervised = sum(label != IGNORE_INDEX for label in encoded.labels)
    cut = f", {encoded.num_cut} cut off" if encoded.num_cut else ""
    return f"{len(encoded.input_ids)} tokens, {num_supervised} supervised{cut}\n{''.join(parts)}"


def _spread(number: int, limit: int | None) -> list[int]:
    """At most `limit` of the numbers below `number`, evenly spread."""
    if limit is None or limit >= number:
        return list(range(number))
    return np.linspace(0, number - 1, limit).astype(int).tolist()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
