"""The whole road for other families than CLIP: from a SigLIP's folder, and from two pretrained towers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    ViTImageProcessor,
)

from vision_moe.analysis import utilization
from vision_moe.config import parse
from vision_moe.data import open_captions
from vision_moe.model import SiglipMoEModel, VisionTextDualEncoderMoEModel
from vision_moe.processor import load_processor
from vision_moe.recipe import TowersConfig, TrainConfig
from vision_moe.train import run
from vision_moe.two_towers import join_towers

TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MLP = {**TOWER, "intermediate_size": 48}
SIZE = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words of Scenes' captions, [CLS] words [SEP], padded with [PAD]; 16 tokens."""
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "the", "of", "and", "red", "blue", "green", "circle", "square"]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="module")
def siglip_folder(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    vision = {**MLP, "image_size": 32, "patch_size": 8}
    config = SiglipConfig(vision_config=vision, text_config={**MLP, "vocab_size": 13, "max_position_embeddings": 16})
    model = SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(2.3026)
        model.logit_bias.fill_(-10.0)
    model.save_pretrained(folder)
    tokenizer.model_max_length = 16
    SiglipProcessor(image_processor=SiglipImageProcessor(size=SIZE), tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tower_folders(tokenizer, tmp_path_factory) -> tuple[Path, Path]:
    vision, text = tmp_path_factory.mktemp("dinov2"), tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**TOWER, mlp_ratio=2, image_size=32, patch_size=8)).save_pretrained(vision)
    ViTImageProcessor(size=SIZE).save_pretrained(vision)
    BertModel(BertConfig(**MLP, vocab_size=13, max_position_embeddings=24)).save_pretrained(text)
    tokenizer.model_max_length = int(1e30)
    tokenizer.save_pretrained(text)
    return vision, text


@pytest.fixture
def config_of(small_scenes, recipes, tmp_path) -> Callable[..., TrainConfig]:
    """A run of two steps a stage and two experts."""

    def config(*flags: str) -> TrainConfig:
        recipe = [str(recipes / "scenes.yaml"), str(recipes / "smoke.yaml")]
        fixed = ["--data.train", str(small_scenes), "--output", str(tmp_path / "run"), "--factor_pictures", "2"]
        experts = [f"--{part}.num_experts=2" for part in ("moe", "sparse_moe")]
        experts += [f"--{part}.num_experts_per_tok=1" for part in ("moe", "sparse_moe")]
        return parse(TrainConfig, [*recipe, *fixed, "--bf16", "false", *experts, *flags])

    return config


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def changed(start: Path, end: Path) -> set[str]:
    before, after = weights(start), weights(end)
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_siglip_goes_the_whole_road_with_its_own_loss(config_of, siglip_folder, small_scenes):
    found = run(config_of("--model", str(siglip_folder)))
    assert list(found) == ["dense", "direct", "sparse_upcycling", "mcl1", "dmu"]
    moe = AutoModel.from_pretrained(found["dmu"])
    assert type(moe) is SiglipMoEModel
    # The scale of recipes is InfoNCE's; a SigLIP keeps its own, and its bias.
    assert moe.logit_scale.item() == pytest.approx(2.3026)
    assert moe.logit_bias.item() == -10.0
    assert all("encoder.layers" in name and ".mlp.fc" in name for name in changed(found["dense"], found["mcl1"]))
    output = found["dmu"].parents[1]
    logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    first = next(entry["contrastive_loss"] for entry in logged if "contrastive_loss" in entry)
    # An untrained InfoNCE of 32 pairs is near log 32 = 3.5; the bias of -10 makes the sigmoid loss larger.
    assert first > 4.0
    used = utilization(moe, load_processor(found["dmu"]), open_captions(small_scenes, caption_field="long"), limit=8)
    assert used["towers"]["text"]["num_tokens"] == 8 * 16
    assert used["towers"]["vision"]["num_tokens"] == 8 * 16


def test_two_towers_are_aligned_unlocked_and_made_a_mixture(config_of, tower_folders, small_scenes):
    vision, text = tower_folders
    stage = "{samples: 64, warmup_steps: 0, learning_rate: 0.01}"
    towers = f"{{vision: {vision}, text: {text}, projection_dim: 16}}"
    found = run(config_of("--towers", towers, "--align", stage, "--align_trains", "projections"))
    align = found["dense"].parents[1] / "align" / "model"
    model, _ = join_towers(TowersConfig(vision=str(vision), text=str(text), projection_dim=16), seed=0)
    start = model.state_dict()
    aligned = AutoModel.from_pretrained(align).state_dict()
    moved = {name for name, tensor in start.items() if not torch.equal(tensor, aligned[name])}
    pooler = {"text_model.pooler.dense.weight", "text_model.pooler.dense.bias"}
    assert moved == {"visual_projection.weight", "text_projection.weight", "logit_scale", *pooler}
    unlocked = AutoModel.from_pretrained(found["dense"]).state_dict()
    still = {name for name, tensor in aligned.items() if torch.equal(tensor, unlocked[name])}
    # The rows of words that no caption has, and what transformers never uses.
    assert "vision_model.embeddings.mask_token" in still
    assert not [name for name in still if "weight" in name and ("layer." in name or "projection" in name)]
    moe = AutoModel.from_pretrained(found["dmu"])
    assert type(moe) is VisionTextDualEncoderMoEModel
    assert (moe.config.vision_config.model_type, moe.config.text_config.model_type) == ("dinov2_moe", "bert_moe")
    processor = load_processor(found["dmu"])
    assert processor.tokenizer.model_max_length == 24
    used = utilization(moe, processor, open_captions(small_scenes, caption_field="long"), limit=8)
    assert used["towers"]["vision"]["num_tokens"] == 8 * 17
    assert used["towers"]["text"]["num_tokens"] < 8 * 24


def test_a_start_is_one_thing_and_of_a_known_kind(config_of, tower_folders):
    vision, text = tower_folders
    with pytest.raises(ValueError, match="two starts"):
        TrainConfig(
            output=Path("x"),
            data=config_of().data,
            model="scenes-clip",
            towers=TowersConfig(vision=str(vision), text=str(text)),
        )
    with pytest.raises(ValueError, match=r"towers\.vision must be one of .*dinov2.*is a bert"):
        join_towers(TowersConfig(vision=str(text), text=str(text)), seed=0)
    with pytest.raises(ValueError, match=r"towers\.text must be one of .*bert.*is a dinov2"):
        join_towers(TowersConfig(vision=str(vision), text=str(vision)), seed=0)


def test_stretching_the_text_is_clips(config_of, siglip_folder):
    with pytest.raises(ValueError, match="leave it out for a siglip"):
        run(config_of("--model", str(siglip_folder), "--text_positions", "248"))
