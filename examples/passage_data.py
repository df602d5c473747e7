"""Write the training data of a memory fuser: questions on passages, and the passages alone.

    python examples/passage_data.py data squad/train.jsonl dolly/train.jsonl --exclude squad/test.jsonl

`questions.jsonl` holds rows with `context`, `question` and `answers`, `texts.jsonl` each passage once, as `text`, for
`c2c fit` and for continuations. Files have these columns, as in SQuAD, or `messages` whose first one holds a passage
behind the question and a blank line, as in Dolly. No passage shares 20 words in a row with a file of `--exclude`.
"""

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from c2c_hf.training.dataset import load_rows
from c2c_hf.training.passages import first_answer, rows_word_runs, word_runs


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files go")
    parser.add_argument("train", nargs="+", help="JSON Lines files or Hub ids")
    parser.add_argument("--exclude", nargs="*", default=[], help="the same: test sets")
    parser.add_argument("--min-characters", type=int, default=250, help="shortest passage")
    parser.add_argument("--max-characters", type=int, default=1500, help="longest passage")
    parser.add_argument("--max-passages", type=int, help="of each file (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.max_passages is not None and options.max_passages < 1:
        parser.error("--max-passages must be at least 1")

    excluded: set[int] = set()
    for name in options.exclude:
        excluded |= rows_word_runs(load_rows(name))
    generator = random.Random(options.seed)
    passages: dict[str, list[dict[str, Any]]] = {}
    for name in options.train:
        own: dict[str, list[dict[str, Any]]] = {}
        for row in passage_questions(load_rows(name)):
            if options.min_characters <= len(row["context"]) <= options.max_characters:
                own.setdefault(row["context"], []).append(row)
        apart = [context for context in own if excluded.isdisjoint(word_runs(context))]
        generator.shuffle(apart)
        passages |= {context: own[context] for context in apart[: options.max_passages]}
        print(f"{name}: {len(apart)} of {len(own)} passages share no text with the files to exclude")
    # In random order, so that the fit holds out some of every file.
    contexts = generator.sample(list(passages), len(passages))
    options.folder.mkdir(parents=True, exist_ok=True)
    write(options.folder / "questions.jsonl", [row for context in contexts for row in passages[context]])
    write(options.folder / "texts.jsonl", [{"text": context} for context in contexts])


def passage_questions(rows: Any) -> Iterator[dict[str, Any]]:
    """Yield rows with `context`, `question` and `answers`; those that lack one are left out."""
    for row in rows:
        if "messages" not in row:
            context, question, answer = row["context"], row["question"], first_answer(row["answers"])
        else:
            context, question, answer = chat_question(row)
        if context.strip() and question.strip() and answer:
            yield {"context": context.strip(), "question": question.strip(), "answers": [answer]}


def chat_question(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """Split a chat of one question into its passage, question and answer."""
    question, _, context = row["messages"][0]["content"].partition("\n\n")
    return (context, question, row["messages"][1]["content"].strip()) if len(row["messages"]) == 2 else ("", "", "")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
