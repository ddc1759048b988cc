"""Chats to documents: token ids through the tokenizer's own chat template, and weight on what the assistant says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


class ChatError(ValueError):
    """Raised for a conversation or a template that cannot be turned into a document."""


def _ids(tokenizer: Any, messages: Sequence[Message], **kwargs: Any) -> list[int]:
    out = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **kwargs)["input_ids"]
    return list(out)


def chat_document(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[float]]:
    """Return ``(ids, weights)`` of a conversation, with weight 1 on the tokens of the assistant's turns and 0 elsewhere.

    A template that marks the assistant's text itself (``{% generation %}``) is believed. Otherwise each turn is found by
    rendering the conversation up to it and up to its end: what is added is the assistant's, the end-of-turn token
    included.

    Raises ChatError for an empty conversation, one in which the assistant says nothing, and a template that renders earlier
    turns differently once later ones follow (some drop earlier reasoning), where prefixes tell nothing.
    """
    if not messages:
        raise ChatError("chat_document: the conversation is empty; leave it out")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ChatError(f"chat_document: message {i} is {message!r}; it needs a 'role' and 'content'")
    if not any(m["role"] == "assistant" for m in messages):
        raise ChatError("chat_document: no message has the role 'assistant', so there is nothing to learn; leave it out")
    if tokenizer.chat_template is None:
        raise ChatError("chat_document: the tokenizer has no chat_template; use an instruction-tuned model's tokenizer")
    if isinstance(tokenizer.chat_template, str) and "{% generation" in tokenizer.chat_template.replace("{%-", "{%"):
        out = tokenizer.apply_chat_template(
            list(messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return list(out["input_ids"]), [float(m) for m in out["assistant_masks"]]

    ids = _ids(tokenizer, messages)
    weights = [0.0] * len(ids)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _ids(tokenizer, messages[:i], add_generation_prompt=True) if i else []
        after = _ids(tokenizer, messages[: i + 1])
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise ChatError(
                f"chat_document: the template renders the conversation up to message {i} differently from the whole; split "
                "it so that each document ends with the assistant's turn to be learnt"
            )
        weights[len(before) : len(after)] = [1.0] * (len(after) - len(before))
    return ids, weights
