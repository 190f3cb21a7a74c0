"""MMBench (Liu et al. 2023), circular: a question counts when it is right under every order of its options.

lmms-eval's rules read the option from an answer, and the judge is asked where they cannot. lmms-eval loads this file by
its path.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

# Index of a rotated question: that of the question, plus so much for each rotation.
_ROTATION = 1_000_000


def process(doc: dict[str, Any], results: Sequence[str], judge: Any) -> dict[str, Any]:
    """Right, wrong or, where neither rules nor judge find the option, None.

    Args:
        doc: a row of MMBench.
        results: the one answer.
        judge: a `Judge`.
    """
    rules = MMBench_Evaluator()
    row = {**{letter: doc.get(letter) for letter in "ABCD"}, "question": doc["question"]}
    options = {letter: text for letter, text in rules.build_choices(row).items() if text != "nan"}
    chosen, verdict = rules.can_infer(results[0], dict(options)), None
    if not chosen:
        listed = rules.build_option_str(list(options.values()))
        prompt = rules.build_prompt(row["question"], listed, results[0])
        verdict = judge.ask(prompt, lambda answer: rules.can_infer(answer, dict(options)) or None)
        chosen = verdict.value
    item = {"question": doc["index"] % _ROTATION, "right": None if chosen is None else chosen == doc["answer"]}
    judged = {} if verdict is None else {"judge": verdict._asdict()}
    return {"gpt_eval_score": item, "judge_failed": int(chosen is None), **judged}


def circular_accuracy(items: Sequence[dict[str, Any]]) -> float:
    """Per cent of questions with every rotation right; one with no rotation wrong and one unread is left out.

    Raises:
        ValueError: every question is left out.
    """
    rotations: dict[int, list[bool | None]] = defaultdict(list)
    for item in items:
        rotations[item["question"]].append(item["right"])
    known = [all(of) for of in rotations.values() if False in of or None not in of]
    if not known:
        raise ValueError(f"the option chosen is unknown in all of {len(rotations)} questions")
    return 100 * sum(known) / len(known)
