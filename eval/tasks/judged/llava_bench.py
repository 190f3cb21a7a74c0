"""LLaVA-Bench in the wild (Liu et al. 2023): the judge gives GPT-4's answer and the model's a score from 1 to 10 each.

The prompts are those of lmms-eval's llava_in_the_wild. lmms-eval loads this file by its path.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lmms_eval.tasks

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def process(doc: dict[str, Any], results: Sequence[str], judge: Any) -> dict[str, Any]:
    """Both scores, under the metric of the question's category and that of all.

    Args:
        doc: with "question", "gpt_answer", "caption" and "category" (conv, detail or complex).
        results: the one answer.
        judge: a `Judge`.
    """
    rule = _rules()[f"llava_bench_{doc['category']}"]
    role = rule["role"]
    context = doc["caption"] if isinstance(doc["caption"], str) else "\n".join(doc["caption"])
    prompt = (
        f"[Context]\n{context}\n\n[Question]\n{doc['question']}\n\n"
        f"[{role} 1]\n{doc['gpt_answer']}\n\n[End of {role} 1]\n\n"
        f"[{role} 2]\n{results[0]}\n\n[End of {role} 2]\n\n[System]\n{rule['prompt']}\n\n"
    )
    verdict = judge.ask(prompt, _scores_in)
    if verdict.value is None:
        return {"judge_failed": 1, "judge": verdict._asdict()}
    names = (f"gpt_eval_llava_{doc['category']}", "gpt_eval_llava_all")
    return {"judge_failed": 0, **dict.fromkeys(names, verdict.value), "judge": verdict._asdict()}


def relative_score(pairs: Sequence[Sequence[float]]) -> float:
    """The model's total as per cent of GPT-4's."""
    return 100 * sum(pair[1] for pair in pairs) / sum(pair[0] for pair in pairs)


def _scores_in(review: str) -> list[float] | None:
    """The first two numbers of the first line, each in [1, 10]."""
    numbers = [float(number) for number in _NUMBER.findall(review.strip().split("\n")[0])[:2]]
    return numbers if len(numbers) == 2 and all(1 <= number <= 10 for number in numbers) else None


@cache
def _rules() -> dict[str, dict[str, str]]:
    file = Path(lmms_eval.tasks.__file__).parent / "llava-in-the-wild" / "rule.json"
    rules: dict[str, dict[str, str]] = json.loads(file.read_text(encoding="utf-8"))
    return rules
