"""Compare the answers of vLLM with prepared slots with those of `model.generate`, and time the first token.

    python examples/vllm/compare.py --data questions.jsonl --documents 20 --questions 2
    python examples/vllm/compare.py --document examples/documents/letter.txt --tokens 1024 4096 --requests 500

Takes the memory fuser of the package, in float32. Rows of a data file hold `context` and `question`; beside a document
stands a file of the same name with the ending .jsonl. On a processor, set VLLM_CPU_KVCACHE_SPACE=1 (GiB).
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

# The scheduler in this process, whose blocks are counted below.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
from vllm import LLM, SamplingParams

from c2c_hf import C2CForCausalLM, C2CProcessor, SharerCache
from c2c_hf.demo import from_pretrained, local_pair
from c2c_hf.serving.context_prompts import ContextPrompt, ContextPrompts, connector_config, prefill_context
from c2c_hf.serving.slot_store import SlotStore


def main() -> None:
    """Answer every question by both, then time the first token and count blocks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="JSON Lines of context and question")
    parser.add_argument("--documents", type=int, default=20, help="how many contexts of the data, the shortest")
    parser.add_argument("--questions", type=int, default=2, help="how many of each context")
    parser.add_argument("--document", type=Path, action="append", default=[], help="UTF-8 text, questions beside it")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--no-prefix-caching", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="time the first token with such contexts")
    parser.add_argument("--repeats", type=int, default=5, help="how often each time is taken, after one to warm up")
    parser.add_argument("--requests", type=int, default=0, help="further requests before blocks are counted")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))

    contexts = read_contexts(arguments)
    model, processor = from_pretrained("memory", dtype="float32")
    with tempfile.TemporaryDirectory() as folder:
        for index, text in enumerate(contexts):
            prefill_context(model.sharers[0], processor, text).to_safetensors(Path(folder, f"{index}.safetensors"))
        asked = [(index, q) for index, questions in enumerate(contexts.values()) for q in questions]
        expected = []
        for index, question in asked:
            inputs = encode(processor, folder, index, list(contexts)[index], question)
            out = model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False)
            expected.append(out[0, inputs["input_ids"].shape[1] :].tolist())
        slots = Path(folder, "slots")
        prompts = ContextPrompts(model, processor, folder, SlotStore(slots))
        llm = LLM(
            local_pair()[0],
            dtype="float32",
            # The text in the prompt, the question and the chat template.
            max_model_len=max([2048, *(tokens + 256 for tokens in arguments.tokens)]),
            enforce_eager=True,
            enable_prefix_caching=not arguments.no_prefix_caching,
            kv_transfer_config=connector_config(slots),
        )
        free = free_blocks(llm)
        encoded = [prompts.encode(message(q), context_id=str(i)) for i, q in asked]
        others = [prompts.encode(message(q), context_id=str((i + 1) % len(contexts))) for i, q in asked]
        for name, batch in (("own context", encoded), ("own context again", encoded), ("another context", others)):
            answers = answer(llm, batch, arguments.max_new_tokens)
            differing = [i for i, pair in enumerate(zip(answers, expected, strict=True)) if pair[0] != pair[1]]
            print(f"{name}: {len(asked) - len(differing)} of {len(asked)} answers equal those of generate.")
            if batch is encoded:
                for i in differing:
                    index, question = asked[i]
                    inputs = encode(processor, folder, index, list(contexts)[index], question)
                    print(f"  {question!r}: {describe(model, inputs, answers[i], expected[i])}")
        for tokens in arguments.tokens:
            time_first_token(llm, prompts, model, processor, Path(folder), contexts, tokens, arguments.repeats)
        for start in range(0, arguments.requests, len(encoded)):
            # So that slots are loaded anew.
            llm.reset_prefix_cache()
            answer(llm, encoded[: arguments.requests - start], 1)
        print(f"Free blocks before: {free}, after: {free_blocks(llm)}.")


def read_contexts(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Return the questions of each context."""
    contexts: dict[str, list[str]] = {}
    if arguments.data is not None:
        found: dict[str, list[str]] = {}
        for line in arguments.data.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.setdefault(row["context"], []).append(row["question"])
        enough = sorted((text for text in found if len(found[text]) >= arguments.questions), key=len)
        contexts = {text: found[text][: arguments.questions] for text in enough[: arguments.documents]}
    for path in arguments.document:
        rows = path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        questions = [json.loads(row)["question"] for row in rows]
        contexts[path.read_text(encoding="utf-8")] = questions[: arguments.questions]
    return contexts


def message(question: str) -> list[dict[str, str]]:
    """Return a chat of one message."""
    return [{"role": "user", "content": question}]


def encode(processor: C2CProcessor, folder: str, index: int, context: str, question: str) -> dict[str, Any]:
    """Return the inputs of the model for a question, with the sharer's cache of its context."""
    inputs = processor.apply_chat_template(message(question), sharer_context=context)
    return {**inputs, "sharer_caches": SharerCache.from_safetensors(Path(folder, f"{index}.safetensors"))}


def answer(llm: LLM, batch: list[ContextPrompt], count: int) -> list[list[int]]:
    """Answer a batch greedily with the engine."""
    sampling = [
        SamplingParams(temperature=0, max_tokens=count, extra_args={"kv_transfer_params": prompt.kv_transfer_params})
        for prompt in batch
    ]
    prompts = [{"prompt_token_ids": prompt.prompt_token_ids} for prompt in batch]
    return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, sampling, use_tqdm=False)]


def describe(model: C2CForCausalLM, inputs: dict[str, Any], found: list[int], expected: list[int]) -> str:
    """Say where two answers part, and how close the logits of the two tokens are there."""
    index = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), None)
    if index is None:
        return f"lengths {len(found)} and {len(expected)}"
    steps = {"output_logits": True, "return_dict_in_generate": True}
    logits = model.generate(**inputs, max_new_tokens=index + 1, do_sample=False, **steps).logits[index][0]
    return f"token {index} differs, with logits {float(logits[expected[index]] - logits[found[index]]):.1e} apart"


def time_first_token(
    llm: LLM,
    prompts: ContextPrompts,
    model: C2CForCausalLM,
    processor: C2CProcessor,
    folder: Path,
    contexts: dict[str, list[str]],
    length: int,
    repeats: int,
) -> None:
    """Print the median and the range of the times to the first token about a context of `length` tokens.

    The engine runs in this process: its processor time tells more than the clock where other work goes on.
    """
    tokenizer = processor.tokenizer
    text = tokenizer.decode((tokenizer("\n\n".join(contexts)).input_ids * 50)[:length])
    question = "What is this about?"
    chat = processor.apply_chat_template(message(f"{text}\n\n{question}"))
    plain = ContextPrompt(chat["input_ids"][0].tolist(), {})

    def load() -> ContextPrompt:
        return prompts.encode(message(question), context_id="long")

    def prepare() -> ContextPrompt:
        (folder / "slots" / f"{key}.safetensors").unlink()
        return load()

    def prefill_sharer() -> None:
        prefill_context(model.sharers[0], processor, text).to_safetensors(folder / "long.safetensors")

    def prefill() -> ContextPrompt:
        prefill_sharer()
        return prepare()

    prefill_sharer()
    key = load().kv_transfer_params["c2c_slots"]

    for name, make, is_cached in (
        ("the text in the prompt", lambda: plain, False),
        ("the text in the prompt, in the prefix cache", lambda: plain, True),
        ("slots, the sharer prefills now", prefill, False),
        ("slots, of the sharer's file", prepare, False),
        ("slots, prepared", load, False),
        ("slots, prepared, in the prefix cache", load, True),
    ):
        times = []
        for _ in range(repeats + 1):
            if not is_cached:
                llm.reset_prefix_cache()
            clock, processor_time = time.perf_counter(), time.process_time()
            answer(llm, [make()], 1)
            times.append((time.process_time() - processor_time, time.perf_counter() - clock))
        # The first call warms up.
        busy, elapsed = (
            f"{statistics.median(column):.2f} s [{min(column):.2f}, {max(column):.2f}]"
            for column in zip(*times[1:], strict=True)
        )
        print(f"{length} tokens, first token with {name}: {busy} of processor time, {elapsed} by the clock.")


def free_blocks(llm: LLM) -> int:
    """Return how many blocks no request holds."""
    return llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


if __name__ == "__main__":
    main()
