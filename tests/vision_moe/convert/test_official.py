"""Official CLIP-MoE checkpoints: a forward written here from the method's description computes what our model does."""

import math

import pytest
import torch
from torch.nn.functional import conv2d, layer_norm, linear
from transformers import AutoModel

from vision_moe.convert.names import read_blocks
from vision_moe.convert.official import from_official, to_official
from vision_moe.model import CLIPMoEConfig, CLIPMoEModel

WIDTH, NUM_EXPERTS, TOP_K, VOCAB, LENGTH, PATCH = 128, 4, 2, 60, 24, 8


def normal(*shape):
    return 0.1 * torch.randn(*shape)


def block(moe):
    tensors = {"attn.in_proj_weight": normal(3 * WIDTH, WIDTH), "attn.in_proj_bias": normal(3 * WIDTH)}
    tensors |= {"attn.out_proj.weight": normal(WIDTH, WIDTH), "attn.out_proj.bias": normal(WIDTH)}
    for norm in ("ln_1", "ln_2"):
        tensors |= {f"{norm}.weight": 1 + normal(WIDTH), f"{norm}.bias": normal(WIDTH)}
    for mlp in [f"experts.{expert}" for expert in range(NUM_EXPERTS)] if moe else ["mlp"]:
        tensors |= {f"{mlp}.c_fc.weight": normal(4 * WIDTH, WIDTH), f"{mlp}.c_fc.bias": normal(4 * WIDTH)}
        tensors |= {f"{mlp}.c_proj.weight": normal(WIDTH, 4 * WIDTH), f"{mlp}.c_proj.bias": normal(WIDTH)}
    if moe:
        tensors["gate.weight"] = 3 * normal(NUM_EXPERTS, WIDTH)
    return tensors


def make_state(moe_layers=2, equal_tables=False):
    """Keys and shapes of the released checkpoints, of 2 + 2 blocks and 32 pixels."""
    torch.manual_seed(0)
    state = {
        "logit_scale": torch.tensor(4.60517),
        "token_embedding.weight": normal(VOCAB, WIDTH),
        "positional_embedding": normal(LENGTH, WIDTH),
        "positional_embedding_res": normal(LENGTH, WIDTH),
        "text_projection": normal(WIDTH, 96),
        "visual.class_embedding": normal(WIDTH),
        "visual.positional_embedding": normal(17, WIDTH),
        "visual.conv1.weight": normal(WIDTH, 3, PATCH, PATCH),
        "visual.proj": normal(WIDTH, 96),
    }
    if equal_tables:
        state["positional_embedding_res"] = state["positional_embedding"].clone()
    for norm in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        state |= {f"{norm}.weight": 1 + normal(WIDTH), f"{norm}.bias": normal(WIDTH)}
    for tower in ("visual.transformer", "transformer"):
        for layer in range(2):
            moe = layer >= 2 - moe_layers
            state |= {f"{tower}.resblocks.{layer}.{name}": value for name, value in block(moe).items()}
    return state


def norm(x, state, name):
    return layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])


def mlp(x, state, name):
    hidden = linear(x, state[f"{name}.c_fc.weight"], state[f"{name}.c_fc.bias"])
    return linear(hidden * torch.sigmoid(1.702 * hidden), state[f"{name}.c_proj.weight"], state[f"{name}.c_proj.bias"])


def mixture(x, state, name):
    gates = torch.softmax(x @ state[f"{name}.gate.weight"].T, dim=-1)
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            chosen = gates[b, t].argsort(descending=True)[:TOP_K]
            for expert in chosen.tolist():
                share = gates[b, t, expert] / gates[b, t, chosen].sum()
                out[b, t] += share * mlp(x[b, t], state, f"{name}.experts.{expert}")
    return out


def attention(x, state, name, mask):
    batch, length, _ = x.shape
    thirds = linear(x, state[f"{name}.in_proj_weight"], state[f"{name}.in_proj_bias"]).split(WIDTH, dim=-1)
    q, k, v = (part.view(batch, length, WIDTH // 64, 64).transpose(1, 2) for part in thirds)
    weights = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(64) + mask, dim=-1)
    out = (weights @ v).transpose(1, 2).reshape(batch, length, WIDTH)
    return linear(out, state[f"{name}.out_proj.weight"], state[f"{name}.out_proj.bias"])


def run_blocks(x, state, tower, mask):
    for layer in range(2):
        name = f"{tower}.resblocks.{layer}"
        x = x + attention(norm(x, state, f"{name}.ln_1"), state, f"{name}.attn", mask)
        part = mixture if f"{name}.gate.weight" in state else mlp
        where = name if part is mixture else f"{name}.mlp"
        x = x + part(norm(x, state, f"{name}.ln_2"), state, where)
    return x


def official_logits(state, pixels, ids):
    patches = conv2d(pixels, state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    token = state["visual.class_embedding"].expand(len(pixels), 1, WIDTH)
    x = norm(torch.cat([token, patches], dim=1) + state["visual.positional_embedding"], state, "visual.ln_pre")
    x = run_blocks(x, state, "visual.transformer", torch.zeros(17, 17))
    image = norm(x[:, 0], state, "visual.ln_post") @ state["visual.proj"]

    positions = torch.cat([state["positional_embedding"][:20], state["positional_embedding_res"][20:]])
    x = state["token_embedding.weight"][ids] + positions
    x = run_blocks(x, state, "transformer", torch.full((LENGTH, LENGTH), -torch.inf).triu(1))
    x = norm(x, state, "ln_final")
    text = x[torch.arange(len(ids)), ids.argmax(dim=-1)] @ state["text_projection"]

    image, text = (features / features.norm(dim=-1, keepdim=True) for features in (image, text))
    return state["logit_scale"].exp() * image @ text.T


@pytest.fixture(scope="module")
def batch():
    """Two pictures, and captions of 24, 21 and 4 tokens, which read rows of both position tables."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCAB - 2, (3, LENGTH), generator=generator)
    ids[:, 0] = VOCAB - 2
    for row, length in enumerate((LENGTH, 21, 4)):
        ids[row, length - 1] = VOCAB - 1
        ids[row, length:] = 0
    return torch.randn(2, 3, 32, 32, generator=generator), ids


@pytest.mark.parametrize("moe_layers", [2, 1])
def test_logits_are_those_of_the_official_forward(batch, moe_layers):
    pixels, ids = batch
    state = make_state(moe_layers)
    model = from_official(state, num_experts_per_tok=TOP_K)
    with torch.no_grad():
        found = model(pixel_values=pixels, input_ids=ids).logits_per_image
        expected = official_logits(state, pixels, ids)
    # Logits of ln 100 = 4.6 are up to 100.
    torch.testing.assert_close(found / 100, expected / 100, rtol=0, atol=1e-5)


def test_padding_that_is_masked_changes_no_logit(batch):
    pixels, ids = batch
    state = make_state()
    with torch.no_grad():
        model = from_official(state, num_experts_per_tok=TOP_K)
        found = model(pixel_values=pixels, input_ids=ids, attention_mask=(ids > 0).long()).logits_per_image
    torch.testing.assert_close(found / 100, official_logits(state, pixels, ids) / 100, rtol=0, atol=1e-5)


def test_sizes_are_read_off_the_tensors():
    config = from_official(make_state(moe_layers=1), num_experts_per_tok=TOP_K).config
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers, vision.num_attention_heads) == (32, 8, 2, 2)
    assert (text.max_position_embeddings, text.vocab_size, text.eos_token_id, text.hidden_size) == (24, 60, 59, 128)
    assert (vision.num_experts, vision.num_experts_per_tok, vision.moe_layers, text.moe_layers) == (4, 2, [1], [1])
    assert config.projection_dim == 96


def assert_equal_states(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("moe_layers", [2, 1])
def test_round_trip_is_bit_equal_through_a_folder(tmp_path, moe_layers):
    state = make_state(moe_layers, equal_tables=True)
    from_official(state, num_experts_per_tok=TOP_K).save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert isinstance(again, CLIPMoEModel)
    assert_equal_states(to_official(again), state)


def test_positions_in_use_survive_where_the_tables_differ():
    state = make_state()
    back = to_official(from_official(state, num_experts_per_tok=TOP_K))
    assert torch.equal(back["positional_embedding"][:20], state["positional_embedding"][:20])
    assert torch.equal(back["positional_embedding_res"][20:], state["positional_embedding_res"][20:])


def test_missing_and_unexpected_tensors_are_counted_and_named():
    state = make_state()
    del state["visual.proj"], state["transformer.resblocks.1.experts.2.c_fc.bias"]
    state |= {f"extra.{i}": torch.zeros(1) for i in range(7)}
    message = (
        r"2 missing: transformer\.resblocks\.1\.experts\.2\.c_fc\.bias, visual\.proj; "
        r"7 unexpected: extra\.0, extra\.1, extra\.2, extra\.3, extra\.4, \.\.\."
    )
    with pytest.raises(ValueError, match=message):
        from_official(state, num_experts_per_tok=TOP_K)


def test_blocks_with_unequal_numbers_of_experts_are_refused():
    state = make_state()
    for name in [name for name in state if name.startswith("transformer.resblocks.1.experts.3.")]:
        del state[name]
    with pytest.raises(ValueError, match=r"equally many experts, but got \[3, 4\]"):
        from_official(state, num_experts_per_tok=TOP_K)


def test_an_image_that_is_no_square_is_refused():
    state = make_state()
    state["visual.positional_embedding"] = normal(13, WIDTH)
    with pytest.raises(ValueError, match="1 \\+ a square number, but got 13 rows"):
        from_official(state, num_experts_per_tok=TOP_K)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_topk_prob": False}, "no norm_topk_prob=False"),
        ({"shared_expert": True}, "no shared_expert=True"),
        ({"eval_capacity_factor": 1.0}, r"no eval_capacity_factor=1\.0"),
        ({"moe_layers": [0]}, r"last n blocks of both towers mixtures, but the vision tower has them in \[0\] of 2"),
    ],
)
def test_what_the_official_code_cannot_express_is_refused(make_official_like, fields, message):
    with pytest.raises(ValueError, match=message):
        to_official(make_official_like(**fields))


def test_the_published_model_has_the_published_tensors():
    """ViT-L/14 with 4 experts, on the meta device: names, shapes and number as the method's description lists them."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "max_position_embeddings": 248}
    sizes = {"vision_config": {**vision, "patch_size": 14, "image_size": 224}, "text_config": text}
    with torch.device("meta"):
        model = CLIPMoEModel(CLIPMoEConfig(**sizes, projection_dim=768))
    state = to_official(model)
    assert sum(tensor.numel() for tensor in state.values()) == 1_202_429_441
    # 36 blocks: 8 tensors of attention and norms, the gate, 4 of each expert; 15 tensors outside.
    assert len(state) == 36 * (8 + 1 + 4 * 4) + 15
    for name, shape in {
        "positional_embedding_res": (248, 768),
        "text_projection": (768, 768),
        "transformer.resblocks.11.attn.in_proj_weight": (2304, 768),
        "transformer.resblocks.11.experts.3.c_fc.weight": (3072, 768),
        "transformer.resblocks.0.gate.weight": (4, 768),
        "visual.proj": (1024, 768),
        "visual.positional_embedding": (257, 1024),
        "visual.conv1.weight": (1024, 3, 14, 14),
        "visual.transformer.resblocks.23.experts.0.c_proj.weight": (1024, 4096),
        "visual.transformer.resblocks.23.attn.in_proj_bias": (3072,),
    }.items():
        assert state[name].shape == shape, name


def test_block_numbers_of_two_digits_are_read():
    names = ["visual.transformer.resblocks.11.gate.weight", "visual.transformer.resblocks.11.experts.10.c_fc.bias"]
    assert read_blocks(names, "vision") == (12, {11: 11})
    assert read_blocks(names, "text") == (0, {})
