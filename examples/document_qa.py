"""Let a sharer read a document once, save what it has read, and let the receiver answer from that.

    c2c fit texts.jsonl --output my-memory                            # the pair that installs from PyPI
    python examples/document_qa.py my-memory report.txt "Who wrote it?" "When?"

The receiver never reads the document: its states, saved in one file, may as well come from another machine.
"""

import argparse
import time
from pathlib import Path

from c2c_hf import C2CForCausalLM, C2CProcessor, SharerCache


def main() -> None:
    """Read or load the document's states, then answer every question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fuser", help="Hub id or folder of a memory fuser")
    parser.add_argument("document", type=Path, help="UTF-8 text")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--states", type=Path, help="file of the states (default: beside the document)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()

    document = arguments.document.read_text(encoding="utf-8")
    path = arguments.states or arguments.document.with_suffix(".states.safetensors")
    # What has been read already needs no sharer.
    kwargs = {"dtype": arguments.dtype, "load_sharers": not path.exists()}
    model = C2CForCausalLM.from_pretrained(arguments.fuser, **kwargs)
    processor = C2CProcessor.from_pretrained(arguments.fuser)
    if not path.exists():
        start = time.perf_counter()
        inputs = processor("?", sharer_context=document)
        state = SharerCache.prefill(model.sharers[0], inputs["sharer_input_ids"], inputs["sharer_attention_mask"])
        size = len(state.to_safetensors(path))
        print(f"The sharer read the document in {time.perf_counter() - start:.2f} s; {path} has {size / 1e6:.1f} MB.")

    for question in arguments.questions:
        start = time.perf_counter()
        chat = [{"role": "user", "content": question}]
        inputs = processor.apply_chat_template(chat, sharer_context=document)
        state = SharerCache.from_safetensors(path)
        out = model.generate(**inputs, sharer_caches=state, max_new_tokens=arguments.max_new_tokens, do_sample=False)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"\n{question} ({time.perf_counter() - start:.2f} s)\n{answer.strip()}")


if __name__ == "__main__":
    main()
