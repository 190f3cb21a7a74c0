"""DINOv2 as a CLIP image tower, exactly: `python -m vision_moe.convert.dinov2 --out DIR [--model NAME | --onnx FILE]`.

A DINOv2 block differs from CLIP's in three linear details, and each folds into weights that CLIP has:
LayerScale scales the rows of the layer before it (`out_proj`, `fc2`), the patch projection's bias moves into the
position embeddings of the patches, and there is no norm before the first block (`pre_layernorm=False`).

D model dim.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model

from vision_moe.checkpoint import write_folder
from vision_moe.command_help import CommandParser
from vision_moe.model import CLIPMoEVisionConfig, CLIPMoEVisionModel
from vision_moe.tracking import setup_logging

logger = logging.getLogger(__name__)

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Dinov2Model's block -> CLIP's block; weights and biases alike.
_BLOCK = {
    "norm1": "layer_norm1",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
# Block layer -> the LayerScale that multiplies its output.
_SCALED = {"attention.o_proj": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"}
# Names that exports made with transformers 4 carry -> transformers 5.
_EXPORTED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def to_clip_vision(dinov2: Dinov2Model, image_size: int, num_layers: int | None = None) -> CLIPMoEVisionModel:
    """The same function as a dense CLIP image tower at one resolution.

    Args:
        dinov2: without registers, with the plain MLP (`use_swiglu_ffn=False`).
        image_size: pixels per side, a multiple of the patch size; position embeddings are interpolated to it as
            DINOv2 does.
        num_layers: keeps the first blocks only; None keeps all. The final norm is kept as it is.

    Returns:
        A tower whose `last_hidden_state`, normalised by `post_layernorm`, equals DINOv2's.

    Raises:
        ValueError: if the image size does not fit the patches, or the model has SwiGLU MLPs.
    """
    config = dinov2.config
    if image_size % config.patch_size:
        raise ValueError(f"image_size must be a multiple of the patch size {config.patch_size}, but got {image_size}")
    if config.use_swiglu_ffn:
        raise ValueError("CLIP has no SwiGLU MLP; only DINOv2 models with the plain MLP (S, B, L) can be converted")
    depth = config.num_hidden_layers if num_layers is None else num_layers
    if not 1 <= depth <= config.num_hidden_layers:
        raise ValueError(f"num_layers must be in [1, {config.num_hidden_layers}], but got {num_layers}")
    fields: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": int(config.hidden_size * config.mlp_ratio),
        "num_hidden_layers": depth,
        "num_attention_heads": config.num_attention_heads,
        "image_size": image_size,
        "patch_size": config.patch_size,
        "hidden_act": config.hidden_act,
        "layer_norm_eps": config.layer_norm_eps,
        "moe_layers": [],
        "pre_layernorm": False,
    }
    clip = CLIPMoEVisionModel(CLIPMoEVisionConfig(**fields))
    state = dinov2.state_dict()
    renamed = {**_embeddings(dinov2, image_size), **_blocks(state, depth)}
    for kind in ("weight", "bias"):
        renamed[f"post_layernorm.{kind}"] = state[f"layernorm.{kind}"]
    clip.load_state_dict(renamed, strict=True)
    return clip.eval()


def read_onnx(file: Path, config: Dinov2Config) -> Dinov2Model:
    """A Dinov2Model from the initializers of an ONNX export of one (nodes keep the module's path in their names).

    Raises:
        ValueError: if the graph does not hold every weight of the model.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ImportError('reading ONNX needs the package onnx: pip install "vision-moe[onnx]"') from error
    graph = onnx.load(str(file)).graph
    tensors = {item.name: torch.from_numpy(np.array(numpy_helper.to_array(item))) for item in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        # Exporters store a Linear's weight transposed and anonymous, as the second input of its MatMul.
        if node.op_type == "MatMul" and node.input[1] in tensors:
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{path}.weight"] = tensors[node.input[1]].T.contiguous()
    state["embeddings.position_embeddings"] = _positions(tensors, config)
    # The mask token serves DINOv2's own training only; exports leave it out.
    state["embeddings.mask_token"] = torch.zeros(1, config.hidden_size)
    for theirs, ours in _EXPORTED.items():
        state = {name.replace(theirs, ours): value for name, value in state.items()}
    model = Dinov2Model(config)
    wanted = model.state_dict().keys()
    missing = sorted(wanted - state.keys())
    if missing:
        raise ValueError(f"{file} lacks {len(missing)} weights of the model, the first ones {missing[:3]}")
    model.load_state_dict({name: state[name] for name in wanted}, strict=True)
    return model.eval()


def main() -> None:
    """Writes the image tower and its image processor as one Hugging Face folder."""
    parser = CommandParser(
        __doc__, ".venv/bin/python -m vision_moe.convert.dinov2 --model facebook/dinov2-small --out outputs/dinov2_s"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--model", default="facebook/dinov2-small", help="hub name or folder of a Dinov2Model")
    parser.add_argument("--onnx", type=Path, help="ONNX export of a DINOv2-S/14, instead of --model")
    parser.add_argument("--image-size", type=int, default=224, help="pixels per side")
    parser.add_argument("--num-layers", type=int, help="keep the first blocks only")
    args = parser.parse_args()
    setup_logging()
    if args.onnx is None:
        dinov2 = Dinov2Model.from_pretrained(args.model)
    else:
        small = Dinov2Config(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
        )
        dinov2 = read_onnx(args.onnx, small)
    clip = to_clip_vision(dinov2, args.image_size, args.num_layers)
    size = {"height": args.image_size, "width": args.image_size}
    processor = CLIPImageProcessor(
        size={"shortest_edge": args.image_size},
        crop_size=size,
        image_mean=_IMAGENET_MEAN,
        image_std=_IMAGENET_STD,
    )

    def write(folder: Path) -> None:
        clip.save_pretrained(folder)
        processor.save_pretrained(folder)

    write_folder(args.out, write)
    logger.info("image tower: %s", args.out)


def _embeddings(dinov2: Dinov2Model, image_size: int) -> dict[str, Tensor]:
    embeddings = dinov2.embeddings
    num_patches = (image_size // dinov2.config.patch_size) ** 2
    with torch.no_grad():
        # Only the number of tokens and the width of this argument are read.
        like = torch.zeros(1, 1 + num_patches, dinov2.config.hidden_size)
        positions_PD = embeddings.interpolate_pos_encoding(like, image_size, image_size)[0].clone()
        positions_PD[1:] += embeddings.patch_embeddings.projection.bias
    return {
        "embeddings.class_embedding": embeddings.cls_token[0, 0].detach(),
        "embeddings.patch_embedding.weight": embeddings.patch_embeddings.projection.weight.detach(),
        "embeddings.position_embedding.weight": positions_PD,
    }


def _blocks(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    renamed = {}
    for layer in range(depth):
        source = f"encoder.layer.{layer}."
        for theirs, ours in _BLOCK.items():
            for kind in ("weight", "bias"):
                value = state[f"{source}{theirs}.{kind}"]
                if theirs in _SCALED:
                    scale_D = state[source + _SCALED[theirs]]
                    value = scale_D[:, None] * value if kind == "weight" else scale_D * value
                renamed[f"encoder.layers.{layer}.{ours}.{kind}"] = value
    return renamed


def _positions(tensors: dict[str, Tensor], config: Dinov2Config) -> Tensor:
    """The table [1, 1 + P, D] from the two constants that interpolation splits it into."""
    num_patches = (config.image_size // config.patch_size) ** 2
    found = {tuple(value.shape): value for name, value in tensors.items() if not name.startswith("backbone.")}
    parts = [found.get((1, length, config.hidden_size)) for length in (1, num_patches)]
    if any(part is None for part in parts):
        raise ValueError(f"the export has no position table for {num_patches} patches and the class token")
    return torch.cat([part for part in parts if part is not None], dim=1)


if __name__ == "__main__":
    main()
