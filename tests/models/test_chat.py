"""Chats become documents: which tokens carry weight, and what cannot be used."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fstep_models.chat import ChatError, chat_documents

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "</>{% endgeneration %}{% else %}{{ m['content'] }}</>{% endif %}{% endfor %}"
)
# Like Qwen3's: the last answer is rendered with its (here empty) reasoning, earlier ones without.
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
    "{{ m['content'] }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "ok!"},
]


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token a character."""
    letters = {chr(c): c for c in range(128)}
    core = Tokenizer(models.WordLevel(letters, unk_token="\x00"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, eos_token="\x01", unk_token="\x00")


def learnt(ids: list[int], weights: list[float]) -> str:
    return "".join(chr(t) if w else "." for t, w in zip(ids, weights, strict=True))


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by prefixes", "by the template's own marks"])
def test_only_what_the_assistant_says_carries_weight(template: str) -> None:
    [(ids, weights)] = chat_documents(make_tokenizer(template), TALK)
    assert "".join(map(chr, ids)) == "<user>hi</><assistant>yo</><user>more</><assistant>ok!</>"
    assert learnt(ids, weights) == "..........." + "..........." + "yo</>" + "." * 13 + "..........." + "ok!</>"


def test_a_conversation_may_begin_with_the_assistant() -> None:
    [(ids, weights)] = chat_documents(make_tokenizer(PLAIN), TALK[1:2])
    assert "".join(map(chr, ids)) == "<assistant>yo</>" and sum(weights) == len(ids)


def test_a_template_that_forgets_gives_a_document_for_each_answer() -> None:
    documents = chat_documents(make_tokenizer(FORGETFUL), TALK)
    assert ["".join(map(chr, ids)) for ids, _ in documents] == [
        "<user>hi</><assistant><think></think>yo</>",
        "<user>hi</><assistant>yo</><user>more</><assistant><think></think>ok!</>",
    ]
    assert [learnt(*d).lstrip(".") for d in documents] == ["<think></think>yo</>", "<think></think>ok!</>"]
    # One turn is rendered the same either way: one document.
    assert len(chat_documents(make_tokenizer(FORGETFUL), TALK[:2])) == 1


def test_an_empty_answer_is_not_learnt() -> None:
    talk = [*TALK[:1], {"role": "assistant", "content": ""}, *TALK[2:]]
    [(ids, weights)] = chat_documents(make_tokenizer(PLAIN), talk)
    assert learnt(ids, weights).strip(".") == "ok!</>"


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (PLAIN, [], "is empty"),
        (PLAIN, "hello", "messages is a str"),
        (PLAIN, TALK[:1], "nothing to learn"),
        (PLAIN, [*TALK[:1], {"role": "assistant", "content": ""}], "nothing to learn"),
        (PLAIN, [{"role": "assistant"}], "message 0"),
        (PLAIN, [*TALK[:1], {"role": "assistant", "content": None}], "content of message 1 is a NoneType"),
        (PLAIN, [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, TALK[1]], "content of message 0 is a list"),
        (None, TALK, "no chat_template"),
        ("{{ raise_exception('roles must alternate') }}", TALK, "template refuses the conversation: roles must alternate"),
        (PLAIN.replace("<assistant>", "<bot>"), TALK, "prompt for message 1 is no beginning"),
    ],
)
def test_what_cannot_be_used_is_refused(template: str | None, messages: list, said: str) -> None:
    with pytest.raises(ChatError, match=said):
        chat_documents(make_tokenizer(template), messages)
