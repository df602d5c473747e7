"""Small fast tokenizers, trained on a few sentences; no network."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "The lighthouse keeper counted forty-seven ships before breakfast, and the keeper said hello to the ships.",
    "What is the capital of France? The capital of France is Paris. The user asked the assistant a question.",
    "def fib(n):\n\treturn n if n < 2 else fib(n - 1) + fib(n - 2)\n\nfor i in range(10):\n    print(fib(i))\n",
    "北京的秋天很短，但是天空特别蓝。北京的天空很蓝，秋天特别短。",
    "naïve café déjà vu, the naïve user isn't at the café; it's 9:30pm. Great job, see you at the café 🎉🎉 👩‍🚀",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: Strips contents, renames a role and writes its own BOS.
TURN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<turn>' + ('model' if message['role'] == 'assistant' else "
    "message['role']) + '\n' + message['content'] | trim + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)


@cache
def _byte_level(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer.to_str()


def byte_level_tokenizer(vocab_size: int = 400, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a ChatML template and no BOS of its own: the kind of Qwen and SmolLM2."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level(vocab_size)),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=chat_template,
    )


@cache
def _metaspace(vocab_size: int, prefix_space: bool) -> str:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix_space else "never", split=True
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        # Rare characters stay out of the alphabet, so that they fall back to bytes.
        limit_alphabet=70,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "</turn>", *byte_tokens],
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    # Byte tokens are ordinary entries, not special ones: rebuild with the few that are.
    model = Tokenizer(tokenizer.model)
    model.add_special_tokens(
        [AddedToken(token, special=True) for token in ("<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "</turn>")]
    )
    if prefix_space:
        model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)]
    else:
        model.normalizer = normalizers.Replace(" ", "▁")
        strip = []
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    model.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    return model.to_str()


def metaspace_tokenizer(
    vocab_size: int = 600, prefix_space: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Build a metaspace BPE with byte fallback that writes BOS: Gemma's kind, or with a space in front, Llama 2's."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_metaspace(vocab_size, prefix_space)),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


@cache
def _wordpiece(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator(TEXT[:3], trainer)
    return tokenizer.to_str()


def wordpiece_tokenizer(vocab_size: int = 200) -> PreTrainedTokenizerFast:
    """WordPiece without upper case and accents, BERT's kind; knows neither Chinese characters nor emoji."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_wordpiece(vocab_size)), unk_token="[UNK]")


@cache
def _unigram(vocab_size: int) -> str:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT[:3], trainer)
    return tokenizer.to_str()


def unigram_tokenizer(vocab_size: int = 150) -> PreTrainedTokenizerFast:
    """SentencePiece's Unigram without byte fallback, T5's kind; knows neither Chinese characters nor emoji."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_unigram(vocab_size)), unk_token="<unk>")
