"""Prefill a sharer with a document once, save its cache, and let the receiver answer questions from it.

    python examples/document_qa.py memory report.txt "Who wrote it?" "When?"      # the package's memory fuser
    c2c fit texts.jsonl --output my-memory && python examples/document_qa.py my-memory report.txt "Who wrote it?"

The receiver never runs over the document: the sharer's cache, saved in one file, may come from another machine.
"""

import argparse
import time
from pathlib import Path

from c2c_hf import SharerCache
from c2c_hf.demo import from_pretrained
from c2c_hf.demo.compare import answer_with_fusion, prefill_document


def main() -> None:
    """Compute or load the document's cache, then answer every question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fuser", help="folder or Hub id of a memory fuser; memory: the package's")
    parser.add_argument("document", type=Path, help="UTF-8 text")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--cache", type=Path, help="file of the sharer's cache (default: beside the document)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()

    document = arguments.document.read_text(encoding="utf-8")
    path = arguments.cache or arguments.document.with_suffix(".cache.safetensors")
    # With its cache at hand the sharer is not needed.
    model, processor = from_pretrained(arguments.fuser, dtype=arguments.dtype, load_sharers=not path.exists())
    if not path.exists():
        start = time.perf_counter()
        size = len(prefill_document(model, processor, document).cache.to_safetensors(path))
        seconds = time.perf_counter() - start
        print(f"The sharer prefilled the document in {seconds:.2f} s; {path} has {size / 1e6:.1f} MB.")

    for question in arguments.questions:
        answer = answer_with_fusion(
            model,
            processor,
            question,
            arguments.max_new_tokens,
            sharer_context=document,
            sharer_cache=SharerCache.from_safetensors(path),
        )
        print(f"\n{question} ({answer.seconds:.2f} s)\n{answer.text}")


if __name__ == "__main__":
    main()
