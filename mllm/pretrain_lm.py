"""Trains a small Llama on the text of LLaVA dialogues: `python -m mllm.pretrain_lm RECIPE --data DIR --output OUT`.

It stands in for a pretrained language model where none can be fetched. So that it learns to answer from its context,
and not only to guess, the picture of most dialogues is given to it in words. Training goes on where it was interrupted.
"""

import json
import logging
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mllm.branches import collate_rows
from mllm.lm_scores import held_out_scores
from mllm.lm_text import (
    DialogueRows,
    Pictures,
    Sample,
    encode_dialogue,
    keep_questions,
    read_dialogues,
    read_pictures,
    split,
)
from mllm.tokenizer import SMALLEST_VOCABULARY, train_tokenizer
from vision_moe.checkpoint import CheckpointMarker, last_checkpoint, write_folder
from vision_moe.config import parse, write_yaml
from vision_moe.files import write_json
from vision_moe.interruption import says_how_to_go_on, stops_after_a_step
from vision_moe.metrics_callback import MetricsCallback
from vision_moe.muon import MuonAdamW
from vision_moe.tracking import setup_logging, write_environment

logger = logging.getLogger(__name__)

# More would not change which merges are frequent.
_TOKENIZER_DIALOGUES = 5000
_ADAM_BETA2 = 0.95


@dataclass(frozen=True, kw_only=True)
class PretrainLMConfig:
    """A Llama of a few million parameters, its tokenizer and its training.

    Example:
        .venv/bin/python -m mllm.pretrain_lm mllm/recipes/scenes_lm.yaml --data outputs/scenes --output outputs/lm
    """

    data: Path
    """Folder with llava_pretrain.json and llava_finetune.json."""
    output: Path
    """Folder of the run; the finished model is in its `model`."""
    init: Path | None = None
    """Model folder of an earlier run to go on from, with its tokenizer; sizes are then the folder's."""
    vocab_size: int = 1000
    """Tokens of the byte-level BPE."""
    hidden_size: int = 256
    """Width."""
    intermediate_size: int = 640
    """Width of the feed-forward layers."""
    num_layers: int = 6
    """Blocks."""
    num_heads: int = 8
    """Attention heads."""
    max_position_embeddings: int = 1024
    """Longest sequence that the finished model takes, in tokens."""
    num_dialogues: int = 12_000
    """Dialogues seen in training."""
    pictures_in_words: Path | None = None
    """JSON file {image: [text, ...]}: what stands in place of a picture; None: its longest caption in the data."""
    questions: str | None = None
    """Regular expression: only questions in which it is found are trained on ("Is there|How many"); None: all."""
    picture_share: float = 0.75
    """Share of dialogues that get their picture in words, in a random one of its texts; the others get none."""
    tree_share: float = 0.8
    """Share of dialogues whose questions do not see each other, only the picture (mllm.lm_text.DialogueRows)."""
    num_held_out: int = 200
    """Pictures whose dialogues are kept for the perplexity at the end."""
    batch_size: int = 8
    """Dialogues per step."""
    learning_rate: float = 2e-3
    """Peak learning rate; cosine decay to 0."""
    warmup_steps: float = 0.03
    """Linear warm-up: steps, or a share of all steps when below 1."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """"muon" orthogonalises the steps of linear weights and leaves the rest to AdamW (vision_moe.muon)."""
    dtype: str = "bfloat16"
    """Type of the saved weights: bfloat16, float16 or float32; training keeps float32 weights."""
    bf16: bool = True
    """bfloat16 autocast in training."""
    save_steps: int = 100
    """Steps between checkpoints."""
    seed: int = 0
    """Seed of the weights, the order and the captions."""

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16", "float32"):
            raise ValueError(f"dtype must be bfloat16, float16 or float32, but got {self.dtype!r}")


def main() -> None:
    """Entry point."""
    setup_logging()
    config = parse(PretrainLMConfig)
    with says_how_to_go_on(config.output):
        scores = run(config)
    sys.stdout.write(json.dumps(scores) + "\n")


def run(config: PretrainLMConfig) -> dict[str, float]:
    """Trains tokenizer and model, writes `output/model` and returns the held-out scores."""
    write_yaml(config, config.output / "config.yaml")
    write_environment(config.output)
    set_seed(config.seed)
    samples = read_dialogues(config.data)
    pictures = read_pictures(config.pictures_in_words, samples)
    train, held_out = split(samples, config.num_held_out, config.seed)
    if config.questions is not None:
        train = keep_questions(train, config.questions)
    model, tokenizer = _start(config, _texts(train, pictures, config.seed))
    rows = DialogueRows(
        train,
        pictures,
        tokenizer,
        num_rows=config.num_dialogues,
        picture_share=config.picture_share,
        tree_share=config.tree_share,
        seed=config.seed,
    )
    trainer = _trainer(config, model, rows)
    with stops_after_a_step(trainer, config.output):
        trainer.train(resume_from_checkpoint=last_checkpoint(config.output / "checkpoints"))
    scores = held_out_scores(trainer.model, tokenizer, held_out, pictures, config.seed)
    write_folder(config.output / "model", lambda folder: save(trainer.model, tokenizer, config.dtype, folder))
    write_json(config.output / "scores.json", scores)
    logger.info("%s; the model is in %s", scores, config.output / "model")
    return scores


def _start(config: PretrainLMConfig, texts: Iterator[str]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    if config.init is not None:
        model = LlamaForCausalLM.from_pretrained(config.init, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(config.init)
    tokenizer = train_tokenizer(texts, config.vocab_size)
    return build_llama(config, tokenizer), tokenizer


def _texts(samples: list[Sample], pictures: Pictures, seed: int) -> Iterator[str]:
    """Some dialogues as the template writes them, system prompt and roles included, for the tokenizer to learn from."""
    rng = random.Random(seed)
    plain_bytes = train_tokenizer([], SMALLEST_VOCABULARY)
    for sample in rng.sample(samples, min(_TOKENIZER_DIALOGUES, len(samples))):
        picture = rng.choice(pictures.get(sample.get("image", ""), [""]))
        text = plain_bytes.decode(encode_dialogue(sample, picture, plain_bytes)[0])
        yield from re.split("|".join(map(re.escape, plain_bytes.all_special_tokens)), text)


def build_llama(config: PretrainLMConfig, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings.

    The standard deviation grows as the width shrinks: at the usual 0.02 a narrow model attends almost uniformly, and
    takes very long to find what it could read off its context.
    """
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.max_position_embeddings,
            initializer_range=config.hidden_size**-0.5,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, dtype: str, folder: Path) -> None:
    """Writes a Hugging Face folder with weights of `dtype`."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    # The Trainer switches it off.
    model.config.use_cache = True
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _trainer(config: PretrainLMConfig, model: LlamaForCausalLM, rows: DialogueRows) -> Trainer:
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info("%d parameters, %d dialogues, %d of them different", num_parameters, len(rows), len(rows.samples))
    args = TrainingArguments(
        output_dir=str(config.output / "checkpoints"),
        num_train_epochs=1,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        adam_beta2=_ADAM_BETA2,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="cosine",
        bf16=config.bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=config.seed,
        logging_steps=10,
        save_steps=config.save_steps,
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=not sys.stderr.isatty(),
    )
    muon = None
    if config.optimizer == "muon":
        muon = MuonAdamW(model, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, _ADAM_BETA2))
    return Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=partial(collate_rows, pad_token_id=rows.tokenizer.pad_token_id),
        callbacks=[MetricsCallback(config.output, "pretrain_lm"), CheckpointMarker()],
        optimizers=(muon, None),
    )


if __name__ == "__main__":
    main()
