"""The scores of a language model on held-out dialogues, by hand."""

from math import log
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mllm.lm_scores import held_out_scores
from mllm.tokenizer import train_tokenizer

_ANSWERS = {"a.jpg": "Yes", "b.jpg": "No"}


class _SaysYes(nn.Module):
    """Gives " Yes" half of the probability at every place, and every other token an equal part of the rest."""

    device = torch.device("cpu")

    def __init__(self, yes: int, vocab_size: int):
        super().__init__()
        self.probabilities_V = torch.full((vocab_size,), 0.5 / (vocab_size - 1))
        self.probabilities_V[yes] = 0.5

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.probabilities_V.log().expand(*input_ids.shape, -1))


def test_share_of_likeliest_yes_no_answers_and_perplexity_are_those_of_the_hand():
    # " Yes" and " No" are one token each, and an answer is that token and EOS.
    tokenizer = train_tokenizer(["Yes No"] * 9 + ["x Yes", "x No"] * 9, 300)
    yes, no = (tokenizer(f" {word}", add_special_tokens=False).input_ids for word in ("Yes", "No"))
    assert len(yes) == len(no) == 1
    samples = [
        {"image": image, "conversations": 2 * [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": answer}]}
        for image, answer in _ANSWERS.items()
    ]
    vocab_size = len(tokenizer)
    scores = held_out_scores(_SaysYes(yes[0], vocab_size), tokenizer, samples, {}, seed=0)
    # Each dialogue asks twice.
    assert (scores["num_dialogues"], scores["num_yes_no"]) == (2, 4)
    assert scores["yes_no_accuracy_with_picture"] == 0.5
    other = 0.5 / (vocab_size - 1)
    # Of four supervised tokens, " Yes" is at probability 1/2, " No" and both EOS at that of any other token.
    expected = -(log(0.5) + 3 * log(other)) / 4
    assert log(scores["answer_perplexity_with_picture"]) == pytest.approx(expected, rel=1e-5)
    assert scores["answer_perplexity_without_picture"] == scores["answer_perplexity_with_picture"]
