"""Our v1 template as a chat template of transformers, for tools that ask a model folder how to write a prompt."""

import json

from transformers import PreTrainedTokenizerBase

from mllm.templates import IMAGE_TOKEN, V1_SYSTEM, Template

# A turn's pictures come to its head, one line each, as in LLaVA; content is a text, or a list of texts and pictures.
_V1 = (
    "{%- macro written(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}"
    "{%- for part in content if part.type == 'image' -%}{{ IMAGE }}{%- endfor -%}"
    "{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}"
    "{%- endif -%}"
    "{%- endmacro -%}"
    "{{ SYSTEM }}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{ 'USER: ' + written(message.content) + ' ASSISTANT:' }}"
    "{%- else -%}{{ ' ' + written(message.content) + END }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def chat_template(template: Template, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The Jinja template by which transformers' processors write what a model was trained with.

    Args:
        template: of the model; for others than "v1" the tokenizer's own is taken.
        tokenizer: its end token ends the answers.
    """
    if template != "v1":
        return tokenizer.chat_template
    words = {"SYSTEM": f"{V1_SYSTEM} ", "IMAGE": f"{IMAGE_TOKEN}\n", "END": tokenizer.eos_token}
    return "".join(f"{{%- set {name} = {json.dumps(text)} -%}}" for name, text in words.items()) + _V1
