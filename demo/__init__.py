"""The chat demo; an application, run from the checkout with `python -m demo.app`."""

from vision_moe.extras import require

require("demo", "gradio")
