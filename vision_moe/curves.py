"""Training curves of several runs in one picture.

    python -m vision_moe.curves --output outputs/limoe_routing.png \\
        --runs '{"entropy losses": "outputs/limoe/metrics.jsonl", "control": "outputs/limoe_control/metrics.jsonl"}'

draws what the keys name; without --keys the routing of a LIMoE's modalities (vision_moe.modality_routing).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from vision_moe.config import parse
from vision_moe.plots import plot_curves


@dataclass(frozen=True, kw_only=True)
class CurvesConfig:
    """Logged values over steps: one panel a key, one line a run.

    Example:
        .venv/bin/python -m vision_moe.curves --runs '{mine: outputs/encoder/metrics.jsonl}' --output curves.png
    """

    runs: dict[str, Path]
    """metrics.jsonl of each run, by its name in the legend."""
    output: Path
    """PNG to write."""
    keys: tuple[str, ...] = (
        "image/experts_used",
        "text/experts_used",
        "image/routing_entropy",
        "text/routing_entropy",
    )
    """Names as they stand in the files."""


def main(args: list[str] | None = None) -> None:
    """Entry point."""
    config = parse(CurvesConfig, args)
    plot_curves(config.runs, config.output, keys=config.keys)
    sys.stdout.write(f"{config.output}\n")


if __name__ == "__main__":
    main()
