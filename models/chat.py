"""Chats to documents: token ids through the tokenizer's own chat template, and weight on what the assistant says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]


class ChatError(ValueError):
    """Raised for a conversation or a template that cannot be turned into a document."""


Document = tuple[list[int], list[float]]


def _render(tokenizer: Any, messages: Sequence[Message], **kwargs: Any) -> Mapping[str, Any]:
    from jinja2 import TemplateError  # what templates are written in; transformers brings it

    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **kwargs)
    except TemplateError as error:
        raise ChatError(f"chat_documents: the tokenizer's template refuses the conversation: {error}") from error


def _ids(tokenizer: Any, messages: Sequence[Message], **kwargs: Any) -> list[int]:
    return list(_render(tokenizer, messages, **kwargs)["input_ids"])


def _check(tokenizer: Any, messages: Sequence[Message]) -> None:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise ChatError(f"chat_documents: messages is a {type(messages).__name__}; pass a list of messages")
    if not messages:
        raise ChatError("chat_documents: the conversation is empty; leave it out")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ChatError(f"chat_documents: message {i} is {message!r}; it needs a 'role' and 'content'")
        if not isinstance(message["content"], str):
            raise ChatError(
                f"chat_documents: the content of message {i} is a {type(message['content']).__name__}; only text can be "
                "learnt from here: join the parts of a list, and leave calls of tools out"
            )
    if not any(m["role"] == "assistant" and m["content"] for m in messages):
        raise ChatError("chat_documents: the assistant says nothing, so there is nothing to learn; leave it out")
    if tokenizer.chat_template is None:
        raise ChatError("chat_documents: the tokenizer has no chat_template; use an instruction-tuned model's tokenizer")


def chat_documents(tokenizer: Any, messages: Sequence[Message]) -> list[Document]:
    """Return ``(ids, weights)`` documents for a conversation: weight 1 on what the assistant says, 0 elsewhere.

    Usually that is one document. A template that marks the assistant's text itself (``{% generation %}``) is believed.
    Otherwise each turn is found by rendering the conversation up to it and up to its end: what is added is the
    assistant's, the end-of-turn token included. Some templates render earlier turns differently once later ones follow
    (Qwen3's drops their reasoning); then each turn of the assistant becomes a document of its own, the conversation up to
    it, rendered as the model would have seen it when it had to answer.

    Raises ChatError for an empty conversation, content that is no text, one in which the assistant says nothing, and what
    the template refuses.
    """
    _check(tokenizer, messages)
    if isinstance(tokenizer.chat_template, str) and "{% generation" in tokenizer.chat_template.replace("{%-", "{%"):
        out = _render(tokenizer, messages, return_assistant_tokens_mask=True)
        return [(list(out["input_ids"]), [float(m) for m in out["assistant_masks"]])]

    ids = _ids(tokenizer, messages)
    weights = [0.0] * len(ids)
    apart: list[Document] = []
    whole = True
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or not message["content"]:
            continue
        before = _ids(tokenizer, messages[:i], add_generation_prompt=True) if i else []
        after = _ids(tokenizer, messages[: i + 1])
        if after[: len(before)] != before:
            raise ChatError(
                f"chat_documents: the template's prompt for message {i} is no beginning of what it renders with the answer, "
                "so the answer cannot be found; mark it in the template with {% generation %}"
            )
        turn = [1.0] * (len(after) - len(before))
        apart.append((after, [0.0] * len(before) + turn))
        whole = whole and ids[: len(after)] == after
        if whole:
            weights[len(before) : len(after)] = turn
    return [(ids, weights)] if whole else apart
