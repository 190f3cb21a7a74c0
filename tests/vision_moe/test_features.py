"""Cached features: what they are, and what happens to the cache when a run is killed or the model changes."""

import pytest
import torch

from vision_moe.data import CaptionCollator, open_captions
from vision_moe.features import extract_features, weights_fingerprint


@pytest.fixture
def dataset(tmp_path, write_shard):
    colors = ["red", "blue", "red square", "blue square"]
    captions = [[f"one {color}", f"two {color}"] for color in colors for _ in range(3)][:11]
    write_shard(tmp_path / "train-0000.tar", {f"k{i:02d}": {"captions": c} for i, c in enumerate(captions)})
    return open_captions(tmp_path)


@pytest.fixture
def extract(tiny_clip, dataset, tiny_processor, tmp_path):
    """extract_features in chunks of 4 and batches of 3, so 3 + 1, 3 + 1, 3 rows."""

    def run(**overrides):
        kwargs = {"cache_dir": tmp_path / "features", "batch_size": 3, "chunk_size": 4, "fingerprint": "a"}
        return extract_features(tiny_clip, dataset, tiny_processor, **{**kwargs, **overrides})

    return run


@pytest.fixture
def encoded(tiny_clip, monkeypatch):
    """Sizes of the image batches that the model has encoded."""
    sizes = []
    original = tiny_clip.get_image_features

    def spy(pixel_values):
        sizes.append(len(pixel_values))
        return original(pixel_values=pixel_values)

    monkeypatch.setattr(tiny_clip, "get_image_features", spy)
    return sizes


def test_features_are_the_models_embeddings_in_order(extract, tiny_clip, dataset, tiny_processor):
    features = extract()
    with torch.no_grad():
        batch = CaptionCollator(tiny_processor)([dataset[i] for i in range(len(dataset))])
        batch.pop("index")
        output = tiny_clip(**batch)
    torch.testing.assert_close(features.image_ND, output.image_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.text_ND, output.text_embeds, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.image_ND.norm(dim=-1), torch.ones(11))
    assert features.image_ND.dtype == features.text_ND.dtype == torch.float32


def test_killed_run_goes_on_after_its_last_whole_chunk(extract, tiny_clip, encoded, monkeypatch, tmp_path):
    expected = extract(cache_dir=tmp_path / "whole")
    encoded.clear()
    text = tiny_clip.get_text_features

    def killed(**inputs):
        if len(encoded) == 4:
            raise KeyboardInterrupt
        return text(**inputs)

    monkeypatch.setattr(tiny_clip, "get_text_features", killed)
    with pytest.raises(KeyboardInterrupt):
        extract()
    # The rows of the second chunk were in memory only.
    assert [path.name for path in (tmp_path / "features").glob("chunk*")] == ["chunk-000000000.safetensors"]
    encoded.clear()
    monkeypatch.setattr(tiny_clip, "get_text_features", text)
    features = extract()
    assert encoded == [3, 1, 3]
    assert torch.equal(features.image_ND, expected.image_ND)
    assert torch.equal(features.text_ND, expected.text_ND)


def test_finished_cache_is_reused(extract, encoded):
    first = extract()
    assert encoded == [3, 1, 3, 1, 3]
    again = extract()
    assert encoded == [3, 1, 3, 1, 3]
    assert torch.equal(again.image_ND, first.image_ND)
    assert torch.equal(again.text_ND, first.text_ND)


@pytest.mark.parametrize("change", [{"fingerprint": "b"}, {"chunk_size": 5}])
def test_other_identity_recomputes_everything(extract, encoded, change, tmp_path):
    first = extract()
    encoded.clear()
    again = extract(**change)
    assert sum(encoded) == 11
    torch.testing.assert_close(again.image_ND, first.image_ND)
    # Nothing of the old features stays behind.
    assert len(list((tmp_path / "features").iterdir())) == 4


def test_model_keeps_its_mode(extract, tiny_clip):
    tiny_clip.train()
    extract()
    assert tiny_clip.training


def test_autocast_and_workers_give_the_same_to_bfloat16_precision(extract):
    exact = extract()
    low = extract(fingerprint="b", autocast_dtype=torch.bfloat16, num_workers=1)
    torch.testing.assert_close(low.image_ND, exact.image_ND, rtol=0.05, atol=0.02)
    assert not torch.equal(low.image_ND, exact.image_ND)
    assert low.image_ND.dtype == torch.float32


def test_diverged_model_is_refused(extract, tiny_clip):
    tiny_clip.visual_projection.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="diverged"):
        extract()


def test_weights_fingerprint_changes_with_any_weight(tiny_clip):
    before = weights_fingerprint(tiny_clip)
    assert weights_fingerprint(tiny_clip) == before
    tiny_clip.text_projection.weight.data[0, 0] += 1e-6
    assert weights_fingerprint(tiny_clip) != before
    tiny_clip.text_projection.weight.data[0, 0] -= 1e-6
    assert weights_fingerprint(tiny_clip.half()) != before
