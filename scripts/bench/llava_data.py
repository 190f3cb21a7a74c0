"""How fast dialogues become ids and labels, and how much of a batch is padding, before and after grouping and packing.

.venv/bin/python scripts/bench/llava_data.py [--data LLAVA.json] [--llm DIR] [--batch 128 --per-device 16]

One process, CPU time; pictures are not opened. Without --data it makes dialogues up: 15 of 16 with a picture, 1 to 6
rounds, answers of log-normal length, a stand-in for mix665k.
"""

import argparse
import contextlib
import json
import random
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mllm.assemble import build_processor
from mllm.data import LlavaDataset, UnusableSampleError
from mllm.language_model import resolve_language_model
from mllm.packing import pack_rows
from mllm.sampler import DialogueBatchSampler
from vision_moe.assets import resolve_model

_WORDS = ("the", "a", "red", "blue", "cube", "ball", "left", "of", "there", "is", "are", "two", "what", "how", "shows")


def write_dialogues(path: Path, num: int) -> None:
    """Writes dialogues of random words."""
    rng = random.Random(0)

    def text(mean: float) -> str:
        return " ".join(rng.choices(_WORDS, k=1 + int(rng.lognormvariate(mean, 1.0))))

    samples = []
    for number in range(num):
        turns = []
        for _ in range(rng.randint(1, 6)):
            turns += [{"from": "human", "value": text(2.0)}, {"from": "gpt", "value": text(2.5)}]
        sample = {"id": number, "conversations": turns}
        if rng.random() < 15 / 16:
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            sample["image"] = f"{number}.jpg"
        samples.append(sample)
    path.write_text(json.dumps(samples), encoding="utf-8")


def share(forwards: Iterable[list[int]], tokens: np.ndarray, row_length: int | None) -> float:
    """Share of the places in the rows of all forwards that are tokens; one sample a row without `row_length`."""
    filled = places = 0
    for forward in forwards:
        lengths = [int(tokens[number]) for number in forward]
        rows = pack_rows(lengths, row_length) if row_length else [[number] for number in range(len(lengths))]
        filled += sum(lengths)
        places += len(rows) * max(sum(lengths[number] for number in row) for row in rows)
    return filled / places


def count_tokens(dataset: LlavaDataset, chosen: Iterable[int]) -> dict[int, int]:
    """Tokens of each sample that can be used; prints how fast they were made."""
    tokens = {}
    began = time.process_time()
    for number in chosen:
        with contextlib.suppress(UnusableSampleError):
            tokens[number] = len(dataset.encoded(number).input_ids)
    seconds = time.process_time() - began
    print(f"ids and labels: {len(tokens) / seconds:.0f} dialogues/s, {sum(tokens.values()) / seconds:.0f} tokens/s\n")
    return tokens


def arguments() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--num", type=int, default=20_000, help="dialogues to make up without --data")
    parser.add_argument("--llm", default="scenes-llama")
    parser.add_argument("--template", default="v1")
    parser.add_argument("--image-tokens", type=int, default=576)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=128, help="global batch")
    parser.add_argument("--per-device", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8_000, help="dialogues to tokenise for the measurement")
    return parser.parse_args()


def main() -> None:
    """Prints the speeds and a Markdown table."""
    args = arguments()
    processor, _ = build_processor(resolve_model("scenes-clip"), resolve_language_model(args.llm))
    words, pictures = processor.tokenizer, processor.image_processor
    with tempfile.TemporaryDirectory() as folder:
        path = args.data
        if path is None:
            path = Path(folder) / "made_up.json"
            write_dialogues(path, args.num)
        began = time.process_time()
        dataset = LlavaDataset(path, None, words, pictures, args.template, args.image_tokens, args.max_length)
        print(f"index: {len(dataset)} dialogues, {len(dataset) / (time.process_time() - began):.0f} dialogues/s")
        chosen = np.random.default_rng(0).permutation(len(dataset))[: args.samples].tolist()
        counted = count_tokens(dataset, chosen)
    tokens = np.array(list(counted.values()))
    signed = np.where(dataset.has_image, dataset.lengths, -dataset.lengths)[list(counted)]
    print("| batches | padded | packed |\n| --- | --- | --- |")
    for order, lengths in (("random", None), ("grouped by modality and length", signed)):
        steps, accumulation = -(-len(tokens) // args.batch), args.batch // args.per_device
        sampler = DialogueBatchSampler(len(tokens), args.batch, steps, 0, accumulation=accumulation, lengths=lengths)
        forwards = list(sampler)
        print(f"| {order} | {share(forwards, tokens, None):.1%} | {share(forwards, tokens, args.max_length):.1%} |")


if __name__ == "__main__":
    main()
