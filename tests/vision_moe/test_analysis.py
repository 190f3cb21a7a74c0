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

from vision_moe.analysis import experts_alone, main, utilization
from vision_moe.data.captions import open_captions
from vision_moe.model import CLIPMoEConfig, CLIPMoEModel
from vision_moe.moe.router import Router
from vision_moe.retrieval import retrieval
from vision_moe.routing_counts import BlockCounts
from vision_moe.upcycle import expert_as_dense

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
    return _build({})


def _build(fields: dict[str, Any]) -> CLIPMoEModel:
    torch.manual_seed(0)
    config = CLIPMoEConfig(
        vision_config={**_TOWER, "image_size": 32, "patch_size": 8, **fields},
        text_config={
            **_TOWER,
            **fields,
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


def _counted(logits: list[list[float]], router: Router) -> dict[str, Any]:
    routed = router.decide(torch.tensor(logits))
    counts = BlockCounts(router.num_experts)
    counts.add(routed, routed.topk_experts_TK)
    return counts.summary()


def test_counts_equal_a_hand_worked_case() -> None:
    summary = _counted([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 2.0]], Router(8, 3, 2))
    # First choices are 0, 1, 2; pairs are 01, 12, 21.
    assert summary["tokens_top_1"] == [1, 1, 1]
    assert summary["tokens_top_k"] == [1, 3, 2]
    assert summary["share_top_k"] == pytest.approx([1 / 3, 1.0, 2 / 3])
    p = np.exp([2.0, 1.0, 0.0]) / np.exp([2.0, 1.0, 0.0]).sum()
    assert summary["gate_entropy"] == pytest.approx(-(p * np.log(p)).sum())
    assert summary["mean_gates"] == pytest.approx(
        [(p[0] + 2 * p[2]) / 3, (2 * p[1] + p[0]) / 3, (p[2] + p[1] + p[0]) / 3]
    )
    assert summary["dropped_fraction"] == 0.0


def test_sigmoid_scores_count_as_shares_of_their_sum() -> None:
    # Sigmoids of log 3, 0, 0 are 3/4, 1/2, 1/2, whose shares are 3/7, 2/7, 2/7.
    summary = _counted([[float(np.log(3)), 0.0, 0.0]], Router(8, 3, 1, scoring_func="sigmoid"))
    assert summary["mean_gates"] == pytest.approx([0.75, 0.5, 0.5])
    p = np.array([3, 2, 2]) / 7
    assert summary["gate_entropy"] == pytest.approx(-(p * np.log(p)).sum())


def test_a_bias_on_the_choice_is_counted_and_leaves_the_gates() -> None:
    router = Router(8, 2, 1, choice_bias=True)
    assert router.choice_bias is not None
    router.choice_bias.copy_(torch.tensor([0.0, 1.0]))
    summary = _counted([[2.0, 0.0]], router)
    assert summary["tokens_top_1"] == [0, 1]
    assert summary["mean_gates"][0] == pytest.approx(np.exp(2) / (np.exp(2) + 1))


def test_expert_choice_counts_who_took_a_token_and_the_highest_of_them_first() -> None:
    routed = Router(8, 2, 2).decide(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    counts = BlockCounts(2, expert_choice=True)
    # Token 0 is taken by both, token 1 by none, token 2 by its worse expert alone.
    counts.add(routed, torch.tensor([[0, 1], [2, 2], [0, 2]]))
    summary = counts.summary()
    assert summary["tokens_top_k"] == [2, 1]
    assert summary["tokens_top_1"] == [2, 0]
    assert summary["dropped_fraction"] == pytest.approx(1 / 3)


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


@pytest.mark.parametrize(
    "fields",
    [
        {"scoring_func": "sigmoid"},
        {"router_bias_update_rate": 0.1},
        {"capacity_factor": 1.0, "eval_capacity_factor": 0.5},
        {
            "router_type": "expert_choice",
            "capacity_factor": 1.0,
            "eval_capacity_factor": 1.0,
            "capacity_group_size": 1,
            "router_aux_loss_coef": 0.0,
        },
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_counts_are_those_the_model_returns_whatever_its_routing(
    fields: dict[str, Any], processor: CLIPProcessor, pairs: list[dict[str, Any]]
) -> None:
    moe = _build(fields)
    for module in moe.modules():
        if isinstance(module, Router) and module.choice_bias is not None:
            module.choice_bias.copy_(torch.tensor([0.0, 0.3, -0.3, 0.1]))
    inputs = processor(
        text=[pair["caption"] for pair in pairs],
        images=[pair["image"] for pair in pairs],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        output = moe.eval()(**inputs, output_router_logits=True)
    towers = utilization(moe, processor, pairs)["towers"]
    for name, expected in (("vision", output.vision_model_output), ("text", output.text_model_output)):
        assert towers[name]["tokens_top_k"] == expected.tokens_per_expert.tolist()
        assert towers[name]["dropped_fraction"] == pytest.approx(expected.dropped_fraction.tolist())
    assert (max(towers["vision"]["dropped_fraction"]) > 0) == ("eval_capacity_factor" in fields)


def test_dense_model_is_an_error_that_says_what_to_do(processor: CLIPProcessor) -> None:
    dense = CLIPModel(CLIPConfig(text_config=_TOWER, vision_config={**_TOWER, "image_size": 32, "patch_size": 8}))
    with pytest.raises(ValueError, match="without MoE layers has no experts to count; pass a CLIP-MoE"):
        utilization(dense, processor, [])


def test_each_expert_alone_is_the_dense_model_with_its_mlps(
    tmp_path: Path, model: CLIPMoEModel, processor: CLIPProcessor, pairs: list[dict[str, Any]]
) -> None:
    _write_shard(tmp_path / "test-0000.tar", pairs)
    dataset = open_captions(tmp_path, split="test")
    found = experts_alone(model.eval(), processor, dataset)
    assert list(found) == ["mixture", "expert 0", "expert 1", "expert 2", "expert 3"]
    assert found["mixture"] == retrieval(model, processor, dataset)
    assert found["expert 2"] == retrieval(expert_as_dense(model, 2), processor, dataset)


def test_command_writes_tables_heat_map_and_what_else_is_asked_for(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: CLIPMoEModel,
    processor: CLIPProcessor,
    pairs: list[dict[str, Any]],
) -> None:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for name, some in (("one", pairs), ("two", pairs[:2])):
        (tmp_path / name).mkdir()
        _write_shard(tmp_path / name / "test-0000.tar", some)
    output = tmp_path / "out"
    main(["--model", str(tmp_path / "model"), "--data", str(tmp_path / "one"), "--output", str(output)])
    result = json.loads((output / "utilization.json").read_text())
    assert result == utilization(model, processor, pairs)
    assert Image.open(output / "utilization.png").format == "PNG"
    assert sorted(path.name for path in output.iterdir()) == ["report.md", "utilization.json", "utilization.png"]
    assert str(output / "report.md") in capsys.readouterr().out

    both = f"[{tmp_path / 'one'}, {tmp_path / 'two'}]"
    more = ["--similarity_tokens", "20", "--top_patches", "3", "--experts_alone", "true", "--batch_size", "2"]
    main(["--model", str(tmp_path / "model"), "--data", both, "--output", str(tmp_path / "both"), *more])
    folder = tmp_path / "both"
    assert json.loads((folder / "one" / "utilization.json").read_text())["num_samples"] == 5
    assert json.loads((folder / "two" / "utilization.json").read_text())["num_samples"] == 2
    assert sorted(path.name for path in (folder / "one" / "patches").iterdir()) == ["block_00.png", "block_01.png"]
    similarity = json.loads((folder / "one" / "similarity.json").read_text())
    assert np.shape(similarity["vision"]["output_cka"]) == (2, 4, 4)
    report = (folder / "report.md").read_text()
    for line in ("| one | vision |", "| two | text |", "| expert 3 |", "| text | 1 |"):
        assert line in report


def test_data_sets_of_one_name_are_refused(tmp_path: Path, model: CLIPMoEModel, processor: CLIPProcessor) -> None:
    both = f"[{tmp_path / 'a' / 'test'}, {tmp_path / 'b' / 'test'}]"
    with pytest.raises(ValueError, match="test, test"):
        main(["--model", "unused", "--data", both, "--output", str(tmp_path)])


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
