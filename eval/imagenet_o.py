"""ImageNet-O: `python -m eval.imagenet_o --model DIR --data IMAGENET_O --in-distribution IMAGENET_VAL`.

Its 2,000 pictures show none of ImageNet's classes (Hendrycks et al. 2021, Natural Adversarial Examples). A folder's
name is the class that a ResNet-50 took its pictures for, and no right answer. The set's own measure is how well the
model's doubt tells them from ImageNet's pictures of these 200 classes. Shapes: N pictures, C classes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.encoder import load_encoder
from eval.imagenet import same_classes, wnid_folders
from eval.labelled import LabelledPictures
from eval.metrics import aupr, label_ranks, share
from eval.record import emit, record
from eval.tables import imagenet_o_table
from eval.templates import templates
from eval.zero_shot import classifier
from vision_moe.command_help import CommandParser
from vision_moe.embedding_cache import CachedEncoder
from vision_moe.tracking import setup_logging

_NUM_CLASSES = 200


def doubt(logits_NC: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Less the largest softmax probability, float64[N]: the baseline score of Hendrycks and Gimpel (2017)."""
    exponentials_NC = np.exp(logits_NC.astype(np.float64) - logits_NC.max(axis=1, keepdims=True))
    lowered_N: NDArray[np.float64] = -1.0 / exponentials_NC.sum(axis=1)
    return lowered_N


def detection(
    encoder: CachedEncoder,
    outside: LabelledPictures,
    inside: LabelledPictures,
    prompts: Sequence[str],
    *,
    logit_scale: float,
    seed: int = 0,
) -> dict[str, Any]:
    """Area under the precision-recall curve, the pictures outside ImageNet being the positives.

    Args:
        encoder: the model.
        outside: ImageNet-O.
        inside: ImageNet's validation pictures of the same classes.
        prompts: templates.
        logit_scale: of the model.
        seed: of the bootstrap.

    Returns:
        {"aupr": {"value", "n", "num_positive", "interval"}, "chance", "taken_for_folder": {"value", "n", "interval"}}.
        The last is what papers on CLIP print as ImageNet-O's accuracy, CLIP-MoE's table 5 among them: the share of
        pictures that this model mistakes as the ResNet-50 did.
    """
    class_CD = classifier(encoder, outside.classes, prompts)
    outside_NC = encoder.images(outside, outside.fingerprint) @ class_CD.T
    inside_NC = encoder.images(inside, inside.fingerprint) @ class_CD.T
    taken_N = label_ranks(outside_NC, outside.labels_N) == 0
    return {
        "aupr": aupr(doubt(logit_scale * outside_NC), doubt(logit_scale * inside_NC), seed=seed),
        "chance": len(outside) / (len(outside) + len(inside)),
        "taken_for_folder": share(int(taken_N.sum()), len(taken_N)),
    }


def main(args: Sequence[str] | None = None) -> None:
    """AUPR with its 95 % interval."""
    parser = CommandParser(
        __doc__, ".venv/bin/python -m eval.imagenet_o --model DIR --data imagenet-o --in-distribution imagenet/val"
    )
    parser.add_argument("--model", required=True, help="folder of a CLIPModel or CLIPMoEModel")
    parser.add_argument("--data", required=True, type=Path, help="ImageNet-O: 200 folders named by WordNet id")
    parser.add_argument("--in-distribution", required=True, type=Path, help="ImageNet's validation folders, likewise")
    parser.add_argument("--templates", default="openai", help="as of eval.zero_shot")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--cache", type=Path, help="folder that keeps embeddings: a killed run goes on from it")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--device", help="default: cuda if there is one")
    options = parser.parse_args(args)
    setup_logging()
    outside = wnid_folders(options.data, _NUM_CLASSES)
    inside = same_classes(options.in_distribution, options.data)
    prompts = templates(options.templates)
    model, processor = load_encoder(options.model, options.device)
    encoder = CachedEncoder(model, processor, options.cache, batch_size=options.batch_size)
    scale = float(model.logit_scale.detach().exp())
    result = detection(encoder, outside, inside, prompts, logit_scale=scale, seed=options.seed)
    settings = {
        "data": str(options.data),
        "in_distribution": str(options.in_distribution),
        "templates": list(prompts),
        "logit_scale": scale,
        "seed": options.seed,
    }
    emit(record("imagenet_o", options.model, settings, result), imagenet_o_table(result), options.output)


if __name__ == "__main__":
    main()
