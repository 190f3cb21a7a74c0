"""router_from_centroids: rows, padding, and that an upcycled model still computes what its parent does."""

import pytest
import torch
from torch.nn.functional import normalize

from vision_moe.cluster import kmeans
from vision_moe.moe.router import Router
from vision_moe.router_init import router_from_centroids
from vision_moe.upcycle import upcycle


def test_rows_are_the_unit_centroids_of_the_routers_valid_inputs(make_dense_clip, clip_batch):
    moe = upcycle(make_dense_clip(0), num_experts=3)
    router_from_centroids(moe, [clip_batch], seed=4)
    layer, normed = moe.text_model.encoder.layers[1], []
    layer.layer_norm2.register_forward_hook(lambda module, args, output: normed.append(output))
    with torch.no_grad():
        moe(**clip_batch)
    inputs_TD = normalize(normed[0][clip_batch["attention_mask"].bool()], dim=-1)
    expected = normalize(kmeans(inputs_TD, 3, seed=4).centroids_KD, dim=-1)
    torch.testing.assert_close(layer.mlp.router.weight, expected)
    for router in (module for module in moe.modules() if isinstance(module, Router)):
        torch.testing.assert_close(router.weight.norm(dim=-1), torch.ones(3))
        assert not router._forward_pre_hooks


@pytest.mark.parametrize(
    ("fields", "experts_per_cluster"),
    [({"num_experts": 4}, 1), ({"num_experts": 6, "num_experts_per_tok": 2, "expert_width_factor": 0.5}, 2)],
    ids=["whole experts", "narrow experts"],
)
def test_an_upcycled_model_still_computes_what_its_parent_does(
    make_dense_clip, clip_batch, fields, experts_per_cluster
):
    dense = make_dense_clip(0)
    moe = upcycle(dense, **fields)
    router_from_centroids(moe, [clip_batch], experts_per_cluster=experts_per_cluster)
    with torch.no_grad():
        expected, actual = dense(**clip_batch), moe(**clip_batch)
    torch.testing.assert_close(actual.logits_per_image, expected.logits_per_image, rtol=1e-5, atol=1e-5)


def test_only_the_first_tokens_are_clustered_and_the_mode_is_kept(make_dense_clip, clip_batch):
    moe = upcycle(make_dense_clip(0), num_experts=2).train()
    seen = []

    def batches():
        while True:
            seen.append(1)
            yield clip_batch

    router_from_centroids(moe, batches(), tokens_per_router=60)
    # 51 picture tokens and 23 text tokens a batch.
    assert len(seen) == 3
    assert moe.training


def test_impossible_requests_are_refused(make_dense_clip, clip_batch):
    with pytest.raises(ValueError, match="CLIPModel has no router"):
        router_from_centroids(make_dense_clip(0), [clip_batch])
    with pytest.raises(ValueError, match="multiple of experts_per_cluster, but got 4 with 3"):
        router_from_centroids(upcycle(make_dense_clip(0)), [clip_batch], experts_per_cluster=3)
    with pytest.raises(ValueError, match="saw 2 tokens, fewer than its 4 clusters"):
        router_from_centroids(upcycle(make_dense_clip(0)), [clip_batch], tokens_per_router=2)
