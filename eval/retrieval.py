"""Zero-shot image-text retrieval of an encoder: `python -m eval.retrieval --model DIR --data SHARDS`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from eval.encoder import load_encoder
from eval.record import emit, record
from eval.report import retrieval_table
from vision_moe.data.captions import open_captions
from vision_moe.retrieval import retrieval
from vision_moe.tracking import setup_logging


def main(args: Sequence[str] | None = None) -> None:
    """R@1, R@5 and R@10 both ways, mean R@1 with a 95 % interval, and the n of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a CLIPModel or CLIPMoEModel, or scenes-clip")
    parser.add_argument("--data", required=True, type=Path, help="folder of {split}-*.tar shards, or a JSON file")
    parser.add_argument("--split", default="test", help="which shards of the folder")
    parser.add_argument(
        "--caption-field",
        default="captions",
        choices=["captions", "long"],
        help="captions: all captions of a picture are its right answers; long: the one long caption",
    )
    parser.add_argument("--image-dir", type=Path, help="folder of the pictures, where --data is a JSON file")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--device", help="default: cuda if there is one")
    options = parser.parse_args(args)
    setup_logging()
    dataset = open_captions(
        options.data, split=options.split, caption_field=options.caption_field, image_dir=options.image_dir
    )
    model, processor = load_encoder(options.model, options.device)
    result = retrieval(model, processor, dataset, batch_size=options.batch_size, seed=options.seed)
    settings = {
        "data": str(options.data),
        "split": options.split,
        "caption_field": options.caption_field,
        "seed": options.seed,
    }
    emit(record("retrieval", options.model, settings, result), retrieval_table(result), options.output)


if __name__ == "__main__":
    main()
