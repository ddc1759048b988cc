"""Chats become documents: which tokens carry weight, and what cannot be used."""

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fstep_models.chat import ChatError, chat_document

PLAIN = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "</>{% endgeneration %}{% else %}{{ m['content'] }}</>{% endif %}{% endfor %}"
)
# Like templates that drop reasoning from every turn but the last.
FORGETFUL = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] if loop.last else m['content'][:1] }}</>{% endfor %}"
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


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by prefixes", "by the template's own marks"])
def test_only_what_the_assistant_says_carries_weight(template: str) -> None:
    ids, weights = chat_document(make_tokenizer(template), TALK)
    assert "".join(map(chr, ids)) == "<user>hi</><assistant>yo</><user>more</><assistant>ok!</>"
    learnt = "".join(chr(t) if w else "." for t, w in zip(ids, weights, strict=True))
    assert learnt == "..........." + "..........." + "yo</>" + "." * 13 + "..........." + "ok!</>"


def test_a_conversation_may_begin_with_the_assistant() -> None:
    ids, weights = chat_document(make_tokenizer(PLAIN), TALK[1:2])
    assert "".join(map(chr, ids)) == "<assistant>yo</>" and sum(weights) > 0


@pytest.mark.parametrize(
    ("template", "messages", "said"),
    [
        (PLAIN, [], "is empty"),
        (PLAIN, TALK[:1], "nothing to learn"),
        (PLAIN, [{"role": "assistant"}], "message 0"),
        (None, TALK, "no chat_template"),
        (FORGETFUL, TALK, "renders the conversation up to message 1 differently"),
    ],
)
def test_what_cannot_be_used_is_refused(template: str | None, messages: list, said: str) -> None:
    with pytest.raises(ChatError, match=said):
        chat_document(make_tokenizer(template), messages)


def test_a_forgetful_template_is_fine_where_it_forgets_nothing() -> None:
    _, weights = chat_document(make_tokenizer(FORGETFUL.replace("<{{ m['role'] }}>", "<a>")), TALK[1:2])
    assert sum(weights) > 0
