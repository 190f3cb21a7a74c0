"""Conversations as token ids and labels, in LLaVA-1.5's templates or the language model's own.

A template writes a conversation as one text and says which stretches of it are answers. The text is tokenised as
LLaVA does it, each piece between `<image>` placeholders on its own, and a token is supervised if it starts inside an
answer. Nothing is tokenised twice to count tokens: that is what makes LLaVA's own code drop whole samples when a
tokenizer counts differently in context.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"
IMAGE_TOKEN_ID = -200
IGNORE_INDEX = -100

Template = Literal["v1", "plain", "chat"]
Conversation = Sequence[Mapping[str, str]]

_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Turn(NamedTuple):
    """One message; `is_answer` where the assistant speaks."""

    is_answer: bool
    text: str


class Rendered(NamedTuple):
    """A conversation as text.

    Attributes:
        text: the conversation, with `<image>` placeholders.
        answers: [start, end) of what is supervised, in characters of `text`.
        wants_bos: the tokenizer puts its start token in front; False where the template writes it.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    wants_bos: bool


def encode(
    conversations: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "v1",
    image_token_id: int = IMAGE_TOKEN_ID,
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a training sample, before image tokens are expanded.

    For "v1" and "plain" these are the ids and labels of LLaVA-1.5's own preprocessing: an image moves to the head of
    its turn, several in one turn become one, and a first turn that is not the human's is dropped.

    Args:
        conversations: turns {"from": "human" | "gpt", "value": text}, ending with an answer.
        tokenizer: a fast tokenizer.
        template: "v1" (Vicuna, LLaVA's fine-tuning), "plain" (image and caption, LLaVA's pretraining), or "chat"
            (the tokenizer's own chat template).
        image_token_id: stands for each `<image>`.

    Returns:
        ids and labels of equal length; labels are -100 except at answers and the token that ends them.

    Raises:
        ValueError: the turns do not alternate, nothing is supervised, or the template does not fit.
    """
    turns = _read_turns(conversations)
    if not turns[-1].is_answer:
        raise ValueError("the conversation ends with a human turn; remove it or add the answer to train on")
    keep_all = template == "chat"
    rendered = _renderer(template)(_images_first(turns, keep_all), tokenizer)
    input_ids, labels = _tokenize(rendered, tokenizer, image_token_id)
    if all(label == IGNORE_INDEX for label in labels):
        raise ValueError(
            "nothing in the conversation is supervised: every answer is empty; give it an answer or drop the sample"
        )
    return input_ids, labels


def encode_prompt(
    conversations: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "v1",
    image_token_id: int = IMAGE_TOKEN_ID,
) -> list[int]:
    """Token ids that ask for the next answer, as the model saw them in training.

    Args:
        conversations: turns as in `encode`, ending with a human one. All `<image>` of a turn are kept, at its head.
        tokenizer: as in `encode`.
        template: as in `encode`.
        image_token_id: as in `encode`.

    Raises:
        ValueError: the turns do not alternate, end with an answer, or do not fit the template.
    """
    turns = _read_turns(conversations)
    if turns[-1].is_answer:
        raise ValueError("a prompt must end with a human turn, but got an answer as the last one")
    rendered = _renderer(template)(_images_first(turns, keep_all=True), tokenizer)
    return _tokenize(rendered, tokenizer, image_token_id)[0]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    """Tokens after which an answer is over: the one that training puts there, and the tokenizer's end token."""
    question = {"from": "human", "value": IMAGE_TOKEN}
    _, labels = encode([question, {"from": "gpt", "value": "x"}], tokenizer, template)
    supervised = [label for label in labels if label != IGNORE_INDEX]
    end = tokenizer.eos_token_id
    return sorted({supervised[-1]} | ({end} if end is not None else set()))


def _read_turns(conversations: Conversation) -> list[Turn]:
    turns = []
    for index, message in enumerate(conversations):
        role, text = message.get("from"), message.get("value")
        if role not in ("human", "gpt") or not isinstance(text, str):
            raise ValueError(
                f'turn {index} must be {{"from": "human" or "gpt", "value": text}}, but got from={role!r} and a '
                f"value of type {type(text).__name__}"
            )
        turns.append(Turn(role == "gpt", text))
    if turns and turns[0].is_answer:
        turns = turns[1:]
    if not turns:
        raise ValueError("the conversation has no human turn")
    for index, turn in enumerate(turns):
        if turn.is_answer != (index % 2 == 1):
            raise ValueError(f"human and gpt must take turns, but turns {index - 1} and {index} are the same side's")
        if not turn.is_answer and not turn.text:
            raise ValueError(f"turn {index} is an empty question; write one or drop the sample")
    return turns


def _images_first(turns: list[Turn], keep_all: bool) -> list[Turn]:
    """Moves a turn's images to its head, as LLaVA's preprocess_multimodal."""
    moved = []
    for turn in turns:
        count = turn.text.count(IMAGE_TOKEN)
        if turn.is_answer and count:
            raise ValueError(f"an answer contains {IMAGE_TOKEN}, which only a question can; remove it")
        if count:
            images = f"{IMAGE_TOKEN}\n" * (count if keep_all else 1)
            turn = turn._replace(text=(images + turn.text.replace(IMAGE_TOKEN, "").strip()).strip())
        moved.append(turn)
    return moved


def _renderer(template: str) -> Callable[[list[Turn], PreTrainedTokenizerBase], Rendered]:
    renderers = {"v1": _render_v1, "plain": _render_plain, "chat": _render_chat}
    if template not in renderers:
        raise ValueError(f"unknown conversation template {template!r}; choose one of: {', '.join(renderers)}")
    return renderers[template]


def _render_v1(turns: list[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    end = tokenizer.eos_token
    if end is None:
        raise ValueError("template 'v1' ends answers with the tokenizer's eos_token, but this tokenizer has none")
    text, answers = f"{_SYSTEM} ", []
    for turn in turns:
        if not turn.is_answer:
            text += f"USER: {turn.text} ASSISTANT:"
        elif turn.text:
            start = len(text)
            text += f" {turn.text}{end}"
            answers.append((start, len(text)))
    if turns[-1].is_answer and not turns[-1].text:
        # LLaVA masks the whole sample then, earlier answers included, and trains on nothing.
        raise ValueError("the last answer is empty, so nothing ends the conversation; give it text or drop the sample")
    return Rendered(text, tuple(answers), wants_bos=True)


def _render_plain(turns: list[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if len(turns) > 2 or IMAGE_TOKEN not in turns[0].text:
        raise ValueError(
            f"template 'plain' takes one question with {IMAGE_TOKEN} and one answer, but got {len(turns)} turns, the "
            f"first {turns[0].text[:40]!r}; use 'v1' or 'chat' for conversations"
        )
    # The question's words are dropped: the model learns to caption.
    images = IMAGE_TOKEN * turns[0].text.count(IMAGE_TOKEN)
    if len(turns) == 1:
        return Rendered(images, (), wants_bos=True)
    text = f"{images}{turns[1].text}\n"
    return Rendered(text, ((len(images), len(text)),), wants_bos=True)


def _render_chat(turns: list[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if tokenizer.chat_template is None:
        raise ValueError("template 'chat' needs a tokenizer with a chat_template, but this one has none; use 'v1'")
    messages = [{"role": "assistant" if turn.is_answer else "user", "content": turn.text} for turn in turns]

    def render(count: int, asking: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asking)

    text, answers = render(len(turns), not turns[-1].is_answer), []
    for index, turn in enumerate(turns):
        if not turn.is_answer:
            continue
        prompt, told = render(index, True), render(index + 1, False)
        if not (text.startswith(told) and told.startswith(prompt)):
            raise ValueError(
                f"the tokenizer's chat template rewrites earlier turns when turn {index} is added, so training would "
                f"see other prompts than generation; use template 'v1'"
            )
        # Templates put a line break behind the end token, which generation never reaches.
        told = told.rstrip()
        if told.endswith(turn.text.rstrip()) and turn.text.strip():
            raise ValueError("the tokenizer's chat template writes no token that ends an answer; use template 'v1'")
        if turn.text.strip():
            answers.append((len(prompt), len(told)))
    return Rendered(text, tuple(answers), wants_bos=False)


def _tokenize(
    rendered: Rendered, tokenizer: PreTrainedTokenizerBase, image_token_id: int
) -> tuple[list[int], list[int]]:
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no offsets; load a fast tokenizer (tokenizer.json)")
    input_ids = _start_ids(tokenizer) if rendered.wants_bos else []
    labels = [IGNORE_INDEX] * len(input_ids)
    position = 0
    for index, chunk in enumerate(rendered.text.split(IMAGE_TOKEN)):
        if index:
            input_ids.append(image_token_id)
            labels.append(IGNORE_INDEX)
            position += len(IMAGE_TOKEN)
        tokens = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for token_id, (start, _) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
            supervised = any(first <= position + start < end for first, end in rendered.answers)
            input_ids.append(token_id)
            labels.append(token_id if supervised else IGNORE_INDEX)
        position += len(chunk)
    return input_ids, labels


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token, where the tokenizer adds one of its own accord."""
    ids = tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []
