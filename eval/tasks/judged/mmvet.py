"""MM-Vet (Yu et al. 2023): a language model grades each answer from 0 to 1; scores by capability, in per cent.

lmms-eval loads this file by its path.
"""

import ast
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import lmms_eval.tasks


def process(doc: dict[str, Any], results: Sequence[str], judge: Any) -> dict[str, Any]:
    """Graded with the prompt that lmms-eval has.

    Args:
        doc: with "question", "answer" and "capability" (names with commas between).
        results: the one answer.
        judge: a `Judge`.
    """
    return _grade(_examples(), doc, results[0], judge)


def process_official(doc: dict[str, Any], results: Sequence[str], judge: Any) -> dict[str, Any]:
    """Graded with the prompt of MM-Vet's own evaluator: its table has another head."""
    examples = _examples().replace("gpt_query_prompt | Ground truth", "\nQuestion | Ground truth")
    return _grade(examples, doc, results[0], judge)


def _grade(examples: str, doc: dict[str, Any], said: str, judge: Any) -> dict[str, Any]:
    truth = doc["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    verdict = judge.ask(f"{examples}\n{doc['question']} | {truth} | {said} | ", _grade_in)
    if verdict.value is None:
        return {"judge_failed": 1, "judge": verdict._asdict()}
    score = 100 * verdict.value
    by_capability = {name.strip(): score for name in doc["capability"].split(",")}
    return {"judge_failed": 0, "gpt_eval_score": score, **by_capability, "judge": verdict._asdict()}


def _grade_in(answer: str) -> float | None:
    """The answer's first word as a grade in [0, 1]."""
    try:
        grade = float(answer.split()[0])
    except (ValueError, IndexError):
        return None
    return grade if 0 <= grade <= 1 else None


@cache
def _examples() -> str:
    """lmms-eval's grading prompt, read from its source: importing that module needs a key of OpenAI's.

    Raises:
        LookupError: this version of lmms-eval keeps it elsewhere.
    """
    source = Path(lmms_eval.tasks.__file__).parent / "mmvet" / "utils.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(name) for name in node.targets] == ["MM_VET_PROMPT"]:
            return str(ast.literal_eval(node.value))
    raise LookupError(f"no MM_VET_PROMPT in {source}; mmvet_judge and mmvet_llava were written for lmms-eval 0.7.3")
