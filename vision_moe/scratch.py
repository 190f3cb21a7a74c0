"""A small dense CLIP and its tokenizer from nothing, for data sets and machines without a pretrained one."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    set_seed,
)

from vision_moe.recipe import ScratchConfig

_START, _END = "<|startoftext|>", "<|endoftext|>"
_PAD = "<|pad|>"


def train_tokenizer(captions: Iterable[str], vocab_size: int, max_text_tokens: int) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE with CLIP's start and end tokens, trained on `captions`.

    The pad token is its own, unlike CLIP's, so that the end token is found without a special case.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_PAD, _START, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    start, end = tokenizer.token_to_id(_START), tokenizer.token_to_id(_END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, start), (_END, end)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_START,
        eos_token=_END,
        pad_token=_PAD,
        model_max_length=max_text_tokens,
    )


def build_clip(config: ScratchConfig, captions: Iterable[str], seed: int) -> tuple[CLIPModel, CLIPProcessor]:
    """A randomly initialised CLIP of the given sizes and its processor.

    Args:
        config: sizes.
        captions: text that the tokenizer is trained on.
        seed: of the weights.
    """
    tokenizer = train_tokenizer(captions, config.vocab_size, config.max_text_tokens)
    tower = {
        "hidden_size": config.hidden_size,
        "intermediate_size": 4 * config.hidden_size,
        "num_attention_heads": config.num_heads,
        "projection_dim": config.projection_dim,
    }
    clip_config = CLIPConfig(
        vision_config={
            **tower,
            "num_hidden_layers": config.num_vision_layers,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
        },
        text_config={
            **tower,
            "num_hidden_layers": config.num_text_layers,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": config.max_text_tokens,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=config.projection_dim,
    )
    set_seed(seed)
    model = CLIPModel(clip_config)
    size = config.image_size
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_convert_rgb=True
    )
    return model, CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
