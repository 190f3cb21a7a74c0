"""Cached embeddings: equal to those without a cache, computed once, and never another model's."""

import numpy as np
import pytest
from PIL import Image

import vision_moe.embedding_cache as module
from vision_moe.embedding import embed_images, embed_texts
from vision_moe.embedding_cache import CachedEncoder

TEXTS = ["a red square", "a photo", "a blue square", "a photo", "one"]


class Plain:
    """Five plain pictures."""

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {"image": Image.new("RGB", (32, 32), (index * 50, 100, 0))}


@pytest.fixture
def encoded(monkeypatch):
    """Sizes of the chunks that were computed; chunks hold two rows."""
    sizes = []
    for name in ("embed_images", "embed_texts"):
        original = getattr(module, name)

        def spy(model, processor, data, original=original, **kwargs):
            sizes.append(len(data))
            return original(model, processor, data, **kwargs)

        monkeypatch.setattr(module, name, spy)
    monkeypatch.setattr(module, "_CHUNK", 2)
    return sizes


def test_rows_are_the_models_and_computed_once(tiny_clip, tiny_processor, tmp_path, encoded):
    first = CachedEncoder(tiny_clip, tiny_processor, tmp_path)
    images, texts = first.images(Plain(), "a"), first.texts(TEXTS)
    np.testing.assert_allclose(images, embed_images(tiny_clip, tiny_processor, Plain()), atol=1e-6)
    np.testing.assert_allclose(texts, embed_texts(tiny_clip, tiny_processor, TEXTS), atol=1e-6)
    assert np.array_equal(texts[1], texts[3])
    # Five pictures; four different texts.
    assert encoded == [2, 2, 1, 2, 2]
    again = CachedEncoder(tiny_clip, tiny_processor, tmp_path)
    assert np.array_equal(again.images(Plain(), "a"), images)
    assert np.array_equal(again.texts(TEXTS), texts)
    assert encoded == [2, 2, 1, 2, 2]


def test_only_chunks_that_are_missing_are_computed(tiny_clip, tiny_processor, tmp_path, encoded):
    images = CachedEncoder(tiny_clip, tiny_processor, tmp_path).images(Plain(), "a")
    (file,) = tmp_path.glob("*/chunk-000000002.safetensors")
    file.unlink()
    encoded.clear()
    assert np.array_equal(CachedEncoder(tiny_clip, tiny_processor, tmp_path).images(Plain(), "a"), images)
    assert encoded == [2]


def test_other_weights_settings_and_data_have_rows_of_their_own(tiny_clip, tiny_processor, tmp_path, encoded):
    def folders():
        CachedEncoder(tiny_clip, tiny_processor, tmp_path).images(Plain(), "a")
        return len(list(tmp_path.iterdir()))

    assert folders() == 1
    CachedEncoder(tiny_clip, tiny_processor, tmp_path).images(Plain(), "b")
    assert folders() == 2
    tiny_clip.visual_projection.weight.data[0, 0] += 1
    assert folders() == 3
    tiny_clip.config.vision_config.layer_norm_eps = 0.1
    assert folders() == 4
    assert encoded == [2, 2, 1] * 4


def test_without_a_folder_nothing_is_written(tiny_clip, tiny_processor, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CachedEncoder(tiny_clip, tiny_processor).images(Plain(), "a").shape == (5, 16)
    assert not list(tmp_path.iterdir())


def test_no_text_is_an_error(tiny_clip, tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="no text"):
        CachedEncoder(tiny_clip, tiny_processor, tmp_path).texts([])
