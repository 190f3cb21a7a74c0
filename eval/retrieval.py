"""Zero-shot image-text retrieval of an encoder: `python -m eval.retrieval --model DIR --data SHARDS`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from eval.encoder import load_encoder
from eval.protocols import PROTOCOLS, Captioned, open_retrieval
from eval.record import emit, questions_sha256, record
from eval.tables import retrieval_table
from vision_moe.command_help import CommandParser
from vision_moe.embedding_cache import CachedEncoder
from vision_moe.retrieval import Embeddings, all_captions, num_distinct_captions, ranks, recalls
from vision_moe.tracking import setup_logging


def embed(encoder: CachedEncoder, dataset: Captioned) -> Embeddings:
    """Embeddings of every picture and of the captions that count."""
    texts, image_of_text_M = all_captions(dataset)
    return Embeddings(encoder.images(dataset, dataset.fingerprint), encoder.texts(texts), image_of_text_M)


def main(args: Sequence[str] | None = None) -> None:
    """R@1, R@5 and R@10 both ways and mean R@1, each with its 95 % interval and n."""
    options = _parser().parse_args(args)
    setup_logging()
    settings = {
        "data": str(options.data),
        "split": options.split,
        "caption_field": options.caption_field,
        "protocol": options.protocol,
        "seed": options.seed,
    }
    dataset = open_retrieval(
        options.data,
        split=options.split,
        caption_field=options.caption_field,
        image_dir=options.image_dir,
        protocol=options.protocol,
        cache=options.cache,
    )
    model, processor = load_encoder(options.model, options.device)
    embeddings = embed(CachedEncoder(model, processor, options.cache, batch_size=options.batch_size), dataset)
    found = ranks(embeddings)
    result = recalls(found, embeddings.image_of_text, seed=options.seed)
    result["num_distinct_captions"] = num_distinct_captions(dataset)
    content = record("retrieval", options.model, settings, result)
    content["questions_sha256"] = questions_sha256([dataset.name(i), *dataset.captions(i)] for i in range(len(dataset)))
    emit(
        content,
        retrieval_table(result),
        options.output,
        {
            "image_to_text_rank": found.image_to_text,
            "text_to_image_rank": found.text_to_image,
            "image_of_text": embeddings.image_of_text,
        },
    )


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        __doc__,
        ".venv/bin/python -m eval.retrieval --model scenes-clip --data outputs/scenes --caption-field long",
    )
    parser.add_argument("--model", required=True, help="folder of a CLIPModel or CLIPMoEModel, or scenes-clip")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        help="folder of {split}-*.tar shards, a JSON list, Karpathy's dataset_*.json, COCO's captions_*.json or "
        "Flickr30k's results_20130124.token",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="refuse data that are not those of a published number: "
        + "; ".join(f"{name}: {p.about}, {p.num_images:,} pictures" for name, p in PROTOCOLS.items()),
    )
    parser.add_argument("--split", default="test", help="which shards of the folder, or split of Karpathy's file")
    parser.add_argument(
        "--caption-field",
        default="captions",
        choices=["captions", "long"],
        help="captions: all captions of a picture are its right answers; long: the one long caption",
    )
    parser.add_argument("--image-dir", type=Path, help="folder of the pictures, where --data is a file")
    parser.add_argument("--output", type=Path, help="JSON file to write, with the ranks of every sample beside it")
    parser.add_argument("--cache", type=Path, help="folder that keeps embeddings: a killed run goes on from it")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--device", help="default: cuda if there is one")
    return parser


if __name__ == "__main__":
    main()
