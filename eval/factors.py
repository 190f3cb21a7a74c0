"""Which factors of Scenes an encoder keeps: `python -m eval.factors --model DIR --data SCENES`."""

from collections.abc import Sequence
from pathlib import Path

from eval.encoder import load_encoder
from eval.record import emit, record
from eval.tables import factors_table
from vision_moe.command_help import CommandParser
from vision_moe.data.captions import open_captions
from vision_moe.factors import factor_accuracy
from vision_moe.tracking import setup_logging


def main(args: Sequence[str] | None = None) -> None:
    """Accuracy of each factor with its n, chance level and 95 % interval."""
    parser = CommandParser(__doc__, ".venv/bin/python -m eval.factors --model scenes-clip --data outputs/scenes")
    parser.add_argument("--model", required=True, help="folder of a CLIPModel or CLIPMoEModel, or scenes-clip")
    parser.add_argument("--data", required=True, type=Path, help="Scenes folder (python -m vision_moe.data.scenes)")
    parser.add_argument("--split", default="test", help="the split that carries variants")
    parser.add_argument("--limit", type=int, help="measure the first so many pictures only")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", help="default: cuda if there is one")
    options = parser.parse_args(args)
    setup_logging()
    dataset = open_captions(options.data, split=options.split, caption_field="long")
    model, processor = load_encoder(options.model, options.device)
    result = factor_accuracy(model, processor, dataset, limit=options.limit, batch_size=options.batch_size)
    settings = {"data": str(options.data), "split": options.split, "limit": options.limit}
    emit(record("factors", options.model, settings, result), factors_table(result), options.output)


if __name__ == "__main__":
    main()
