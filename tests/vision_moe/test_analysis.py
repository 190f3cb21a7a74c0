"""Expert utilization against counts made by hand."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

from vision_moe.analysis import RoutingCounts, main, utilization
from vision_moe.model import CLIPMoEConfig, CLIPMoEModel

_WORDS = ["<pad>", "<s>", "</s>", "a", "red", "blue", "star", "disk", "big"]
_CAPTIONS = ["a red star", "a big blue disk", "red", "a blue star", "big"]
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
}


@pytest.fixture
def processor() -> CLIPProcessor:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=8
    )
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    return CLIPProcessor(image_processor=images, tokenizer=fast)


@pytest.fixture
def model() -> CLIPMoEModel:
    torch.manual_seed(0)
    config = CLIPMoEConfig(
        vision_config={**_TOWER, "image_size": 32, "patch_size": 8},
        text_config={
            **_TOWER,
            "vocab_size": len(_WORDS),
            "max_position_embeddings": 8,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "moe_layers": [1],
        },
        projection_dim=16,
    )
    model = CLIPMoEModel(config)
    for parameter in model.parameters():
        # Routers at their usual scale would send all tokens of so small a model to the same experts.
        if parameter.shape == (4, 32):
            parameter.data.mul_(50)
    return model


@pytest.fixture
def pairs() -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (32, 32, 3), np.uint8)) for _ in _CAPTIONS]
    return [
        {"image": picture, "caption": caption, "index": i}
        for i, (picture, caption) in enumerate(zip(pictures, _CAPTIONS, strict=True))
    ]


def test_counts_equal_a_hand_worked_case_with_padding_left_out() -> None:
    counts = RoutingCounts([3], num_experts=3, top_k=2)
    logits_BSE = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [9.0, 0.0, 8.0]], [[0.0, 1.0, 2.0]] * 3])
    # The third token of the first row and the last two of the second are padding.
    counts.add((logits_BSE,), torch.tensor([[1, 1, 0], [1, 0, 0]]))
    summary = counts.summary()
    assert summary["num_tokens"] == 3
    # First choices are 0, 1, 2; pairs are 01, 12, 21.
    assert summary["tokens_top_1"] == [[1, 1, 1]]
    assert summary["tokens_top_k"] == [[1, 3, 2]]
    assert summary["share_top_k"][0] == pytest.approx([1 / 3, 1.0, 2 / 3])
    p = np.exp([2.0, 1.0, 0.0]) / np.exp([2.0, 1.0, 0.0]).sum()
    assert summary["gate_entropy"] == pytest.approx([-(p * np.log(p)).sum()])


def test_other_number_of_layers_than_declared_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"2 layers, but the MoE layers are \[0\]"):
        RoutingCounts([0], 4, 2).add((torch.zeros(1, 1, 4),) * 2)


def test_utilization_equals_one_pair_at_a_time_without_padding(
    model: CLIPMoEModel, processor: CLIPProcessor, pairs: list[dict[str, Any]]
) -> None:
    expected = {("vision", 0): [0] * 4, ("vision", 1): [0] * 4, ("text", 1): [0] * 4}
    num_tokens = {"vision": 0, "text": 0}
    model.eval()
    for pair in pairs:
        inputs = processor(text=pair["caption"], images=pair["image"], return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs, output_router_logits=True).router_logits
        num_tokens["vision"] += logits[0].shape[1]
        num_tokens["text"] += logits[2].shape[1]
        for place, layer in zip(expected, logits, strict=True):
            for token in layer[0]:
                for expert in token.argsort(descending=True)[:2].tolist():
                    expected[place][expert] += 1
    model.train()
    result = utilization(model, processor, pairs, batch_size=3)
    assert model.training
    assert result["num_samples"] == 5
    vision, text = result["towers"]["vision"], result["towers"]["text"]
    assert (vision["layers"], text["layers"]) == ([0, 1], [1])
    # 16 patches and the class token a picture; two special tokens and 3 + 4 + 1 + 3 + 1 words.
    assert (vision["num_tokens"], text["num_tokens"]) == (5 * 17, 5 * 2 + 12)
    assert num_tokens == {"vision": 5 * 17, "text": 22}
    assert vision["tokens_top_k"] == [expected["vision", 0], expected["vision", 1]]
    assert text["tokens_top_k"] == [expected["text", 1]]
    assert sum(text["tokens_top_1"][0]) == 22
    assert len({tuple(row) for row in (*vision["tokens_top_k"], *text["tokens_top_k"])}) == 3
    assert all(0 < entropy < np.log(4) for entropy in vision["gate_entropy"])


def test_limit_measures_the_first_pairs_only(
    model: CLIPMoEModel, processor: CLIPProcessor, pairs: list[dict[str, Any]]
) -> None:
    limited = utilization(model, processor, pairs, limit=2)
    assert limited == utilization(model, processor, pairs[:2])
    assert limited["towers"]["vision"]["num_tokens"] == 2 * 17


@pytest.mark.parametrize("fields", [{"scoring_func": "sigmoid"}, {"router_bias_update_rate": 0.1}], ids=str)
def test_choices_that_softmax_logits_do_not_tell_are_refused(fields: dict[str, Any]) -> None:
    vision = {**_TOWER, "image_size": 32, "patch_size": 8, **fields}
    moe = CLIPMoEModel(CLIPMoEConfig(text_config={**_TOWER, **fields}, vision_config=vision))
    with pytest.raises(ValueError, match="do not tell the choice of the vision tower"):
        utilization(moe, None, [])


def test_dense_model_is_an_error_that_says_what_to_do(processor: CLIPProcessor) -> None:
    dense = CLIPModel(CLIPConfig(text_config=_TOWER, vision_config={**_TOWER, "image_size": 32, "patch_size": 8}))
    with pytest.raises(ValueError, match="without MoE layers has no experts to count; pass a CLIP-MoE"):
        utilization(dense, processor, [])


def test_command_writes_table_and_heat_map(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: CLIPMoEModel,
    processor: CLIPProcessor,
    pairs: list[dict[str, Any]],
) -> None:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    _write_shard(tmp_path / "data" / "test-0000.tar", pairs)
    output = tmp_path / "out"
    folders = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data"), "--output", str(output)]
    main([*folders, "--split", "test", "--batch_size", "2"])
    result = json.loads((output / "utilization.json").read_text())
    assert result == utilization(model, processor, pairs, batch_size=2)
    assert Image.open(output / "utilization.png").format == "PNG"
    assert sorted(path.name for path in output.iterdir()) == ["utilization.json", "utilization.png"]
    assert str(output / "utilization.png") in capsys.readouterr().out


def _write_shard(path: Path, pairs: list[dict[str, Any]]) -> None:
    with tarfile.open(path, "w") as shard:
        for pair in pairs:
            buffer = io.BytesIO()
            # PNG keeps the pixels, whatever the name says.
            pair["image"].save(buffer, format="PNG")
            captions = json.dumps({"captions": [pair["caption"]]}).encode()
            for suffix, content in (("jpg", buffer.getvalue()), ("json", captions)):
                member = tarfile.TarInfo(f"{pair['index']:04d}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
