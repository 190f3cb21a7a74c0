"""Patch dropout: which tokens stay, in which models and when, and that nothing else changes."""

import pytest
import torch

from vision_moe.patch_dropout import PatchDropoutCallback, drop_patches
from vision_moe.upcycle import upcycle


def test_class_tokens_stay_and_patches_are_drawn_for_each_picture_in_their_order():
    torch.manual_seed(0)
    # Token i of picture b holds (b, i).
    tokens = torch.stack(torch.meshgrid(torch.arange(50), torch.arange(11), indexing="ij"), dim=-1).float()
    kept = drop_patches(tokens, 0.9, num_class_tokens=1)
    assert kept.shape == (50, 2, 2)
    kept = drop_patches(tokens, 0.7, num_class_tokens=1)
    assert kept.shape == (50, 4, 2)
    assert torch.equal(kept[..., 0], tokens[:, :4, 0])
    assert (kept[:, 0, 1] == 0).all()
    assert (kept[:, 1:, 1].diff(dim=1) > 0).all()
    # Every patch is drawn for some picture, and pictures differ.
    assert set(kept[:, 1:, 1].flatten().tolist()) == set(range(1, 11))
    assert len({tuple(row) for row in kept[:, 1:, 1].tolist()}) > 20


def test_one_patch_at_least_stays():
    assert drop_patches(torch.zeros(2, 4, 3), 0.99, num_class_tokens=0).shape == (2, 1, 3)


@pytest.fixture
def lengths_and_texts(family_batch, family):
    """Runs a model; gives the length of the image tower's states, and the texts' embeddings."""

    def run(model):
        with torch.no_grad():
            outputs = model(**family_batch(family))
        return outputs.vision_model_output.last_hidden_state.shape[1], outputs.text_embeds

    return run


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_every_family_trains_on_fewer_patches_and_is_evaluated_on_all(make_family, family, lengths_and_texts, kind):
    model = make_family(family)
    model = upcycle(model, num_experts=4, num_experts_per_tok=2) if kind == "mixture" else model
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if family == "siglip2":
        with pytest.raises(ValueError, match="pictures of one size, which a siglip2"):
            PatchDropoutCallback(0.75, model)
        return
    whole, texts = lengths_and_texts(model.train())
    callback = PatchDropoutCallback(0.75, model)
    callback.on_train_begin(None, None, None)
    # 16 patches, and a class token everywhere but in SigLIP.
    assert lengths_and_texts(model)[0] == whole - 12
    assert torch.equal(lengths_and_texts(model)[1], texts)
    assert lengths_and_texts(model.eval())[0] == whole
    callback.on_train_end(None, None, None)
    assert lengths_and_texts(model.train())[0] == whole


def test_routers_count_the_patches_that_stay_and_the_same_text_tokens(make_family, family_batch):
    moe = upcycle(make_family("clip"), num_experts=4, num_experts_per_tok=2).train()
    whole = moe(**family_batch("clip"))
    PatchDropoutCallback(0.5, moe).on_train_begin(None, None, None)
    dropped = moe(**family_batch("clip"))
    dropped.aux_loss.backward()
    # Three pictures, 16 patches of which 8 stay, a class token, two choices each.
    assert whole.vision_model_output.tokens_per_expert.sum(dim=1).tolist() == [3 * 17 * 2] * 2
    assert dropped.vision_model_output.tokens_per_expert.sum(dim=1).tolist() == [3 * 9 * 2] * 2
    assert torch.equal(dropped.text_model_output.tokens_per_expert, whole.text_model_output.tokens_per_expert)


def test_one_tower_for_both_modalities_is_refused(make_limoe):
    with pytest.raises(ValueError, match="an image tower of its own"):
        PatchDropoutCallback(0.5, make_limoe())
