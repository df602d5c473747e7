"""Chats: positions of the contents, rendering for a sharer, and the reference's alignment."""

import json
from pathlib import Path

import pytest
from reference_chat import reference_chat_alignment
from tokenizers_for_tests import CHAT_TEMPLATE, TURN_TEMPLATE, byte_level_tokenizer, metaspace_tokenizer
from transformers import AutoTokenizer

from c2c_hf.alignment.chat_template import chat_segments, locate_contents
from c2c_hf.alignment.token_table import build_token_table

REFERENCE = Path(__file__).parents[1] / "data" / "alignment" / "alignment.json"
#: What the reference falls back to where a model has no template, worked out from its ids.
REFERENCE_FALLBACK_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}### Human: {{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}    ### Assistant:{% endif %}"
)


def render_with(template: str, roles: list[str]) -> object:
    tokenizer = metaspace_tokenizer(chat_template=template)

    def render(contents: list[str]) -> str:
        messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    return render


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, TURN_TEMPLATE])
def test_contents_are_not_confused_with_the_template(template: str) -> None:
    contents = ["user", "<|im_end|>\n", " assistant  ", "model", "user", "  \n", "X"]
    roles = ["user", "assistant"] * 3 + ["user"]
    render = render_with(template, roles)
    text = render(contents)
    spans = locate_contents(contents, text, render)
    previous = 0
    for content, role, span in zip(contents, roles, spans, strict=True):
        start, first, last = span
        assert text[start : start + last - first] == content[first:last]
        assert content[first:last].strip() == content.strip()
        name = role if template is CHAT_TEMPLATE or role == "user" else "model"
        assert text[previous:start].endswith(f"{name}\n")
        previous = start + last - first


def test_content_a_template_drops_or_cuts() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] != 'system' %}[{{ m['role'] }}]"
        "{{ m['content'].split('</think>')[-1] }}{% endif %}{% endfor %}"
    )
    render = render_with(template, ["system", "user", "assistant", "user"])
    contents = ["user", "assistant", "<think>user</think>user", "more"]
    text = render(contents)
    spans = locate_contents(contents, text, render)
    assert spans[0] is None
    assert text[spans[1][0] :].startswith("assistant[assistant]user[user]more")
    # "user" is twice in the third content: its position is ambiguous.
    assert spans[2] is None
    assert spans[3] == (len(text) - 4, 0, 4)
    contents[2] = "<think>hm</think>yes"
    text = render(contents)
    start, first, last = locate_contents(contents, text, render)[2]
    assert text[start : start + last - first] == contents[2][first:last] == "yes"


def test_chat_segments_are_the_characters_on_both_sides() -> None:
    assert chat_segments([(10, 0, 8), None, (30, 2, 5)], [(4, 2, 7), (9, 0, 3), (50, 0, 5)]) == [
        (12, 4, 5),
        (30, 52, 3),
    ]


def test_reference_chat_pads_template_sections() -> None:
    receiver, sharer = byte_level_tokenizer(), metaspace_tokenizer(chat_template=TURN_TEMPLATE)
    messages = [{"role": "user", "content": "user"}, {"role": "assistant", "content": "hello ships"}]
    table = build_token_table(receiver, sharer)
    chat = reference_chat_alignment(receiver, sharer, messages, table)
    assert [kind for kind, _, _ in chat.sections] == ["template", "message"] * 2 + ["template"]
    assert len(chat.receiver_ids) == len(chat.sharer_ids) == chat.sections[-1][2]
    kept = [i for i, pad in zip(chat.receiver_ids, chat.receiver_pad, strict=True) if not pad]
    assert kept == receiver.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    with pytest.raises(ValueError, match=r"`messages\[0\]` is not in the rendered chat"):
        reference_chat_alignment(receiver, sharer, messages, table, sharer_chat_template="{{ bos_token }}")


@pytest.mark.real_pair
@pytest.mark.parametrize("strategy", ["first", "longest"])
def test_reference_ids_of_the_real_pair(real_pair: tuple[str, str], strategy: str) -> None:
    receiver, sharer = (AutoTokenizer.from_pretrained(folder) for folder in real_pair)
    table = build_token_table(receiver, sharer, strategy, unknown="unk", partial_characters="replace")
    items = json.loads(REFERENCE.read_text(encoding="utf-8"))["items"]
    assert len(items) == 8
    for item in items:
        assert receiver(item["prompt"])["input_ids"] == item["receiver_ids"]
        assert table[item["receiver_ids"]].tolist() == item[f"aligned_sharer_ids_{strategy}"]
        messages = [{"role": "user", "content": item["prompt"]}]
        chat = reference_chat_alignment(
            receiver, sharer, messages, table, sharer_chat_template=REFERENCE_FALLBACK_TEMPLATE
        )
        expected = item[f"chat_{strategy}"]
        for name in ("receiver_ids", "sharer_ids", "message_mask", "receiver_pad", "sharer_pad"):
            assert getattr(chat, name) == expected[name], name
        assert [list(section) for section in chat.sections] == expected["sections"]
