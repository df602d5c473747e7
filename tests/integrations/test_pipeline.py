"""transformers' pipeline `"text-generation"` with a fuser answers as the model's own `generate`."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from evaluation_for_tests import pair, save_fuser
from transformers import TextGenerationPipeline, TextIteratorStreamer, TextStreamer, pipeline

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.integrations.pipeline import C2CTextGenerationPipeline

TEXTS = ["The keeper counted", "What is the capital of France? The capital", "x"]
CHATS = [
    [{"role": "user", "content": "Who counted the ships?"}],
    [
        {"role": "system", "content": "assistant"},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital"},
    ],
]
CONTEXTS = ["The keeper counted forty-seven ships.", "hello"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def answer(model: C2CForCausalLM, processor: C2CProcessor, inputs: dict) -> str:
    out = model.generate(**inputs, **GREEDY)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat_inputs(processor: C2CProcessor, chat: list[dict[str, str]], context: str | None = None) -> dict:
    continues = chat[-1]["role"] == "assistant"
    return processor.apply_chat_template(chat, continue_final_message=continues, sharer_context=context)


def new_texts(results: list) -> list[str]:
    return [(result[0] if isinstance(result, list) else result)["generated_text"] for result in results]


@pytest.mark.parametrize("mode", ["fusion", "memory"])
@pytest.mark.parametrize("sharers", [1, 2])
def test_texts_chats_and_contexts(mode: str, sharers: int) -> None:
    """One by one and in batches, with a context for all or for each."""
    model, processor = pair(sharers, mode=mode)
    processor.tokenizer.padding_side = "left"
    pipe = pipeline("text-generation", model=model, tokenizer=processor)
    assert type(pipe) is C2CTextGenerationPipeline
    plain = pipeline("text-generation", model=model.receiver, tokenizer=processor.tokenizer)
    assert type(plain) is TextGenerationPipeline

    expected = [answer(model, processor, processor(text)) for text in TEXTS]
    for batch_size in (1, 2):
        results = pipe(TEXTS, batch_size=batch_size, return_full_text=False, **GREEDY)
        assert new_texts(results) == expected
    if mode == "fusion":
        assert expected != new_texts(plain(TEXTS, return_full_text=False, **GREEDY))
    assert pipe(TEXTS[0], **GREEDY) == [{"generated_text": TEXTS[0] + expected[0]}]

    for contexts in (None, CONTEXTS[0], CONTEXTS):
        each = contexts if isinstance(contexts, list) else [contexts] * 2
        expected = [
            answer(model, processor, chat_inputs(processor, chat, context))
            for chat, context in zip(CHATS, each, strict=True)
        ]
        assert (
            new_texts(pipe(CHATS, sharer_context=contexts, return_full_text=False, batch_size=2, **GREEDY)) == expected
        )
        (whole,) = pipe(CHATS[1], sharer_context=each[1], **GREEDY)
        continued = {"role": "assistant", "content": "The capital" + expected[1]}
        assert whole["generated_text"] == [*CHATS[1][:2], continued]
    assert expected != new_texts(pipe(CHATS, return_full_text=False, **GREEDY)), "the context changes the answers"


def test_streamers_generators_and_sequences(capsys: pytest.CaptureFixture) -> None:
    model, processor = pair()
    pipe = pipeline("text-generation", model=model, tokenizer=processor)
    (expected,) = new_texts(pipe(CHATS[0], return_full_text=False, **GREEDY))
    pipe(CHATS[0], streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True), **GREEDY)
    assert capsys.readouterr().out.strip() == expected.strip()
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = threading.Thread(target=pipe, args=(CHATS[0],), kwargs={"streamer": streamer, **GREEDY})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()
    assert new_texts(list(pipe((text for text in TEXTS), return_full_text=False, **GREEDY))) == [
        answer(model, processor, processor(text)) for text in TEXTS
    ]
    sampled = pipe(TEXTS[:2], num_return_sequences=3, max_new_tokens=3, do_sample=True, batch_size=2)
    assert [len(row) for row in sampled] == [3, 3]
    ids = pipe(TEXTS[0], return_tensors=True, **GREEDY)[0]["generated_token_ids"]
    assert torch.equal(torch.tensor([ids]), model.generate(**processor(TEXTS[0]), **GREEDY))


def test_from_a_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its name alone, its receiver's tokenizer, and what the pipeline saves."""
    folder = save_fuser(tmp_path, "fuser")
    model, processor = C2CForCausalLM.from_pretrained(folder), C2CProcessor.from_pretrained(folder)
    expected = answer(model, processor, processor(TEXTS[0]))
    for arguments in ({"model": str(folder)}, {"model": model, "tokenizer": processor.tokenizer}):
        pipe = pipeline("text-generation", **arguments)
        assert new_texts([pipe(TEXTS[0], return_full_text=False, **GREEDY)]) == [expected]
    pipe.save_pretrained(tmp_path / "again")
    again = pipeline("text-generation", model=str(tmp_path / "again"))
    assert new_texts([again(TEXTS[0], return_full_text=False, **GREEDY)]) == [expected]
    assert "is not supported" not in caplog.text


def test_processors_that_do_not_fit() -> None:
    model, processor = pair()
    _, other = pair(mode="memory")
    with pytest.raises(ValueError, match="mode"):
        pipeline("text-generation", model=model, tokenizer=other)
    with pytest.raises(ValueError, match="`tokenizer` must be the fuser's `C2CProcessor`, since none was saved"):
        pipeline("text-generation", model=model, tokenizer=processor.tokenizer)
    pipe = pipeline("text-generation", model=model, tokenizer=processor)
    with pytest.raises(ValueError, match="`sharer_context` has 1 entries for 3 in `text_inputs`"):
        pipe(TEXTS, sharer_context=["one"])
    with pytest.raises(ValueError, match="`handle_long_generation` must be None"):
        pipe(TEXTS[0], handle_long_generation="hole")


def test_registering_changes_nothing_else() -> None:
    code = (
        "from transformers.pipelines import PIPELINE_REGISTRY, TextGenerationPipeline\n"
        "before = {name: dict(task) for name, task in PIPELINE_REGISTRY.to_dict().items()}\n"
        "import c2c_hf\n"
        "after = PIPELINE_REGISTRY.to_dict()\n"
        "assert before.keys() == after.keys()\n"
        "changed = [(n, key) for n in before for key in before[n] if before[n][key] != after[n][key]]\n"
        "assert changed == [('text-generation', 'impl')], changed\n"
        "print('clean')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "clean" and "already registered" not in done.stderr, done.stderr[-2000:]
