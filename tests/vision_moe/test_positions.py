"""Long-CLIP's stretching of text positions."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from vision_moe.positions import stretch_positions, stretch_text


def test_77_rows_become_248_by_the_formula():
    torch.manual_seed(0)
    p = torch.randn(77, 4, dtype=torch.float64)
    stretched = stretch_positions(p)
    assert stretched.shape == (248, 4)
    assert torch.equal(stretched[:20], p[:20])
    for i in range(56):
        for r in range(4):
            expected = (1 - r / 4) * p[i + 20] + (r / 4) * p[i + 21]
            torch.testing.assert_close(stretched[4 * i + 20 + r], expected, rtol=0, atol=1e-12)
    for r in range(4):
        torch.testing.assert_close(stretched[244 + r], p[76] + r / 4 * (p[76] - p[75]), rtol=0, atol=1e-12)


def test_too_few_positions_are_refused():
    with pytest.raises(ValueError, match="20"):
        stretch_positions(torch.zeros(20, 2))


def _clip() -> CLIPModel:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 40, "max_position_embeddings": 77, "eos_token_id": 3}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def test_a_stretched_model_takes_248_tokens_and_survives_saving(tmp_path):
    model = stretch_text(_clip(), 248)
    model.save_pretrained(tmp_path)
    again = CLIPModel.from_pretrained(tmp_path).eval()
    ids = torch.randint(4, 40, (2, 248))
    ids[:, -1] = 3
    with torch.no_grad():
        first, second = (m.get_text_features(input_ids=ids).pooler_output for m in (model, again))
    assert torch.equal(first, second)


def test_short_texts_keep_their_embeddings():
    model = _clip()
    ids = torch.randint(4, 40, (2, 20))
    ids[:, -1] = 3
    with torch.no_grad():
        before = model.get_text_features(input_ids=ids).pooler_output
        after = stretch_text(model, 248).get_text_features(input_ids=ids).pooler_output
    torch.testing.assert_close(before, after)


def test_a_length_that_stretching_does_not_give_is_refused():
    with pytest.raises(ValueError, match=r"77 .* or 248"):
        stretch_text(_clip(), 128)
