"""The model card of a LLaVA stage."""

from pathlib import Path
from typing import Any

import yaml

from mllm.recipe import LlavaConfig
from mllm.stage_recipe import StageConfig
from vision_moe.config import to_dict
from vision_moe.model_card import CardText, last_loss, training_facts, write_card

_ABOUT = {
    "pretrain": "A LLaVA after its first stage: the projector describes pictures, and nothing has taught it to answer.",
    "finetune": "A LLaVA tuned on instructions: it answers questions about pictures.",
}


def write_llava_card(config: LlavaConfig, name: str, folder: Path, summary: dict[str, Any]) -> None:
    """Writes the card of a stage's model, or of its adapter.

    Args:
        config: recipe of the run.
        name: the stage, "pretrain" or "finetune".
        folder: of the model or the adapter.
        summary: what `stage.json` holds.
    """
    stage: StageConfig = getattr(config, name)
    trained = {part: counts["trained"] for part, counts in summary["parameters"].items() if counts["trained"]}
    skipped = last_loss(config.output / "metrics.jsonl", name)
    text = CardText(
        name=f"{config.output.name}/{name}",
        about=f"{_ABOUT[name]} Vision tower `{config.vision}`, language model `{config.llm}`, template "
        f"`{config.template}`.",
        base=config.llm,
        tags=["llava", "vision-language"],
        pipeline="image-text-to-text",
        use=f'from mllm.generate import load\n\nchat = load("{folder}")\n'
        'chat.generate([{"role": "user", "content": "What is this?"}], [picture])',
        training={
            "data": f"`{stage.data}`",
            "trained": ", ".join(f"{part} ({count:,} parameters)" for part, count in trained.items()),
            **training_facts(summary, skipped),
        },
        recipe=yaml.safe_dump(to_dict(config), sort_keys=False),
        limits=_limits(folder),
    )
    write_card(folder, text)


def _limits(folder: Path) -> list[str]:
    return [
        f"No benchmark was part of this run: `python -m eval.run --model {folder} --tasks TASKS --output DIR` is.",
        "It makes things up, the more so about what its data never showed; nothing was measured on other languages, or "
        "for bias and safety.",
        "Licence: whatever the language model, the vision tower and the data ask for; this card grants nothing.",
    ]
