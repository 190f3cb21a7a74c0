"""What is told of each modality's routing: metrics, table, curves."""

import json
import math

import pytest
import torch
from PIL import Image

from vision_moe.analysis import utilization
from vision_moe.curves import main
from vision_moe.modality_routing import experts_used, modality_metrics, modality_table
from vision_moe.model import CLIPMoEConfig, CLIPMoEModel


def test_experts_used_hand_worked():
    """All to one: 1. Even over 3 of 4: 3. Shares 1/2, 1/4, 1/4: exp(3/2 ln 2) = 2 sqrt 2."""
    used = experts_used(torch.tensor([[7, 0, 0, 0], [2, 2, 0, 2], [4, 2, 2, 0]]))
    torch.testing.assert_close(used, torch.tensor([1.0, 3.0, 2 * math.sqrt(2)]))


def test_metrics_tell_a_collapsed_modality_from_a_spread_one(make_limoe, clip_batch):
    model = make_limoe(moe_layers=[0, 1]).train()
    out = model(**clip_batch)
    out.vision_model_output.mean_gates = torch.full((2, 4), 0.25)
    out.vision_model_output.tokens_per_expert = torch.full((2, 4), 12)
    out.text_model_output.mean_gates = torch.tensor([[1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    out.text_model_output.tokens_per_expert = torch.tensor([[23, 0, 0, 0], [10, 10, 0, 0]])
    metrics = modality_metrics(out, model.config)
    assert metrics["image/experts_used"].item() == pytest.approx(4.0)
    assert metrics["image/routing_entropy"].item() == pytest.approx(math.log(4))
    assert metrics["text/layer0/experts_used"].item() == pytest.approx(1.0)
    assert metrics["text/layer1/experts_used"].item() == pytest.approx(2.0)
    assert metrics["text/routing_entropy"].item() == pytest.approx(math.log(2) / 2)
    assert metrics["text/dropped_fraction"].item() == 0.0
    assert metrics["text/gate_entropy"].item() == pytest.approx(out.text_model_output.gate_entropy.mean().item())
    assert len(metrics) == 2 * 4 * 3


def test_other_models_have_no_such_metrics(clip_sizes, clip_batch):
    model = CLIPMoEModel(CLIPMoEConfig(**clip_sizes)).train()
    assert modality_metrics(model(**clip_batch), model.config) == {}


def test_the_table_shows_the_counts_of_each_modality(make_limoe, tiny_processor):
    model = make_limoe(vocab_size=12, max_position_embeddings=8, patch_size=16)
    with torch.no_grad():
        model.encoder.layers[1].mlp.router.weight.mul_(20)
    pairs = [
        {"image": Image.new("RGB", (32, 32), color), "caption": caption, "index": i}
        for i, (color, caption) in enumerate([("red", "a red square"), ("blue", "two"), ("black", "a photo of one")])
    ]
    result = utilization(model, tiny_processor, pairs)
    vision, text = result["towers"]["vision"], result["towers"]["text"]
    # 4 patches a picture; two special tokens and 3 + 1 + 4 words.
    assert (vision["num_tokens"], text["num_tokens"]) == (12, 14)
    inputs = tiny_processor(
        images=[pair["image"] for pair in pairs],
        text=[pair["caption"] for pair in pairs],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        out = model(**inputs, output_router_logits=True)
    for tower, side in ((vision, out.vision_model_output), (text, out.text_model_output)):
        assert tower["layers"] == [1]
        assert tower["tokens_top_k"] == side.tokens_per_expert.tolist()
        assert tower["dropped_fraction"] == side.dropped_fraction.tolist() == [0.0]
        torch.testing.assert_close(torch.tensor(tower["mean_gates"]), side.mean_gates)
    logged = {"image/layer1/dropped_fraction": 0.125, "text/layer1/dropped_fraction": 0.5}
    rows = [line for line in modality_table("LIMoE", {**result, "training": logged}) if line.startswith("| 1 |")]
    assert [row.split(" | ")[1] for row in rows] == ["image", "text"]
    shares = [float(cell) for cell in rows[1].split(" | ")[2:6]]
    assert shares == pytest.approx([100 * count / 14 for count in text["tokens_top_k"][0]], abs=0.051)
    assert [row.strip("| ").split(" | ")[-1] for row in rows] == ["12.5", "50.0"]
    assert modality_table("LIMoE", {**result, "training": {}})[-1].endswith("| not logged |")


def test_the_command_draws_the_curves_of_two_runs(tmp_path):
    for name, value in (("a", 1.0), ("b", 3.0)):
        entries = [{"stage": "limoe", "step": step, "text/experts_used": value} for step in range(3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    runs = json.dumps({"losses": str(tmp_path / "b.jsonl"), "control": str(tmp_path / "a.jsonl")})
    main(["--runs", runs, "--output", str(tmp_path / "c.png"), "--keys", '["text/experts_used"]'])
    assert Image.open(tmp_path / "c.png").format == "PNG"
    with pytest.raises(ValueError, match="no run logs 'image/experts_used'"):
        main(["--runs", runs, "--output", str(tmp_path / "d.png")])
