"""`C2CProcessor`: saving, loading, and what an interrupted save leaves."""

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from processor_for_tests import CHAT, NAMES, TEXTS, processor, sharer_tokenizer
from tokenizers_for_tests import CHAT_TEMPLATE, TURN_TEMPLATE, byte_level_tokenizer
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, GPT2Config, PreTrainedConfig

from c2c_hf import C2CConfig, C2CProcessor
from c2c_hf.configuration_c2c import SharerConfig


class _Config(PreTrainedConfig):
    model_type = "c2c_processor_test"


def test_save_and_load(tmp_path: Path) -> None:
    sharers = [sharer_tokenizer(chat_template=TURN_TEMPLATE), sharer_tokenizer(prefix_space=True)]
    p = C2CProcessor(byte_level_tokenizer(), sharers, ["span", "longest"], add_sharer_bos=False)
    p.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["num_sharers"] == 2
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXTS)["input_ids"] == p.tokenizer(TEXTS)["input_ids"]
    # A model's config in the same folder, as `C2CForCausalLM.save_pretrained` leaves it.
    _Config().save_pretrained(tmp_path)
    AutoProcessor.register(_Config, C2CProcessor, exist_ok=True)
    loaded = [C2CProcessor.from_pretrained(str(tmp_path)), AutoProcessor.from_pretrained(tmp_path)]
    for again in loaded:
        assert type(again) is C2CProcessor
        assert again.to_dict() == p.to_dict()
        chats = p.apply_chat_template(CHAT), again.apply_chat_template(CHAT)
        for before, after in ((p(TEXTS), again(TEXTS)), chats):
            for name in NAMES[:2]:
                assert torch.equal(before[name], after[name])
            for name in NAMES[2:]:
                assert all(torch.equal(a, b) for a, b in zip(before[name], after[name], strict=True))
    other = C2CProcessor.from_pretrained(tmp_path, token_alignment="first", local_files_only=True)
    assert other.token_alignments == ["first", "first"]
    by_name = C2CProcessor.from_receiver_and_sharers(
        tmp_path, [tmp_path / "sharer_0"], receiver_kwargs={"device_map": "cpu"}, sharer_kwargs={"use_fast": True}
    )
    assert by_name.token_alignments == ["span"]
    assert "C2CProcessor" in repr(by_name)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def fail(*args: object, **kwargs: object) -> None:
    raise OSError("No space left on device")


def test_interrupted_save_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    C2CProcessor(byte_level_tokenizer(), [sharer_tokenizer(), sharer_tokenizer(), sharer_tokenizer()]).save_pretrained(
        tmp_path
    )
    before = contents(tmp_path)
    other = C2CProcessor(byte_level_tokenizer(300), [sharer_tokenizer(), sharer_tokenizer(vocab_size=500)], "first")
    with monkeypatch.context() as patch:
        patch.setattr(other.sharer_tokenizers[1], "save_pretrained", fail)
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".saving-*"))


@pytest.mark.parametrize("failing", range(1, 14))
def test_a_move_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    C2CProcessor(byte_level_tokenizer(), [sharer_tokenizer(), sharer_tokenizer(), sharer_tokenizer()]).save_pretrained(
        tmp_path
    )
    before = contents(tmp_path)
    other = C2CProcessor(byte_level_tokenizer(300), [sharer_tokenizer(), sharer_tokenizer(vocab_size=500)], "first")
    # Seven files and folders go, then six come.
    replace, moves = os.replace, []

    def replace_or_fail(*paths: object) -> None:
        moves.append(paths)
        if len(moves) == failing:
            fail()
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr("c2c_hf._files.os.replace", replace_or_fail)
        with pytest.raises(OSError, match="No space left"):
            other.save_pretrained(tmp_path)
    assert contents(tmp_path) == before
    assert not list(tmp_path.glob(".saving-*"))
    other.save_pretrained(tmp_path)
    assert C2CProcessor.from_pretrained(tmp_path).token_alignments == ["first", "first"]


def test_configuration_is_moved_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, moves = os.replace, []

    def record(source: Path, place: Path) -> None:
        moves.append(place)
        replace(source, place)

    monkeypatch.setattr("c2c_hf._files.os.replace", record)
    processor("span").save_pretrained(tmp_path)
    assert moves[-1] == tmp_path / "processor_config.json"
    assert {place.name for place in moves} == {path.name for path in tmp_path.iterdir()}


def test_saving_over(tmp_path: Path) -> None:
    others = {"config.json": b"{}", "model.safetensors": b"weights", "sharer_notes.txt": b"mine"}
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    three = [
        sharer_tokenizer(chat_template=TURN_TEMPLATE),
        byte_level_tokenizer(),
        sharer_tokenizer(prefix_space=True),
    ]
    C2CProcessor(byte_level_tokenizer(), three).save_pretrained(tmp_path)
    assert (tmp_path / "sharer_2").is_dir()
    # The receiver has no chat template now: the old one must not come back.
    p = C2CProcessor(byte_level_tokenizer(300, chat_template=None), [sharer_tokenizer(vocab_size=500)], "longest")
    assert p.save_pretrained(str(tmp_path)) == [str(tmp_path / "processor_config.json")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*others, "processor_config.json", "sharer_0", "tokenizer.json", "tokenizer_config.json"]
    )
    assert {name: (tmp_path / name).read_bytes() for name in others} == others
    (tmp_path / "config.json").unlink()
    again = C2CProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == p.to_dict() and again.chat_template is None
    assert again.sharer_tokenizers[0].chat_template is None
    for name, value in p(TEXTS).items():
        assert torch.equal(value, again(TEXTS)[name])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`save_directory` must be a folder, but .*file' is a file"):
        p.save_pretrained(tmp_path / "file")


def test_saving_and_pushing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = []

    class Hub:
        def create_repo(self, repo_id: str, **kwargs: object) -> object:
            uploads.append((repo_id, kwargs))
            return type("RepoUrl", (), {"repo_id": f"me/{repo_id}"})

        def create_commit(self, **kwargs: object) -> None:
            uploads.append((kwargs["repo_id"], sorted(operation.path_in_repo for operation in kwargs["operations"])))

    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: ModelCard("x"))
    p = processor("span", chat_template=TURN_TEMPLATE)
    tokenizer = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    files = sorted(["README.md", "processor_config.json", *tokenizer, *(f"sharer_0/{name}" for name in tokenizer)])
    p.save_pretrained(tmp_path / "fuser", push_to_hub=True, private=True)
    assert uploads[0][0] == "fuser" and uploads[0][1]["private"] is True
    assert uploads[1] == ("me/fuser", files)
    p.save_pretrained(tmp_path / "fuser", push_to_hub=True, repo_id="other")
    assert uploads[-1] == ("me/other", files)
    assert "README.md" not in contents(tmp_path / "fuser")


def test_auto_classes_beside_a_model(tmp_path: Path) -> None:
    alignments = ["span", "longest", "identity"]
    base = GPT2Config(n_embd=8, n_layer=1, n_head=2)
    sharers = [SharerConfig(config=base, token_alignment=alignment) for alignment in alignments]
    config = C2CConfig(receiver_config=base, sharers=sharers)
    config.save_pretrained(tmp_path)
    p = C2CProcessor(
        byte_level_tokenizer(),
        [sharer_tokenizer(), sharer_tokenizer(), byte_level_tokenizer()],
        config.token_alignments,
    )
    p.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is C2CProcessor
    assert again.token_alignments == AutoConfig.from_pretrained(tmp_path).token_alignments == alignments
    for name in NAMES[2:]:
        assert all(torch.equal(a, b) for a, b in zip(p(TEXTS)[name], again(TEXTS)[name], strict=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is type(p.tokenizer)
    assert tokenizer.get_vocab() == p.tokenizer.get_vocab() and tokenizer.chat_template == CHAT_TEMPLATE
    assert tokenizer(TEXTS)["input_ids"] == p.tokenizer(TEXTS)["input_ids"]


def test_a_folder_inside_a_folder(tmp_path: Path) -> None:
    processor("span").save_pretrained(tmp_path / "inner")
    again = C2CProcessor.from_pretrained(tmp_path, subfolder="inner")
    assert torch.equal(again("hello")["sharer_input_ids"], processor("span")("hello")["sharer_input_ids"])


def test_loading_something_else(tmp_path: Path) -> None:
    byte_level_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no complete C2CProcessor"):
        C2CProcessor.from_pretrained(tmp_path)
    processor("span").save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="unknown arguments: 'alignment'"):
        C2CProcessor.from_pretrained(tmp_path, alignment="span")
    (tmp_path / "sharer_0").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="lacks the sharer's tokenizer folder `sharer_0`"):
        C2CProcessor.from_pretrained(tmp_path)


def test_built_from_a_configuration() -> None:
    sharers = [SharerConfig(token_alignment="span")]
    config = C2CConfig(mode="memory", memory_sink_tokens=2, sharers=sharers)
    p = C2CProcessor.from_config(config, byte_level_tokenizer(), sharer_tokenizer())
    assert (p.mode, p.memory_sink_tokens, p.token_alignments) == ("memory", 2, ["span"])
    with pytest.raises(ValueError, match="`receiver` must be given"):
        C2CProcessor.from_config(config, sharers=sharer_tokenizer())
    with pytest.raises(ValueError, match="`sharers` must be given"):
        C2CProcessor.from_config(config, byte_level_tokenizer())
