"""Messages of a chat as a conversation in LLaVA's form."""

from collections.abc import Sequence

from mllm.conversation import IMAGE_TOKEN

Messages = Sequence[dict[str, str]]
_SIDES = {"user": "human", "assistant": "gpt"}


def to_conversation(messages: Messages, num_images: int) -> list[dict[str, str]]:
    """The turns; pictures that no message has a place for go to the head of the first question.

    Raises:
        ValueError: a role is neither "user" nor "assistant".
    """
    for index, message in enumerate(messages):
        if message.get("role") not in _SIDES:
            raise ValueError(f"message {index} has role {message.get('role')!r}; choose one of: {', '.join(_SIDES)}")
    conversation = [{"from": _SIDES[message["role"]], "value": message["content"]} for message in messages]
    if not any(IMAGE_TOKEN in turn["value"] for turn in conversation):
        first = next((turn for turn in conversation if turn["from"] == "human"), None)
        if first is not None:
            first["value"] = f"{IMAGE_TOKEN}\n" * num_images + first["value"]
    return conversation
