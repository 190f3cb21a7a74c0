"""Benchmarks, run from the checkout: `python -m eval.run`, `.retrieval`, `.factors`, `.zero_shot`, `.imagenet_o`,
`.compare`, `.report`, `.mirror`.

Always `from eval.x import y`: a bare import of this package would rebind the builtin of the same name.
"""

from vision_moe.extras import require

require("eval", "scipy", "lmms_eval")
