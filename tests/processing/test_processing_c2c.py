"""`C2CProcessor`: batches, chats, BOS, context, truncation, padding."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from processor_for_tests import CHAT, NAMES, TEXTS, processor, sharer_tokenizer
from tokenizers_for_tests import CHAT_TEMPLATE, TURN_TEMPLATE, byte_level_tokenizer

from c2c_hf import C2CProcessor


def aligned_texts(p: C2CProcessor, batch: dict, row: int = 0) -> list[tuple[str, str]]:
    """Text of each receiver token that is aligned, and of its sharer token."""
    pairs = []
    for i, position in enumerate(batch["sharer_alignment"][row].tolist()):
        if position >= 0:
            assert batch["attention_mask"][row, i] == 1
            assert batch["sharer_attention_mask"][row, position] == 1
            token, sharer_token = batch["input_ids"][row, i], batch["sharer_input_ids"][row, position]
            pairs.append((p.tokenizer.decode([token]), p.sharer_tokenizers[0].decode([sharer_token])))
    return pairs


@pytest.mark.parametrize("alignment", ["span", "first", "longest"])
def test_each_row_equals_a_batch_of_that_row(alignment: str) -> None:
    p = processor(alignment)
    batch = p(TEXTS)
    assert list(batch) == NAMES
    assert all(value.dtype == torch.int64 for value in batch.values())
    for row, text in enumerate(TEXTS):
        single = p(text)
        mask, sharer_mask = batch["attention_mask"][row].bool(), batch["sharer_attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row][mask], single["input_ids"][0])
        assert mask.tolist() == sorted(mask.tolist())
        single_mask = single["sharer_attention_mask"][0].bool()
        assert torch.equal(batch["sharer_input_ids"][row][sharer_mask], single["sharer_input_ids"][0][single_mask])
        shift = batch["sharer_input_ids"].shape[1] - single["sharer_input_ids"].shape[1]
        expected = single["sharer_alignment"][0]
        assert torch.equal(batch["sharer_alignment"][row][mask], torch.where(expected < 0, -1, expected + shift))
        assert (batch["sharer_alignment"][row][~mask] == -1).all()


@pytest.mark.parametrize("alignment", ["span", "first", "longest", "identity"])
def test_the_last_prompt_token_is_never_aligned(alignment: str) -> None:
    sharer = byte_level_tokenizer() if alignment == "identity" else sharer_tokenizer()
    p = C2CProcessor(byte_level_tokenizer(), sharer, alignment)
    for batch in (p(TEXTS), p("x"), p(TEXTS, pad_to_multiple_of=16), p.apply_chat_template([CHAT, CHAT[3:]])):
        assert (batch["sharer_alignment"][:, -1] == -1).all()
    assert (p(TEXTS)["sharer_alignment"][:2, -2] >= 0).any()


@pytest.mark.parametrize("alignment", ["span", "first", "longest"])
def test_one_bos_in_front(alignment: str) -> None:
    p = processor(alignment)
    bos = p.sharer_tokenizers[0].bos_token_id
    for batch in (p(TEXTS), p.apply_chat_template([CHAT, CHAT[3:]])):
        for ids, mask in zip(batch["sharer_input_ids"], batch["sharer_attention_mask"], strict=True):
            kept = ids[mask.bool()].tolist()
            assert kept[0] == bos and kept.count(bos) == 1
    off = p(TEXTS, add_sharer_bos=False)
    assert not ((off["sharer_input_ids"] == bos) & off["sharer_attention_mask"].bool()).any()


def test_one_bos_where_templates_and_texts_write_it() -> None:
    p = processor("span", chat_template=TURN_TEMPLATE)
    bos = p.sharer_tokenizers[0].bos_token_id
    assert (p.apply_chat_template(CHAT)["sharer_input_ids"] == bos).sum() == 1
    # A template without BOS, for a tokenizer that always writes one.
    assert (p.apply_chat_template(CHAT, sharer_chat_template=CHAT_TEMPLATE)["sharer_input_ids"] == bos).sum() == 1
    assert (p("<bos>hello")["sharer_input_ids"] == bos).sum() == 1


def test_one_bos_of_a_receiver_that_writes_it() -> None:
    receiver = sharer_tokenizer(chat_template=TURN_TEMPLATE)
    for p in (C2CProcessor(receiver, byte_level_tokenizer()), C2CProcessor(receiver, sharer_tokenizer())):
        rendered = p.apply_chat_template(CHAT, tokenize=False)
        assert rendered.startswith("<bos>")
        # A rendered chat that is tokenized again equals the chat.
        assert torch.equal(p(rendered)["input_ids"], p.apply_chat_template(CHAT)["input_ids"])
        assert (p(["hello", rendered])["input_ids"] == receiver.bos_token_id).sum(1).tolist() == [1, 1]


def test_span_aligns_the_same_text() -> None:
    p = processor("span")
    pairs = aligned_texts(p, p("The keeper counted the ships before breakfast"))
    assert (" keeper", " keeper") in pairs and (" the", " the") in pairs
    assert "sharer_alignment" in p("x") and aligned_texts(p, p("x")) == []


def test_identity_is_the_default_for_one_vocabulary() -> None:
    p = C2CProcessor.from_receiver_and_sharers(byte_level_tokenizer(), byte_level_tokenizer())
    assert p.token_alignments == ["identity"]
    assert processor().token_alignments == ["span"]
    for batch in (p(TEXTS), p.apply_chat_template([CHAT, CHAT[1:]])):
        assert torch.equal(batch["input_ids"], batch["sharer_input_ids"])
        expected = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        expected = torch.where(batch["attention_mask"].bool(), expected, -1)
        expected[:, -1] = -1
        assert torch.equal(batch["sharer_alignment"], expected)


@pytest.mark.parametrize("template", [None, TURN_TEMPLATE, CHAT_TEMPLATE])
def test_chats_align_contents_and_never_the_template(template: str | None) -> None:
    p = processor("span", chat_template=template)
    batch = p.apply_chat_template(CHAT)
    ids = batch["input_ids"][0].tolist()
    assert ids == p.tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    rendered = p.apply_chat_template(CHAT, tokenize=False)
    offsets = p.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    shown = [m["content"] if template == CHAT_TEMPLATE else m["content"].strip() for m in CHAT]
    if template is None:
        shown[1] = CHAT[1]["content"]
    expected, position = set(), 0
    for message, content in zip(CHAT, shown, strict=True):
        position = rendered.index(f"<|im_start|>{message['role']}\n", position) + len(message["role"]) + 13
        start = position + message["content"].index(content)
        expected.update(range(start, start + len(content)))
    for (start, end), position in zip(offsets, batch["sharer_alignment"][0].tolist(), strict=True):
        assert (position >= 0) == (end > start and end - 1 in expected)
    # The last user message "user" is aligned with the sharer's last content, not with a role's name.
    last = batch["sharer_alignment"].max()
    tail = p.sharer_tokenizers[0].decode(batch["sharer_input_ids"][0, last:])
    assert p.sharer_tokenizers[0].decode(batch["sharer_input_ids"][0, : last + 1]).endswith("user")
    assert "<turn>user" not in tail and "im_start|>user" not in tail


def test_only_the_sharer_sees_the_context() -> None:
    p = processor("span")
    plain, batch = p(TEXTS), p(TEXTS, sharer_context=["naïve café", "", "def fib(n):"])
    assert torch.equal(plain["input_ids"], batch["input_ids"])
    assert torch.equal(plain["sharer_alignment"] >= 0, batch["sharer_alignment"] >= 0)
    sharer_texts = p.sharer_tokenizers[0].batch_decode(batch["sharer_input_ids"], skip_special_tokens=True)
    assert sharer_texts == ["naïve café\n\n" + TEXTS[0], TEXTS[1], "def fib(n):\n\nx"]
    assert aligned_texts(p, plain, 1) == aligned_texts(p, batch, 1)


@pytest.mark.parametrize("template", [None, TURN_TEMPLATE])
def test_context_is_in_front_of_the_first_user_message(template: str | None) -> None:
    p = processor("span", chat_template=template)
    plain, batch = p.apply_chat_template(CHAT), p.apply_chat_template(CHAT, sharer_context="The user asked")
    sharer_text = p.sharer_tokenizers[0].decode(batch["sharer_input_ids"][0])
    if template is None:
        assert sharer_text.startswith("<bos>The user asked\n\nassistant\n")
    else:
        assert "user\nThe user asked\n\n What is the capital" in sharer_text
    start = p.sharer_tokenizers[0].decode(batch["sharer_input_ids"][0, : int(batch["sharer_alignment"].max()) + 1])
    assert start.endswith("user")
    assert [pair[1] for pair in aligned_texts(p, plain)][-1] == [pair[1] for pair in aligned_texts(p, batch)][-1]


def test_content_parts_and_continued_answers() -> None:
    p = processor("span", chat_template=TURN_TEMPLATE)
    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in CHAT]
    for name, value in p.apply_chat_template(CHAT).items():
        assert torch.equal(value, p.apply_chat_template(parts)[name])
    messages = [*CHAT, {"role": "assistant", "content": "The user said"}]
    batch = p.apply_chat_template(messages, continue_final_message=True)
    assert p.decode(batch["input_ids"][0]).endswith("assistant\nThe user said")
    assert p.sharer_tokenizers[0].decode(batch["sharer_input_ids"][0]).endswith("The user said")
    assert batch["sharer_alignment"][0, -1] == -1 and batch["sharer_alignment"][0, -2] >= 0
    with pytest.raises(ValueError, match="`content` of a message must be text"):
        p.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])


def test_template_variables_reach_both_templates() -> None:
    template = "{{ bos_token }}{{ mode }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    p = processor("span", chat_template=template)
    batch = p.apply_chat_template(CHAT, mode="hello", chat_template=template.replace("{{ bos_token }}", ""))
    assert p.decode(batch["input_ids"][0]).startswith("helloassistant")
    assert p.sharer_tokenizers[0].decode(batch["sharer_input_ids"][0]).startswith("<bos>helloassistant")
    with pytest.raises(ValueError, match="chat template of sharer 0 refuses this conversation .*no system"):
        p.apply_chat_template(CHAT, sharer_chat_template="{{ raise_exception('no system') }}")


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_keeps_the_alignment_right(side: str) -> None:
    p = processor("span")
    p.tokenizer.truncation_side = side
    text = "The keeper counted the ships before breakfast and the keeper said hello"
    full, batch = p(text), p(text, truncation=True, max_length=6)
    assert batch["input_ids"].shape == (1, 6) and batch["sharer_input_ids"].shape == (1, 6)
    assert batch["sharer_input_ids"][0, 0] == p.sharer_tokenizers[0].bos_token_id
    pairs = aligned_texts(p, batch)
    assert pairs and set(pairs) <= set(aligned_texts(p, full))
    assert pairs[0] == ("The", "e") or side == "left" or pairs[0] in aligned_texts(p, full)[:1]
    assert p.sharer_tokenizers[0].truncation_side == "right"
    chat = p.apply_chat_template(CHAT, truncation=True, max_length=8)
    assert chat["input_ids"].shape[1] == 8 and chat["sharer_input_ids"].shape[1] <= 8
    table = processor("first")(text, truncation=True, max_length=6)
    assert table["input_ids"].shape == (1, 6) and table["sharer_input_ids"].shape == (1, 7)
    # The receiver's side, also where the sharer's differs.
    p.sharer_tokenizers[0].truncation_side = "left" if side == "right" else "right"
    assert torch.equal(p(text, truncation=True, max_length=6)["sharer_input_ids"], batch["sharer_input_ids"])


def test_padding_and_return_types() -> None:
    p = processor("span")
    assert p("x", padding="max_length", max_length=9)["input_ids"].shape == (1, 9)
    lists = p("hello", return_tensors=None)
    assert [type(value[0]) for value in lists.values()] == [int] * 6
    assert lists["input_ids"] == p("hello")["input_ids"][0].tolist()
    with pytest.raises(ValueError, match="`padding=False` with rows of"):
        p(TEXTS, padding=False)
    with pytest.raises(ValueError, match="`return_tensors` must be 'pt' or None, got 'tf'"):
        p("x", return_tensors="tf")
    assert p.apply_chat_template(CHAT, return_dict=False).dtype == torch.int64
    assert p.batch_decode(p(TEXTS)["input_ids"], skip_special_tokens=True) == TEXTS
    receiver = byte_level_tokenizer()
    receiver.pad_token = None
    padded = C2CProcessor(receiver, [sharer_tokenizer()])(TEXTS)
    assert padded["input_ids"][0, 0] == receiver.eos_token_id
    assert receiver.pad_token is None


def test_calls_change_no_tokenizer() -> None:
    p = C2CProcessor(byte_level_tokenizer(), [sharer_tokenizer(), sharer_tokenizer(prefix_space=True)], "span")
    p.tokenizer.truncation_side = "left"
    tokenizers = [p.tokenizer, *p.sharer_tokenizers]

    def state() -> list[tuple[object, ...]]:
        return [
            (t.truncation_side, t.padding_side, t.pad_token, t.chat_template, t.backend_tokenizer.to_str())
            for t in tokenizers
        ]

    before = state()
    p(TEXTS, sharer_context="naïve café", truncation=True, max_length=5, padding="max_length")
    p.apply_chat_template(CHAT, sharer_chat_template=TURN_TEMPLATE, truncation=True, max_length=9)
    assert state() == before


def test_threads_share_a_processor() -> None:
    p = processor("span", chat_template=TURN_TEMPLATE)
    lengths = [None, 3, 5, 8, 13]

    def call(index: int) -> list[torch.Tensor]:
        length = lengths[index % len(lengths)]
        kwargs = {} if length is None else {"truncation": True, "max_length": length}
        texts = p(TEXTS, sharer_context="naïve café", **kwargs)
        return [*texts.values(), *p.apply_chat_template([CHAT, CHAT[3:]], **kwargs).values()]

    expected = [call(index) for index in range(len(lengths))]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(call, range(400)))
    for index, result in enumerate(results):
        assert all(map(torch.equal, result, expected[index % len(lengths)]))


@pytest.mark.parametrize("alignment", ["span", "first"])
def test_widths_rounded_up_to_a_multiple(alignment: str) -> None:
    p = processor(alignment, chat_template=TURN_TEMPLATE)
    pairs = [
        (p(TEXTS), p(TEXTS, pad_to_multiple_of=16)),
        (p(TEXTS[:1]), p(TEXTS[:1], padding="max_length", max_length=20, pad_to_multiple_of=16)),
        (p.apply_chat_template([CHAT, CHAT[3:]]), p.apply_chat_template([CHAT, CHAT[3:]], pad_to_multiple_of=16)),
    ]
    for plain, wide in pairs:
        assert all(wide[name].shape[1] % 16 == 0 for name in NAMES[:-1])
        for side in ("", "sharer_"):
            before, after = plain[f"{side}attention_mask"].bool(), wide[f"{side}attention_mask"].bool()
            assert torch.equal(plain[f"{side}input_ids"][before], wide[f"{side}input_ids"][after])
            assert torch.equal(before, after[:, -before.shape[1] :]) and before.sum() == after.sum()
        shift = wide["sharer_input_ids"].shape[1] - plain["sharer_input_ids"].shape[1]
        expected = plain["sharer_alignment"]
        expected = torch.where(expected < 0, -1, expected + shift)
        assert torch.equal(wide["sharer_alignment"][:, -expected.shape[1] :], expected)
        assert (wide["sharer_alignment"][:, : -expected.shape[1]] == -1).all()
    assert pairs[1][1]["input_ids"].shape == (1, 32)
    # Without padding there is nothing to round.
    for name, value in p("hello", padding=False, pad_to_multiple_of=16).items():
        assert torch.equal(value, p("hello")[name])
    with pytest.raises(ValueError, match="`pad_to_multiple_of` must be a positive integer or None, got 0"):
        p("x", pad_to_multiple_of=0)


def test_several_sharers() -> None:
    sharers = [sharer_tokenizer(), byte_level_tokenizer(), sharer_tokenizer(prefix_space=True)]
    p = C2CProcessor.from_receiver_and_sharers(byte_level_tokenizer(), sharers, ["span", "identity", "first"])
    assert [table is None for table in p.token_tables] == [True, True, False]
    assert p.token_tables is p.token_tables
    for batch in (p(TEXTS), p.apply_chat_template(CHAT)):
        assert list(batch) == NAMES
        assert all(len(batch[name]) == 3 for name in NAMES[2:])
        one_sharer = C2CProcessor(p.tokenizer, sharers[2], "first")
        expected = one_sharer(TEXTS) if len(batch["input_ids"]) > 1 else one_sharer.apply_chat_template(CHAT)
        for name in NAMES[2:]:
            assert torch.equal(batch[name][2], expected[name])
        moved = batch.to("meta")
        assert all(tensor.device.type == "meta" for name in NAMES[2:] for tensor in moved[name])
    assert C2CProcessor(p.tokenizer, sharers).token_alignments == ["span", "identity", "span"]
    with pytest.raises(ValueError, match=r"`token_alignment` must be one value, or one per sharer \(3\)"):
        C2CProcessor(p.tokenizer, sharers, ["span", "span"])


def test_empty_inputs() -> None:
    p = processor("span")
    with pytest.raises(ValueError, match="Text 1 gives the receiver no token"):
        p(["x", ""])
    with pytest.raises(ValueError, match="nothing to process"):
        p([])
    with pytest.raises(ValueError, match="`conversation` is empty"):
        p.apply_chat_template([])
    # The BOS is the receiver's only token; it predicts the answer and is never aligned.
    reverse = C2CProcessor(sharer_tokenizer(), byte_level_tokenizer())
    batch = reverse(["", "hello ships"])
    assert batch["attention_mask"][0].sum() == 1 and batch["sharer_attention_mask"][0].sum() == 0
    assert (batch["sharer_alignment"][0] == -1).all() and (batch["sharer_alignment"][1] >= 0).any()
    assert reverse("")["sharer_input_ids"].shape == (1, 1)
    for alignment in ("first", "longest"):
        assert (
            C2CProcessor(sharer_tokenizer(), byte_level_tokenizer(), alignment)("")["sharer_alignment"] == -1
        ).all()


def test_errors_name_the_argument() -> None:
    receiver = byte_level_tokenizer()
    with pytest.raises(
        ValueError,
        match="`token_alignment='identity'` needs receiver and sharer to have the same vocabulary.*use 'span'",
    ):
        C2CProcessor(receiver, sharer_tokenizer(), "identity")
    with pytest.raises(ValueError, match=r"must be one of \['identity', 'first', 'longest', 'span'\], but got 'near'"):
        C2CProcessor(receiver, sharer_tokenizer(), "near")
    with pytest.raises(ValueError, match="`sharer_tokenizers` is empty"):
        C2CProcessor(receiver, [])
    with pytest.raises(TypeError, match="`sharer_tokenizers` must hold tokenizers, got str"):
        C2CProcessor(receiver, ["gpt2"])
    with pytest.raises(ValueError, match="`sharer_context` needs `token_alignment='span'`, got"):
        processor("first")("x", sharer_context="y")
    with pytest.raises(ValueError, match="`sharer_context` has 1 entries for 2"):
        processor("span")(["x", "y"], sharer_context=["z"])
    with pytest.raises(ValueError, match=r"`sharer_kwargs` must be one value, or one per sharer \(1\)"):
        C2CProcessor.from_receiver_and_sharers(receiver, sharer_tokenizer(), sharer_kwargs=[{}, {}])
    with pytest.raises(ValueError, match="`text` must be a string or a list"):
        processor("span")([1])


def test_span_refuses_a_slow_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = sharer_tokenizer()
    monkeypatch.setattr(type(slow), "is_fast", property(lambda self: self is not slow))
    with pytest.raises(ValueError, match="follows character offsets, which the slow tokenizer"):
        C2CProcessor(byte_level_tokenizer(), slow, "span")


@pytest.mark.real_pair
def test_real_pair(real_pair: tuple[str, str]) -> None:
    p = C2CProcessor.from_receiver_and_sharers(*real_pair)
    assert p.token_alignments == ["span"]
    text = "北京的秋天很短 👩‍🚀 isn't it?\n\tdef f(x): return 1"
    for batch in (p(text), p.apply_chat_template([{"role": "user", "content": text}])):
        assert batch["sharer_input_ids"][0, 0] == 2
        assert (batch["sharer_input_ids"] == 2).sum() == 1
        assert p.sharer_tokenizers[0].decode(batch["sharer_input_ids"][0, 1:]) == text
    assert (p(text)["sharer_alignment"][0, :-1] > 0).all()
