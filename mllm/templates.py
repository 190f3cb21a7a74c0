"""Conversation templates: how turns become one text, and which stretches of that text are answers.

`v1`, `plain`, `llama_2` and `chatml` write what LLaVA's templates of these names write (llava/conversation.py; `chatml`
is its `chatml_direct`), `chat` is the tokenizer's own.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN = "<image>"

Template = Literal["v1", "plain", "llama_2", "chatml", "chat"]

V1_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# Llama 2's own; the two spaces are LLaVA's.
_LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_CHATML_SYSTEM = "Answer the questions."
_CHATML_START, _CHATML_END = "<|im_start|>", "<|im_end|>"


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


def render(template: str, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Writes turns, which begin with a question and alternate, in a template.

    Raises:
        ValueError: there is no such template, or it does not fit the turns or the tokenizer.
    """
    if template not in _RENDERERS:
        raise ValueError(f"unknown conversation template {template!r}; choose one of: {', '.join(_RENDERERS)}")
    return _RENDERERS[template](turns, tokenizer)


def _render_v1(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    end = _special(tokenizer.eos_token, "v1", "ends answers with the tokenizer's eos_token")
    pieces = [(f"{V1_SYSTEM} ", False)]
    for turn in turns:
        pieces.append((f" {turn.text}{end}", True) if turn.is_answer else (f"USER: {turn.text} ASSISTANT:", False))
    return _joined(pieces, turns)


def _render_llama_2(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    end = _special(tokenizer.eos_token, "llama_2", "ends answers with the tokenizer's eos_token")
    start = _special(tokenizer.bos_token, "llama_2", "begins every round with the tokenizer's bos_token")
    pieces: list[tuple[str, bool]] = []
    for index, turn in enumerate(turns):
        if turn.is_answer:
            pieces.append((f" {turn.text} {end}", True))
        elif index:
            pieces.append((f"{start}[INST] {turn.text} [/INST]", False))
        else:
            # The first round's start token is the one that the tokenizer adds.
            pieces.append((f"[INST] <<SYS>>\n{_LLAMA_2_SYSTEM}\n<</SYS>>\n\n{turn.text} [/INST]", False))
    return _joined(pieces, turns)


def _render_chatml(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    missing = [token for token in (_CHATML_START, _CHATML_END) if token not in tokenizer.get_vocab()]
    if missing:
        raise ValueError(
            f"template 'chatml' needs {_CHATML_START} and {_CHATML_END} as tokens, but the tokenizer has no "
            f"{' and no '.join(missing)}; use 'v1'"
        )
    pieces = [(f"{_CHATML_START}system\n{_CHATML_SYSTEM}{_CHATML_END}", False)]
    for turn in turns:
        if turn.is_answer:
            pieces.append((f"{turn.text}{_CHATML_END}", True))
        else:
            asked = f"{_CHATML_START}user\n{turn.text}{_CHATML_END}{_CHATML_START}assistant\n"
            pieces.append((asked, False))
    return _joined(pieces, turns)


def _render_plain(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
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


def _render_chat(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    if tokenizer.chat_template is None:
        raise ValueError("template 'chat' needs a tokenizer with a chat_template, but this one has none; use 'v1'")
    messages = [{"role": "assistant" if turn.is_answer else "user", "content": turn.text} for turn in turns]

    def written(count: int, asking: bool) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asking)

    text, answers = written(len(turns), not turns[-1].is_answer), []
    for index, turn in enumerate(turns):
        if not turn.is_answer:
            continue
        prompt, told = written(index, True), written(index + 1, False)
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


_RENDERERS: dict[str, Callable[[Sequence[Turn], PreTrainedTokenizerBase], Rendered]] = {
    "v1": _render_v1,
    "plain": _render_plain,
    "llama_2": _render_llama_2,
    "chatml": _render_chatml,
    "chat": _render_chat,
}


def _joined(pieces: Sequence[tuple[str, bool]], turns: Sequence[Turn]) -> Rendered:
    """Joins (text, is answer); an empty answer, and the token that would end it, is not written."""
    if turns[-1].is_answer and not turns[-1].text:
        # LLaVA masks the whole sample then, earlier answers included, and trains on nothing.
        raise ValueError("the last answer is empty, so nothing ends the conversation; give it text or drop the sample")
    head = pieces[: len(pieces) - len(turns)]
    body = [piece for piece, turn in zip(pieces[len(head) :], turns, strict=True) if turn.text]
    text, answers = "", []
    for piece, is_answer in [*head, *body]:
        if is_answer:
            answers.append((len(text), len(text) + len(piece)))
        text += piece
    return Rendered(text, tuple(answers), wants_bos=True)


def _special(token: str | None, template: str, what_for: str) -> str:
    if token is None:
        raise ValueError(f"template {template!r} {what_for}, but this tokenizer has none; use 'chat'")
    return token
