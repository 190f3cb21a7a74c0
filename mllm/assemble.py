"""Assembles a LLaVA from a vision tower, a language model and a fresh projector, as one ordinary model folder.

Training then loads everything by `from_pretrained`, the only way that works under DeepSpeed's ZeRO-3, and what a
checkpoint holds is what runs.
"""

import copy
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import ACT2FN
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from mllm.chat_template import chat_template
from mllm.conversation import IMAGE_TOKEN, Template, stop_token_ids
from mllm.images import AspectRatio, build_image_processor
from mllm.model import LlavaMoEForConditionalGeneration
from mllm.tower import load_tower
from mllm.tower_fingerprint import record_tower
from vision_moe.checkpoint import write_folder
from vision_moe.model.families import tower_family

Source: TypeAlias = str | Path | PreTrainedModel
# Matrix products want aligned sizes, so a vocabulary that must grow anyway grows to a multiple of this.
_VOCABULARY_MULTIPLE = 64


def build_llava(
    vision: Source,
    language_model: Source,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    *,
    template: Template = "v1",
    image_aspect_ratio: AspectRatio = "pad",
    select_layer: int = -2,
    projector: str = "mlp2x_gelu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[LlavaMoEForConditionalGeneration, LlavaProcessor]:
    """Joins the parts; patch features without the class token, as LLaVA-1.5.

    Args:
        vision: dual encoder or image tower of vision_moe.model.families, dense or a mixture: a folder, a hub name or a
            model.
        language_model: causal language model: a folder, a hub name or a model, which becomes part of the result.
        tokenizer: of the language model, which is left as it is; None = the one in its folder.
        template: that the model is trained and asked with; kept as `config.conversation_template`.
        image_aspect_ratio: kept in the config and the image processor, see `mllm.images`.
        select_layer: hidden state of the tower that the language model sees; the tower ends there.
        projector: "mlp2x_" and an activation of transformers' ACT2FN.
        dtype: of all weights.
        seed: of the projector's random weights.

    Returns:
        the model, and the processor with `<image>` in its tokenizer.

    Raises:
        ValueError: a part does not fit.
    """
    activation = _activation(projector)
    words = _prepared_tokenizer(language_model if tokenizer is None else tokenizer)
    # An unusable template is found here, and not after hours of training.
    stop_ids = stop_token_ids(words, template)
    tower = load_tower(vision, select_layer, dtype)
    llm = _language_model(language_model, dtype)
    _grow_vocabulary(llm, len(words))
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=llm.config,
        image_token_index=words.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=_num_image_tokens(tower.config),
        projector_hidden_act=activation,
        vision_feature_layer=-1,
        vision_feature_select_strategy=_select_strategy(tower.config),
    )
    config.conversation_template = template
    config.image_aspect_ratio = image_aspect_ratio
    model = _join(config, tower, llm, dtype, seed)
    record_tower(model)
    model.generation_config = GenerationConfig(
        bos_token_id=words.bos_token_id, eos_token_id=stop_ids, pad_token_id=words.pad_token_id
    )
    source = None if isinstance(vision, PreTrainedModel) else vision
    processor = _processor(tower.config, words, image_aspect_ratio, source)
    processor.chat_template = chat_template(template, words)
    return model, processor


def assemble(
    vision: Source,
    language_model: Source,
    tokenizer: PreTrainedTokenizerBase | str | Path | None,
    out_dir: str | Path,
    *,
    template: Template = "v1",
    image_aspect_ratio: AspectRatio = "pad",
    select_layer: int = -2,
    projector: str = "mlp2x_gelu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Writes what `build_llava` makes (arguments there) as a model folder; nothing half-written stays at `out_dir`."""
    model, processor = build_llava(
        vision,
        language_model,
        tokenizer,
        template=template,
        image_aspect_ratio=image_aspect_ratio,
        select_layer=select_layer,
        projector=projector,
        dtype=dtype,
        seed=seed,
    )
    folder = Path(out_dir)
    save(model, processor, folder)
    return folder


def build_processor(
    vision: str | Path, language_model: str | Path, image_aspect_ratio: AspectRatio = "pad"
) -> tuple[LlavaProcessor, int]:
    """The processor that `build_llava` makes of these parts, and the tokens of a picture; no weights are read."""
    config = AutoConfig.from_pretrained(vision)
    vision_config = getattr(config, "vision_config", config)
    words = _prepared_tokenizer(language_model)
    processor = _processor(vision_config, words, image_aspect_ratio, vision)
    return processor, _num_image_tokens(vision_config)


def save(model: PreTrainedModel, processor: LlavaProcessor, folder: Path) -> None:
    """Writes model and processor so that the folder is all that `mllm.generate.load` needs."""

    def write(target: Path) -> None:
        # Under the model's own names, like every stage's model.
        model.save_pretrained(target, save_original_format=False)
        processor.save_pretrained(target)

    write_folder(folder, write)


def _activation(projector: str) -> str:
    kind, _, activation = projector.partition("_")
    if kind != "mlp2x" or activation not in ACT2FN:
        raise ValueError(
            f"unknown projector {projector!r}; it must be 'mlp2x_' and an activation that transformers knows, "
            f"for example mlp2x_gelu (LLaVA-1.5's)"
        )
    return activation


def _prepared_tokenizer(source: PreTrainedTokenizerBase | Source) -> PreTrainedTokenizerBase:
    if isinstance(source, PreTrainedModel):
        raise ValueError("a language model given as an object needs its tokenizer given too")
    if isinstance(source, PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(source)
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def _language_model(source: Source, dtype: torch.dtype) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        llm = source.to(dtype)
    else:
        llm = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    head = llm.get_output_embeddings()
    if head is None or llm.base_model is llm or getattr(head, "bias", None) is not None:
        raise ValueError(f"{type(llm).__name__} is no decoder with a plain linear head, which LLaVA needs")
    return llm


def _grow_vocabulary(llm: PreTrainedModel, num_tokens: int) -> None:
    old = llm.get_input_embeddings().num_embeddings
    if num_tokens <= old:
        return
    llm.resize_token_embeddings(num_tokens, pad_to_multiple_of=_VOCABULARY_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            # The mean row is an unremarkable token; a random one could win over every trained one.
            layer.weight[old:] = layer.weight[:old].float().mean(dim=0).to(layer.weight.dtype)


def _join(
    config: LlavaConfig, tower: PreTrainedModel, llm: PreTrainedModel, dtype: torch.dtype, seed: int
) -> LlavaMoEForConditionalGeneration:
    with torch.device("meta"):
        model = LlavaMoEForConditionalGeneration(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # torch's own initialisation of a linear layer, as in LLaVA.
        model.model.multi_modal_projector = LlavaMultiModalProjector(config).to(dtype)
    model.model.vision_tower = tower
    model.model.language_model = llm.base_model
    head = llm.get_output_embeddings()
    model.lm_head = head if isinstance(head, nn.Linear) else model.lm_head
    model.tie_weights()
    config.dtype = dtype
    return model.eval()


def _processor(
    vision_config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    image_aspect_ratio: AspectRatio,
    source: str | Path | None,
) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=build_image_processor(vision_config, image_aspect_ratio, source),
        tokenizer=tokenizer,
        patch_size=vision_config.patch_size,
        vision_feature_select_strategy=_select_strategy(vision_config),
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=int(tower_family(vision_config).class_token),
    )


def _select_strategy(vision_config: PreTrainedConfig) -> str:
    """LLaVA's word for the patches alone: "default" drops the class token, "full" drops nothing."""
    return "default" if tower_family(vision_config).class_token else "full"


def _num_image_tokens(vision_config: PreTrainedConfig) -> int:
    """Patches of a picture; the class token is never among them."""
    return int(vision_config.image_size // vision_config.patch_size) ** 2
