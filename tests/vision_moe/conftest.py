"""A tiny CLIP with a word tokenizer, for tests of everything that takes a model and a processor."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

_WORDS = ["<pad>", "<bos>", "<unk>", "<eos>", "a", "photo", "of", "red", "blue", "square", "one", "two"]
_MAX_TEXT_TOKENS = 8


@pytest.fixture(scope="session")
def tiny_processor() -> CLIPProcessor:
    """32-pixel pictures, at most 8 text tokens: <bos> words <eos>, padded with <pad>."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=_MAX_TEXT_TOKENS,
    )
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return CLIPProcessor(image_processor=image_processor, tokenizer=fast)


@pytest.fixture
def tiny_clip() -> CLIPModel:
    """Dense CLIP of 2 + 2 layers and width 32 with the same random weights in every test."""
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        text_config={
            **tower,
            "vocab_size": len(_WORDS),
            "max_position_embeddings": _MAX_TEXT_TOKENS,
            "bos_token_id": 1,
            # Not 2: for that id transformers looks for the largest id of the caption instead.
            "eos_token_id": 3,
            "pad_token_id": 0,
        },
        projection_dim=16,
    )
    torch.manual_seed(0)
    return CLIPModel(config).eval()


@pytest.fixture(scope="session")
def write_shard() -> Callable[..., None]:
    """Writes a WebDataset shard of pictures in one colour each: {key: {"captions": [...]}}; `broken` keys hold no JPEG."""

    def write(path: Path, samples: dict[str, dict[str, object]], broken: tuple[str, ...] = ()) -> None:
        with tarfile.open(path, "w") as tar:
            for number, (key, metadata) in enumerate(samples.items()):
                encoded = io.BytesIO()
                Image.new("RGB", (32, 32), (number * 40 % 256, 128, 0)).save(encoded, "JPEG")
                picture = encoded.getvalue()[:100] if key in broken else encoded.getvalue()
                for suffix, content in (("jpg", picture), ("json", json.dumps(metadata).encode())):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    return write
