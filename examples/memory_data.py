"""Write the training data of a memory fuser: sharer-only contexts, and questions about them.

    python examples/memory_data.py data dolly/train.jsonl

`facts.jsonl` holds made-up facts, `passages.jsonl` the rows of a chat data set with a passage behind the question and
a blank line, as in Dolly, and `texts.jsonl` the texts for `c2c fit`: passages and facts.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from c2c_hf.evaluation.tasks.private_facts import private_facts
from c2c_hf.training.dataset import load_rows


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("chats", help="JSON Lines file or Hub id, with a column `messages`")
    parser.add_argument("--facts", type=int, default=9000, help="number of questions about facts")
    parser.add_argument("--fact-texts", type=int, default=2000, help="how many of their contexts are in texts.jsonl")
    parser.add_argument("--passage-texts", type=int, default=400, help="how many passages are in texts.jsonl")
    parser.add_argument("--min-characters", type=int, default=0, help="shortest passage")
    parser.add_argument("--max-characters", type=int, default=800, help="passages are shorter than that")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    facts = private_facts(options.facts, options.seed, "train")
    passages = []
    for row in load_rows(options.chats):
        question, blank, passage = row["messages"][0]["content"].partition("\n\n")
        answer = row["messages"][1]["content"]
        short = len(question) < 200 and len(answer) < 300
        fits = options.min_characters <= len(passage) < options.max_characters
        # A summary needs all of a passage, questions and extractions some of it.
        if blank and short and fits and row.get("category") in (None, "closed_qa", "information_extraction"):
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            passages.append({"id": row["id"], "sharer_context": passage, "messages": messages})
    # In random order, so that the fit holds out some of both. `c2c fit --questions` takes the first facts, whose
    # contexts are not among the texts.
    fitted = [*passages[: options.passage_texts], *facts[len(facts) - options.fact_texts :]]
    contexts = [row["sharer_context"] for row in random.Random(options.seed).sample(fitted, len(fitted))]
    options.folder.mkdir(parents=True, exist_ok=True)
    write(options.folder / "facts.jsonl", facts)
    write(options.folder / "passages.jsonl", passages)
    write(options.folder / "texts.jsonl", [{"text": text} for text in contexts])


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
