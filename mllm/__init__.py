"""CLIP-MoE inside LLaVA-1.5: assemble, train and talk to it."""

from vision_moe.extras import require

require("mllm", "peft")
