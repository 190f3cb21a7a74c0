"""Quantised layers in training: they take back their own state, as DeepSpeed hands it to them when a run goes on."""

import pytest
import torch
from torch import nn

from mllm.quantization import accept_own_state


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "after a forward"])
def test_8_bit_layers_take_back_their_own_state(seen: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")

    def build(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)).to("cpu")
        accept_own_state(model)
        return model

    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float32)
    trained, fresh = build(0), build(1)
    expected = trained(inputs)
    if seen:
        assert not torch.equal(fresh(inputs), expected)
    fresh.load_state_dict(trained.state_dict())
    torch.testing.assert_close(fresh(inputs), expected, rtol=0, atol=0)
