"""open_clip's dense models compute the same as what they are converted to."""

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from vision_moe.convert.open_clip import architecture, from_open_clip, from_state, to_open_clip, translate

open_clip = pytest.importorskip("open_clip", reason="the extra open_clip is not installed")

# Heads of 16, which no tensor tells; a projection that is no square.
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16, "mlp_ratio": 3.0},
    "text_cfg": {"context_length": 12, "vocab_size": 60, "width": 48, "heads": 4, "layers": 3},
}


def make(**fields):
    torch.manual_seed(0)
    vision, text = ({**CONFIG[part], **fields.pop(part, {})} for part in ("vision_cfg", "text_cfg"))
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, **fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 58, (3, 12), generator=generator)
    for row, length in enumerate((12, 7, 3)):
        ids[row, length - 1] = 59
        ids[row, length:] = 0
    return torch.randn(2, 3, 32, 32, generator=generator), ids


def assert_same_features(theirs, ours, batch):
    pixels, ids = batch
    with torch.no_grad():
        image = ours.get_image_features(pixel_values=pixels).pooler_output
        text = ours.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(image, theirs.encode_image(pixels), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(text, theirs.encode_text(ids), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_features_are_open_clips(batch, quick_gelu):
    theirs = make(quick_gelu=quick_gelu)
    ours = from_open_clip(theirs)
    assert ours.config.vision_config.hidden_act == ours.config.text_config.hidden_act
    assert ours.config.text_config.hidden_act == ("quick_gelu" if quick_gelu else "gelu")
    assert_same_features(theirs, ours, batch)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_state_dict_and_open_clips_configuration_give_the_same_model(batch, quick_gelu):
    theirs = make(quick_gelu=quick_gelu)
    ours = from_state(theirs.state_dict(), architecture({**CONFIG, "quick_gelu": quick_gelu}))
    assert_same_features(theirs, ours, batch)


def test_converting_back_is_bit_equal_and_loads_into_open_clip(batch):
    theirs = make()
    back = to_open_clip(from_open_clip(theirs))
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())
    other = make()
    torch.nn.init.zeros_(other.visual.proj)
    assert other.load_state_dict(back, strict=True).missing_keys == []
    with torch.no_grad():
        assert torch.equal(other.encode_image(batch[0]), theirs.encode_image(batch[0]))


def test_half_precision_beside_float32_norms_becomes_float32(batch):
    theirs = make()
    rounded = {n: v.half() if "ln_" not in n else v for n, v in theirs.state_dict().items()}
    ours = from_state(rounded, architecture(CONFIG))
    assert ours.dtype == torch.float32
    theirs.load_state_dict(rounded)
    assert_same_features(theirs, ours, batch)


@pytest.mark.parametrize(
    ("name", "heads"), [("ViT-B-32-quickgelu", (12, 8)), ("ViT-L-14-336-quickgelu", (16, 12)), ("ViT-H-14", (16, 16))]
)
def test_published_architectures_give_transformers_shapes(name, heads):
    """On the meta device: every tensor of the published models finds its place and its shape."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        state = open_clip.CLIP(**config).state_dict()
        expected = CLIPModel(
            CLIPConfig(
                vision_config={
                    "hidden_size": config["vision_cfg"]["width"],
                    "intermediate_size": 4 * config["vision_cfg"]["width"],
                    "num_hidden_layers": config["vision_cfg"]["layers"],
                    "image_size": config["vision_cfg"]["image_size"],
                    "patch_size": config["vision_cfg"]["patch_size"],
                    "num_attention_heads": heads[0],
                },
                text_config={
                    "hidden_size": config["text_cfg"]["width"],
                    "intermediate_size": 4 * config["text_cfg"]["width"],
                    "num_hidden_layers": config["text_cfg"]["layers"],
                    "num_attention_heads": heads[1],
                },
                projection_dim=config["embed_dim"],
            )
        )
    found, ours = translate(state, architecture(config))
    shapes = {name: value.shape for name, value in ours.items()}
    assert shapes == {name: value.shape for name, value in expected.state_dict().items()}
    for tower in ("vision_config", "text_config"):
        for field in ("num_attention_heads", "image_size", "max_position_embeddings", "eos_token_id"):
            mine, theirs = (getattr(getattr(c, tower), field, None) for c in (found, expected.config))
            assert mine == theirs, (tower, field)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vision_cfg": {"pool_type": "avg"}}, "the class token as picture"),
        ({"text_cfg": {"no_causal_mask": True}}, "causal attention over text"),
        ({"text_cfg": {"pool_type": "last"}}, "the end token as caption"),
        ({"vision_cfg": {"qk_norm": True}}, "plain transformer blocks"),
        ({"vision_cfg": {"norm_kwargs": {"eps": 1e-6}}}, "one epsilon"),
        ({"init_logit_bias": -10.0}, "no logit_bias"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, "4 unexpected: visual.transformer.resblocks.0.ls_1.gamma"),
        ({"vision_cfg": {"no_ln_pre": True}}, "2 missing: visual.ln_pre.bias"),
    ],
    ids=str,
)
def test_what_transformers_clip_cannot_follow_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        from_open_clip(make(**fields))


def test_a_configuration_beyond_clip_is_refused():
    with pytest.raises(ValueError, match=r"open_clip's vision_cfg\.pool_type"):
        architecture({**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "pool_type": "avg"}})
    for name in ("ViT-B-16-SigLIP", "RN50", "EVA02-B-16", "ViT-L-14-CLIPA", "coca_ViT-B-32"):
        with pytest.raises(ValueError, match=r"cannot follow|transformers can be converted"):
            architecture(open_clip.get_model_config(name))


def test_a_state_dict_of_other_widths_than_its_configuration_is_refused():
    config = {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], "width": 64}}
    with pytest.raises(ValueError, match=r"width 64 .* 32"):
        from_state(make().state_dict(), architecture(config))
