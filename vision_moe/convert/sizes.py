"""The sizes of a CLIP, read off the shapes of its tensors under OpenAI's names, and a model made of both."""

from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from vision_moe.convert.names import Blocks, State
from vision_moe.model import CLIPMoEModel

Model = TypeVar("Model", CLIPModel, CLIPMoEModel)


def read_sizes(state: State, vision: Blocks, text: Blocks) -> dict[str, Any]:
    """Arguments of a CLIPConfig, less heads and activation, which no tensor tells.

    Args:
        state: all tensors of the checkpoint, under OpenAI's names.
        vision: the image tower's blocks.
        text: the text tower's blocks.

    Raises:
        ValueError: the image positions are not those of a square and a class token.
    """
    width, _, _, patch_size = state["visual.conv1.weight"].shape
    num_patches = len(state["visual.positional_embedding"]) - 1
    side = round(max(0, num_patches) ** 0.5)
    if side < 1 or side * side != num_patches:
        raise ValueError(f"the image positions must be 1 + a square number, but got {num_patches + 1} rows")
    vocab_size, text_width = state["token_embedding.weight"].shape
    projection_dim = state["text_projection"].shape[1]
    return {
        "vision_config": {
            "hidden_size": width,
            "intermediate_size": _hidden_dim(state, "visual.transformer.resblocks.0", vision),
            "num_hidden_layers": vision.depth,
            "patch_size": patch_size,
            "image_size": side * patch_size,
            "projection_dim": projection_dim,
        },
        "text_config": {
            "hidden_size": text_width,
            "intermediate_size": _hidden_dim(state, "transformer.resblocks.0", text),
            "num_hidden_layers": text.depth,
            "vocab_size": vocab_size,
            "max_position_embeddings": len(state["positional_embedding"]),
            # OpenAI's vocabulary ends with the start and the end token.
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "projection_dim": projection_dim,
        },
        "projection_dim": projection_dim,
    }


def build(model_class: type[Model], config: CLIPConfig, state: dict[str, Tensor]) -> Model:
    """A model in evaluation mode that holds exactly these tensors, under our names.

    Tensors of several dtypes (OpenAI's half precision keeps norms in float32) all become float32, which loses nothing.

    Raises:
        RuntimeError: a tensor's shape is not that of the config.
    """
    dtypes = {tensor.dtype for tensor in state.values()}
    model, info = model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtypes.pop() if len(dtypes) == 1 else torch.float32,
        output_loading_info=True,
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    model.name_or_path = model.config.name_or_path = ""  # transformers writes the None above as a path
    return model.eval()


def _hidden_dim(state: State, first_block: str, blocks: Blocks) -> int:
    mlp = "experts.0" if 0 in blocks.num_experts else "mlp"
    return state[f"{first_block}.{mlp}.c_fc.weight"].shape[0]
