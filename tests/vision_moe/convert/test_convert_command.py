"""`python -m vision_moe.convert`: what it writes can be used, and what it cannot know it asks for."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPImageProcessor, CLIPModel

from vision_moe.convert.__main__ import convert, main
from vision_moe.convert.official import to_official
from vision_moe.convert.processor import image_processor, openai_tokenizer
from vision_moe.convert.state_file import read_state, write_state
from vision_moe.model import CLIPMoEModel

CAPTIONS = [
    "a photo of a cat",
    "A Red Square,  two blue circles & 3 dogs!",
    "it's the neighbour's: don't touch — 12,345 times",
    "naïve café 東京 🙂",
    "",
    "a very long caption " * 40,
]
CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def open_clip():
    return pytest.importorskip("open_clip", reason="the extra open_clip is not installed")


@pytest.fixture(scope="module")
def dense(open_clip):
    torch.manual_seed(0)
    return open_clip.CLIP(**CONFIG, quick_gelu=True).eval()


@pytest.fixture(scope="module")
def folder(dense, tmp_path_factory):
    """A hub folder as open_clip writes it."""
    folder = tmp_path_factory.mktemp("open_clip")
    save_file(dense.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.2, 0.2],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    settings = {"model_cfg": {**CONFIG, "quick_gelu": True}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("length", [77, 248])
def test_token_ids_are_open_clips(open_clip, tmp_path, length):
    tokenizer = openai_tokenizer(length)
    tokenizer.save_pretrained(tmp_path)
    expected = open_clip.SimpleTokenizer(context_length=length)(CAPTIONS)
    for made in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = made(CAPTIONS, truncation=True, padding="max_length", return_tensors="pt")
        # open_clip pads with 0, OpenAI's tokenizer in transformers with the end token.
        assert torch.equal(ids["input_ids"] * ids["attention_mask"], expected)


def test_an_open_clip_folder_becomes_a_folder_for_auto_classes(open_clip, dense, folder, tmp_path):
    convert(str(folder), tmp_path / "out")
    model, processor = (
        AutoModel.from_pretrained(tmp_path / "out").eval(),
        AutoProcessor.from_pretrained(tmp_path / "out"),
    )
    assert type(model) is CLIPModel
    assert list(processor.image_processor.image_mean) == [0.4, 0.5, 0.6]
    picture = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    inputs = processor(images=picture, text=CAPTIONS[:2], padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    with torch.no_grad():
        found = model.get_text_features(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).pooler_output
        expected = dense.encode_text(open_clip.SimpleTokenizer()(CAPTIONS[:2]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_dense_state_dict_is_read_with_open_clips_configuration_of_its_name(open_clip, dense, tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny-for-a-test.json").write_text(json.dumps({**CONFIG, "quick_gelu": True}))
    open_clip.add_model_config(tmp_path / "configs")
    write_state(dense.state_dict(), tmp_path / "dense.pt")
    convert(str(tmp_path / "dense.pt"), tmp_path / "out", open_clip_name="tiny-for-a-test")
    vision = AutoModel.from_pretrained(tmp_path / "out").config.vision_config
    assert (vision.num_attention_heads, vision.hidden_act) == (2, "quick_gelu")


def test_there_and_back_is_the_same_file(dense, folder, tmp_path):
    convert(str(folder), tmp_path / "ours")
    convert(str(tmp_path / "ours"), tmp_path / "back.safetensors")
    expected, found = dense.state_dict(), load_file(tmp_path / "back.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_image_size_reaches_config_and_processor(folder, tmp_path, monkeypatch):
    convert(str(folder), tmp_path / "first")
    monkeypatch.setattr(sys, "argv", ["convert", str(tmp_path / "first"), str(tmp_path / "second"), "--image-size=64"])
    main()
    model = AutoModel.from_pretrained(tmp_path / "second")
    assert model.config.vision_config.image_size == 64
    processor = CLIPImageProcessor.from_pretrained(tmp_path / "second")
    pixels = processor(torch.randint(0, 256, (3, 50, 90), dtype=torch.uint8), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 64, 64)
    assert list(processor.image_mean) == [0.4, 0.5, 0.6]
    assert model.get_image_features(pixel_values=pixels).pooler_output.shape == (1, 16)


def test_an_official_checkpoint_is_converted_both_ways(make_official_like, tmp_path, caplog):
    state = to_official(make_official_like())
    write_state(state, tmp_path / "moe.pt")
    convert(str(tmp_path / "moe.pt"), tmp_path / "ours", num_experts_per_tok=2)
    assert "no tokenizer is written: the vocabulary has 40 tokens" in caplog.text
    assert isinstance(AutoModel.from_pretrained(tmp_path / "ours"), CLIPMoEModel)
    assert CLIPImageProcessor.from_pretrained(tmp_path / "ours").crop_size["height"] == 16
    convert(str(tmp_path / "ours"), tmp_path / "back.pt")
    back = read_state(tmp_path / "back.pt")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_what_files_do_not_tell_is_asked_for(make_official_like, dense, tmp_path):
    write_state(to_official(make_official_like()), tmp_path / "moe.pt")
    write_state(dense.state_dict(), tmp_path / "dense.pt")
    with pytest.raises(ValueError, match="official CLIP-MoE state dict and needs --num-experts-per-tok"):
        convert(str(tmp_path / "moe.pt"), tmp_path / "out")
    with pytest.raises(ValueError, match="dense state dict and needs --open-clip-name"):
        convert(str(tmp_path / "dense.pt"), tmp_path / "out")
    with pytest.raises(ValueError, match="--num-experts-per-tok is for an official"):
        convert(str(tmp_path / "dense.pt"), tmp_path / "out", num_experts_per_tok=2, open_clip_name="ViT-B-32")
    with pytest.raises(ValueError, match=r"open_clip has no model 'ViT-B-33'; it has .*ViT-B-32"):
        convert(str(tmp_path / "dense.pt"), tmp_path / "out", open_clip_name="ViT-B-33")
    with pytest.raises(ValueError, match=r"width 768 .* 32"):
        convert(str(tmp_path / "dense.pt"), tmp_path / "out", open_clip_name="ViT-B-32")
    assert not (tmp_path / "out").exists()


def test_a_transformers_folder_needs_something_to_do(folder, tmp_path):
    convert(str(folder), tmp_path / "ours")
    with pytest.raises(ValueError, match="a transformers model already"):
        convert(str(tmp_path / "ours"), tmp_path / "again")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_state_dict_survives_its_file(tmp_path, suffix):
    state = {"a": torch.randn(3, 2).T, "b": torch.tensor(1.0)}
    write_state(state, tmp_path / f"s{suffix}")
    found = read_state(tmp_path / f"s{suffix}")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)
    assert [path.name for path in tmp_path.iterdir()] == [f"s{suffix}"]


def test_a_training_checkpoint_of_open_clip_is_opened(tmp_path):
    torch.save({"epoch": 3, "name": "run", "state_dict": {"module.a": torch.ones(2)}}, tmp_path / "epoch_3.pt")
    assert list(read_state(tmp_path / "epoch_3.pt")) == ["a"]


def test_programs_and_objects_are_not_opened(tmp_path):
    class Harmful:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    torch.save({"a": Harmful()}, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_state(tmp_path / "pickle.pt")
    assert not (tmp_path / "written").exists()
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "jit.pt")
    with pytest.raises(ValueError, match="TorchScript archive"):
        read_state(tmp_path / "jit.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds no state dict, but a list"):
        read_state(tmp_path / "list.pt")


def test_squashed_pictures_are_not_cropped():
    picture = torch.zeros(3, 20, 60, dtype=torch.uint8)
    picture[:, :, :20] = 255
    squashed = image_processor(12, {"resize_mode": "squash", "interpolation": "bilinear"})(picture, return_tensors="pt")
    cropped = image_processor(12)(picture, return_tensors="pt")
    assert squashed["pixel_values"].shape == cropped["pixel_values"].shape == (1, 3, 12, 12)
    # The bright third is in the squashed picture and was cropped off the other.
    assert squashed["pixel_values"][0, 0, 6, 1] > cropped["pixel_values"][0, 0, 6, 1] + 1
    with pytest.raises(ValueError, match="resize_mode must be shortest or squash"):
        image_processor(12, {"resize_mode": "longest"})
