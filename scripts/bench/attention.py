"""Training step of a small CLIP with sdpa and with eager attention: CPU time of one thread, interleaved.

.venv/bin/python scripts/bench/attention.py --rounds 5
"""

import argparse
import statistics
import time

import torch
from transformers import CLIPModel

from vision_moe.assets import resolve_model


def step(model: CLIPModel, batch: dict[str, torch.Tensor]) -> float:
    """CPU seconds of one forward and backward under bfloat16 autocast."""
    start = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).logits_per_image.diagonal().mean()
    loss.backward()
    return time.process_time() - start


def main() -> None:
    """Prints the median seconds of both and the median ratio of a round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = resolve_model("scenes-clip")
    models = {name: CLIPModel.from_pretrained(folder, attn_implementation=name).train() for name in ("sdpa", "eager")}
    size = models["sdpa"].config.vision_config.image_size
    ids = torch.randint(5, 300, (args.batch, 40))
    ids[:, -1] = models["sdpa"].config.text_config.eos_token_id
    batch = {"pixel_values": torch.randn(args.batch, 3, size, size), "input_ids": ids}
    for model in models.values():
        step(model, batch)
    rounds = [{name: step(model, batch) for name, model in models.items()} for _ in range(args.rounds)]
    for name in models:
        print(f"{name}: {statistics.median(row[name] for row in rounds):.2f} s of CPU time")
    print(f"eager / sdpa: {statistics.median(row['eager'] / row['sdpa'] for row in rounds):.2f}")


if __name__ == "__main__":
    main()
