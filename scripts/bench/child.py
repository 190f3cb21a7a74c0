"""Work whose peak memory is measured, in a process of its own: `python child.py NAME [ARGUMENT ...]`; see `in_child`.

Prints one line of JSON: CPU seconds of the work, most resident memory of the process, what was resident before.
The loss is measured without transformers in memory.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import normalize

from vision_moe.contrastive import contrastive_loss


def memory(field: str) -> float:
    """Bytes of VmHWM (the most so far) or VmRSS (now); getrusage would count the parent's before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * int(next(line for line in lines if line.startswith(field)).split()[1])


def loss(pairs: str, tile: str) -> None:
    """Forward and backward of the contrastive loss; tile 0 is the plain form."""
    generator = torch.Generator().manual_seed(0)
    embeds = [normalize(torch.randn(int(pairs), 512, generator=generator), dim=-1).requires_grad_() for _ in range(2)]
    contrastive_loss(*embeds, torch.tensor(100.0), tile=int(tile) or None).backward()


def make_dense(folder: str, tiny: str) -> None:
    """A CLIP of the size of ViT-L/14 with some weights."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    if int(tiny):
        sizes["num_hidden_layers"] = text["num_hidden_layers"] = 1
    config = CLIPConfig(vision_config={**sizes, "patch_size": 14}, text_config=text, projection_dim=768)
    with torch.device("meta"):
        model = CLIPModel(config)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(folder)


def upcycle_ours(folder: str) -> float:
    """Loads the dense model and makes a mixture of 4 experts; returns the mixture's bytes."""
    from transformers import CLIPModel

    from vision_moe.upcycle import upcycle

    moe = upcycle(CLIPModel.from_pretrained(folder), num_experts=4)
    return float(sum(parameter.nbytes for parameter in moe.parameters()))


def upcycle_naive(folder: str) -> float:
    """The same as published code does it: a mixture with random weights, and the dense ones copied into it."""
    from transformers import CLIPModel

    from vision_moe import CLIPMoEModel
    from vision_moe.mixture_config import moe_config

    dense = CLIPModel.from_pretrained(folder)
    moe = CLIPMoEModel(moe_config(dense.config, 4, 2, "all", ("vision", "text"), {}))
    moe.load_state_dict(dense.state_dict(), strict=False)
    with torch.no_grad():
        for tower in ("vision_model", "text_model"):
            blocks = zip(getattr(dense, tower).encoder.layers, getattr(moe, tower).encoder.layers, strict=True)
            for old, new in blocks:
                experts = new.mlp.experts
                for e in range(4):
                    experts.up_proj[e].copy_(old.mlp.fc1.weight)
                    experts.up_proj_bias[e].copy_(old.mlp.fc1.bias)
                    experts.down_proj[e].copy_(old.mlp.fc2.weight)
                    experts.down_proj_bias[e].copy_(old.mlp.fc2.bias)
    return float(sum(parameter.nbytes for parameter in moe.parameters()))


WORK: dict[str, Callable[..., float | None]] = {
    work.__name__: work for work in (loss, make_dense, upcycle_ours, upcycle_naive)
}


def main() -> None:
    """Does the work that the arguments name."""
    torch.set_num_threads(1)
    name, *arguments = sys.argv[1:]
    if name != "loss":
        # Importing is no part of the work.
        importlib.import_module("vision_moe.upcycle")
    before, start = memory("VmRSS"), time.process_time()
    result = WORK[name](*arguments)
    seconds = time.process_time() - start
    found = {"seconds": seconds, "peak": memory("VmHWM"), "before": before, "result": result or 0.0}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
