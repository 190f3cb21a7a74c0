"""Long-CLIP's stretching of text positions, and image positions of another resolution."""

import math

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from vision_moe.positions import interpolate_positions, resize_image, stretch_positions, stretch_text
from vision_moe.upcycle import upcycle


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_77_rows_become_248_bit_for_bit_by_the_formula(dtype):
    torch.manual_seed(0)
    p = torch.randn(77, 4).to(dtype)
    stretched = stretch_positions(p)
    assert stretched.shape == (248, 4)
    assert stretched.dtype == dtype
    assert torch.equal(stretched[:20], p[:20])
    for i in range(56):
        for r in range(4):
            assert torch.equal(stretched[4 * i + 20 + r], (1 - r / 4) * p[i + 20] + (r / 4) * p[i + 21])
    for r in range(4):
        assert torch.equal(stretched[244 + r], p[76] + r / 4 * (p[76] - p[75]))


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


def _cubic(distance):
    """Keys' cubic convolution with a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def _resized_row(row, size):
    """One line of pixels by the formula; pixels beyond the border are the border's."""
    result = []
    for i in range(size):
        at = (i + 0.5) * len(row) / size - 0.5
        taps = range(math.floor(at) - 1, math.floor(at) + 3)
        result.append(sum(_cubic(at - tap) * row[min(max(tap, 0), len(row) - 1)] for tap in taps))
    return result


@pytest.mark.parametrize(("side", "size"), [(3, 5), (4, 2), (2, 2), (1, 3)])
def test_image_positions_are_resized_by_cubic_convolution(side, size):
    torch.manual_seed(0)
    positions = torch.randn(1 + side * side, 2)
    resized = interpolate_positions(positions, size)
    assert torch.equal(resized[0], positions[0])
    for channel in range(2):
        grid = positions[1:, channel].reshape(side, side).double().tolist()
        rows = [_resized_row(row, size) for row in grid]
        columns = [_resized_row(list(column), size) for column in zip(*rows, strict=True)]
        expected = torch.tensor(columns).T.flatten()
        torch.testing.assert_close(resized[1:, channel], expected.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [_clip, lambda: upcycle(_clip(), num_experts=2)], ids=["dense", "moe"])
@pytest.mark.parametrize("size", [16, 64])
def test_a_resized_model_computes_what_interpolation_on_the_fly_does(make, size, tmp_path):
    model = make()
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True).pooler_output
        resized = resize_image(model, size).get_image_features(pixel_values=pixels).pooler_output
        assert model.config.vision_config.image_size == size
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval().get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(resized, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(again, resized)


def test_the_size_that_it_has_changes_nothing():
    model = _clip()
    before = model.vision_model.embeddings.position_embedding
    assert resize_image(model, 32).vision_model.embeddings.position_embedding is before


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of the patch size 16, but got 40"):
        resize_image(_clip(), 40)
    with pytest.raises(ValueError, match="1 \\+ a square number of rows, but got 13"):
        interpolate_positions(torch.zeros(13, 2), 2)
