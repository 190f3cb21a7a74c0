"""The small dense CLIP that is built here."""

import pytest
import torch

from vision_moe.recipe import ScratchConfig
from vision_moe.scratch import build_clip, sincos_positions, train_tokenizer

CAPTIONS = ["A red star.", "Two blue hearts on the grass.", "The circle is green."] * 4


def test_a_caption_is_read_to_its_end():
    # transformers takes an end token of id 2 for a mistake of old configs, and then reads a caption up to its token of
    # the highest id, wherever that stands.
    config = ScratchConfig(
        image_size=16, patch_size=8, hidden_size=16, num_vision_layers=1, num_text_layers=1, num_heads=2
    )
    captions = ["on a gray background there are three stars", "a gray star on the left", "a red star on the right"]
    model, processor = build_clip(config, captions, seed=0)
    batch = processor.tokenizer(captions, padding=True, return_tensors="pt")
    output = model.text_model(**batch)
    ends_B = (batch["input_ids"] == processor.tokenizer.eos_token_id).int().argmax(dim=1)
    assert torch.equal(output.pooler_output, output.last_hidden_state[torch.arange(3), ends_B])


def test_tokenizer_frames_captions_and_gives_them_back():
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=300, max_text_tokens=16)
    ids = tokenizer("Two blue hearts")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "two blue hearts"
    # Bytes that no caption holds are words too.
    assert tokenizer.decode(tokenizer("naïve ☃")["input_ids"], skip_special_tokens=True).strip() == "naïve ☃"


def test_sincos_positions_by_hand():
    positions_PD = sincos_positions(3, 4)
    # One frequency, 1: sine and cosine of the row, then of the column.
    for row in range(3):
        for column in range(3):
            angles = torch.tensor([row, column]).float()
            expected = torch.stack([angles[0].sin(), angles[0].cos(), angles[1].sin(), angles[1].cos()])
            torch.testing.assert_close(positions_PD[3 * row + column], expected)
    with pytest.raises(ValueError, match="multiple of 4, but got 6"):
        sincos_positions(3, 6)


def test_equal_seeds_give_equal_models_and_the_recipe_its_sizes():
    config = ScratchConfig(hidden_size=32, num_vision_layers=2, num_text_layers=1, num_heads=2, projection_dim=16)
    first, processor = build_clip(config, CAPTIONS, seed=3)
    second, _ = build_clip(config, CAPTIONS, seed=3)
    other, _ = build_clip(config, CAPTIONS, seed=4)
    state = first.state_dict()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in state.items())
    assert not torch.equal(state["visual_projection.weight"], other.state_dict()["visual_projection.weight"])
    assert first.config.vision_config.num_hidden_layers == 2
    assert first.config.text_config.eos_token_id == processor.tokenizer.eos_token_id
    positions_PD = first.vision_model.embeddings.position_embedding.weight
    assert torch.equal(positions_PD[1:], sincos_positions(8, 32))


def test_a_caption_is_embedded_at_its_end_token_whatever_the_padding():
    config = ScratchConfig(hidden_size=32, num_vision_layers=1, num_text_layers=2, num_heads=2, projection_dim=16)
    model, processor = build_clip(config, CAPTIONS, seed=0)
    model.eval()
    alone = processor.tokenizer(["A red star."], return_tensors="pt")
    padded = processor.tokenizer(["A red star.", CAPTIONS[1]], padding=True, return_tensors="pt")
    with torch.no_grad():
        one = model.get_text_features(**alone).pooler_output[0]
        two = model.get_text_features(**padded).pooler_output[0]
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
