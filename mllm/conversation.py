"""Conversations as token ids and labels, in LLaVA-1.5's templates or the language model's own.

A template writes a conversation as one text and says which stretches of it are answers. The text is tokenised as
LLaVA does it, each piece between `<image>` placeholders on its own, and a token is supervised if it starts inside an
answer. Nothing is tokenised twice to count tokens: that is what makes LLaVA's own code drop whole samples when a
tokenizer counts differently in context.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from mllm.templates import IMAGE_TOKEN, Rendered, Template, Turn, render

__all__ = ["IGNORE_INDEX", "IMAGE_TOKEN", "IMAGE_TOKEN_ID", "Template", "encode", "encode_prompt", "stop_token_ids"]

IMAGE_TOKEN_ID = -200
IGNORE_INDEX = -100

Conversation = Sequence[Mapping[str, str]]

_NOTHING_SUPERVISED = (
    "nothing in the conversation is supervised: every answer is empty; give it an answer or drop the sample"
)


def encode(
    conversations: Conversation,
    tokenizer: PreTrainedTokenizerBase,
    template: Template = "v1",
    image_token_id: int = IMAGE_TOKEN_ID,
    *,
    several_images: bool = False,
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a training sample, before image tokens are expanded.

    For "v1" and "plain" these are the ids and labels of LLaVA-1.5's own preprocessing: an image moves to the head of
    its turn, several in one turn become one, and a first turn that is not the human's is dropped.

    Args:
        conversations: turns {"from": "human" | "gpt", "value": text}, ending with an answer.
        tokenizer: of any kind; one that gives no offsets tokenises every answer apart from what is around it.
        template: "v1" (Vicuna, LLaVA's fine-tuning), "plain" (image and caption, LLaVA's pretraining), "llama_2",
            "chatml", or "chat" (the tokenizer's own chat template).
        image_token_id: stands for each `<image>`.
        several_images: all `<image>` of a turn are kept, at its head, as in `encode_prompt`; always so for "chat".

    Returns:
        ids and labels of equal length; labels are -100 except at answers and the token that ends them.

    Raises:
        ValueError: the turns do not alternate, nothing is supervised, or the template does not fit.
    """
    turns = _read_dialogue(conversations)
    rendered = render(template, _images_first(turns, several_images or template == "chat"), tokenizer)
    input_ids, labels = _tokenize(rendered, tokenizer, image_token_id)
    if all(label == IGNORE_INDEX for label in labels):
        raise ValueError(_NOTHING_SUPERVISED)
    return input_ids, labels


def ask_apart(conversations: Conversation) -> list[list[dict[str, str]]]:
    """Each question that has an answer as a conversation of its own, with the dialogue's one picture at its head.

    Raises:
        ValueError: as `encode`, or the picture stands in no turn or in several.
    """
    turns = _read_dialogue(conversations)
    places = sum(IMAGE_TOKEN in turn.text for turn in turns if not turn.is_answer)
    if places != 1:
        raise ValueError(f"1 picture, but {IMAGE_TOKEN} in {places} questions; it must stand in one")
    asked = [
        [
            {"from": "human", "value": f"{IMAGE_TOKEN}\n{question.text.replace(IMAGE_TOKEN, '').strip()}"},
            {"from": "gpt", "value": answer.text},
        ]
        for question, answer in zip(turns[::2], turns[1::2], strict=True)
        if answer.text
    ]
    if not asked:
        raise ValueError(_NOTHING_SUPERVISED)
    return asked


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
    rendered = render(template, _images_first(turns, keep_all=True), tokenizer)
    return _tokenize(rendered, tokenizer, image_token_id)[0]


def stop_token_ids(tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    """Tokens after which an answer is over: the one that training puts there, and the tokenizer's end token."""
    question = {"from": "human", "value": IMAGE_TOKEN}
    _, labels = encode([question, {"from": "gpt", "value": "x"}], tokenizer, template)
    supervised = [label for label in labels if label != IGNORE_INDEX]
    end = tokenizer.eos_token_id
    return sorted({supervised[-1]} | ({end} if end is not None else set()))


def _read_dialogue(conversations: Conversation) -> list[Turn]:
    """Turns of a training sample, which end with an answer."""
    turns = _read_turns(conversations)
    if not turns[-1].is_answer:
        raise ValueError("the conversation ends with a human turn; remove it or add the answer to train on")
    return turns


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


def _tokenize(
    rendered: Rendered, tokenizer: PreTrainedTokenizerBase, image_token_id: int
) -> tuple[list[int], list[int]]:
    input_ids = _start_ids(tokenizer) if rendered.wants_bos else []
    labels = [IGNORE_INDEX] * len(input_ids)
    chunk_tokens = _by_offsets if tokenizer.is_fast else _by_segments
    position = 0
    for index, chunk in enumerate(rendered.text.split(IMAGE_TOKEN)):
        if index:
            input_ids.append(image_token_id)
            labels.append(IGNORE_INDEX)
            position += len(IMAGE_TOKEN)
        answers = [(start - position, end - position) for start, end in rendered.answers]
        for token_id, supervised in chunk_tokens(chunk, answers, tokenizer):
            input_ids.append(token_id)
            labels.append(token_id if supervised else IGNORE_INDEX)
        position += len(chunk)
    return input_ids, labels


def _by_offsets(
    chunk: str, answers: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, bool]]:
    """Ids of the whole chunk; those that begin in an answer are supervised."""
    tokens = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    for token_id, (start, _) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        yield token_id, any(first <= start < end for first, end in answers)


def _by_segments(
    chunk: str, answers: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[int, bool]]:
    """Ids of the chunk cut at the borders of answers, for a tokenizer that does not tell where its tokens begin."""
    inside = [answer for answer in answers if 0 <= answer[0] < len(chunk)]
    borders = [0, *(border for answer in inside for border in answer), len(chunk)]
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        for token_id in tokenizer(chunk[start:end], add_special_tokens=False, verbose=False)["input_ids"]:
            yield token_id, number % 2 == 1


def _start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The start token, where the tokenizer adds one of its own accord."""
    ids = tokenizer("")["input_ids"]
    return [tokenizer.bos_token_id] if ids and ids[0] == tokenizer.bos_token_id else []
