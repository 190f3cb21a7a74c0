"""Embedding, retrieval and factors end to end with a tiny random CLIP."""

import numpy as np
import pytest
import torch
from PIL import Image

from vision_moe.embedding import embed_images, embed_texts
from vision_moe.factors import factor_accuracy, is_nearest
from vision_moe.recipe import ScratchConfig
from vision_moe.retrieval import embed, retrieval
from vision_moe.scratch import build_clip

COLORS = ["red", "green", "blue", "white", "black"]


class Pictures:
    """Five plain pictures with two captions each, one of which all share."""

    def __init__(self, variants=True):
        self.variants = variants

    def __len__(self):
        return len(COLORS)

    def __getitem__(self, index):
        return {"image": Image.new("RGB", (32, 32), COLORS[index]), "index": index}

    def captions(self, index):
        return [f"a {COLORS[index]} picture", "a picture"]

    def metadata(self, index):
        others = [color for color in COLORS if color != COLORS[index]]
        texts = [f"a {color} picture" for color in [COLORS[index], *others]]
        return {"variants": {"color": texts}} if self.variants else {}


@pytest.fixture(scope="module")
def clip():
    config = ScratchConfig(
        image_size=32,
        patch_size=16,
        hidden_size=32,
        num_vision_layers=2,
        num_text_layers=2,
        num_heads=2,
        projection_dim=16,
        max_text_tokens=12,
        vocab_size=300,
    )
    model, processor = build_clip(config, [f"a {color} picture" for color in COLORS], seed=0)
    return model.eval(), processor


def test_embeddings_equal_the_models_own(clip):
    model, processor = clip
    embeddings = embed(model, processor, Pictures(), batch_size=2)
    texts = [text for index in range(5) for text in Pictures().captions(index)]
    inputs = processor(images=[Pictures()[i]["image"] for i in range(5)], text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    np.testing.assert_allclose(embeddings.image, output.image_embeds, atol=1e-5)
    np.testing.assert_allclose(embeddings.text, output.text_embeds, atol=1e-5)
    assert embeddings.image_of_text.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


def test_equal_texts_get_equal_embeddings_whatever_their_batch(clip):
    texts = ["a picture", "a red picture", "a picture", "a blue picture", "a picture"]
    rows = embed_texts(*clip, texts, batch_size=1)
    assert np.array_equal(rows[0], rows[2])
    assert np.array_equal(rows[0], rows[4])
    np.testing.assert_allclose(rows, embed_texts(*clip, texts, batch_size=5), atol=1e-6)


def test_embedding_restores_the_training_mode(clip):
    model, processor = clip
    model.train()
    embed_images(model, processor, Pictures())
    assert model.training
    model.eval()


def test_an_embedding_that_is_not_finite_is_an_error(clip):
    model, processor = clip
    weight = model.visual_projection.weight
    kept = weight.detach().clone()
    try:
        weight.data.fill_(float("nan"))
        with pytest.raises(ValueError, match="not finite"):
            embed_images(model, processor, Pictures())
    finally:
        weight.data.copy_(kept)


def test_retrieval_counts_shared_captions(clip):
    result = retrieval(*clip, Pictures())
    assert result["num_captions"] == 10
    assert result["num_distinct_captions"] == 6


def test_factor_accuracy_is_the_share_of_pictures_nearest_to_the_truth(clip):
    model, processor = clip
    result = factor_accuracy(model, processor, Pictures())
    image = embed_images(model, processor, Pictures())
    text = embed_texts(model, processor, [f"a {color} picture" for color in COLORS])
    hits = sum(int((image @ text.T)[i].argmax() == i) for i in range(5))
    assert result["color"]["accuracy"] == hits / 5
    assert result["color"]["n"] == 5
    assert result["color"]["chance"] == pytest.approx(1 / 5)
    low, high = result["color"]["interval"]
    assert low <= hits / 5 <= high


def test_factor_accuracy_can_be_limited(clip):
    assert factor_accuracy(*clip, Pictures(), limit=2)["color"]["n"] == 2


def test_a_tie_with_a_false_caption_is_a_miss():
    image = np.array([1.0, 0.0], dtype=np.float32)
    truth, other = np.array([0.6, 0.8], dtype=np.float32), np.array([0.0, 1.0], dtype=np.float32)
    assert is_nearest(image, np.stack([truth, other]))
    assert not is_nearest(image, np.stack([truth, other, truth]))
    assert not is_nearest(image, np.stack([other, truth]))


def test_data_without_variants_is_an_error(clip):
    with pytest.raises(ValueError, match="variants"):
        factor_accuracy(*clip, Pictures(variants=False))
