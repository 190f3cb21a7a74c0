"""LLaVA's own checkpoint layouts to model folders of ours and back; docs/llava_checkpoints.md."""
