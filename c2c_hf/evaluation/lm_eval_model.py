"""The model type `c2c` of lm-evaluation-harness, and its command line with that type and the tasks `c2c_...`."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval._cli import HarnessCLI
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, resolve_max_length
from tqdm.auto import tqdm
from transformers.utils import CONFIG_NAME

from ..checkpoints.download import HUB_KWARGS, find_file
from ..configuration_c2c import C2CConfig
from ..modeling_c2c import C2CForCausalLM
from ..processing_c2c import C2CProcessor
from .methods.answerer import Query
from .methods.c2c_answerer import C2CAnswerer
from .methods.controls import CONTROLS
from .tasks.task import TASK_FOLDER


@register_model("c2c")
class C2CLM(HFLM):
    """A fuser with its base models: `--model c2c --model_args pretrained=FUSER`.

    Each prompt is prefilled and fused once for all its continuations. Conversations are rendered by the chat template
    of each model. Rolling log-likelihoods and empty prompts have no prompt to fuse: they are the receiver's.

    Args:
        pretrained: Folder or Hub id of a fuser with its processor, or a loaded model.
        processor: Its processor; `None`: the one saved with the fuser.
        control: A name in `CONTROLS` whose control needs no other question; `"fusion_off"`: fusion is off.
        receiver: Name or path in place of the recorded receiver.
        sharers: Names or paths in place of the recorded sharers, joined by `+`.
        dtype: Of the base models; `"auto"`: as saved.
        device: Such as `"cuda"`; `None`: where the models are loaded.
        batch_size: Number of prompts per batch.
        max_batch_size: Not used, since `batch_size` is a number.
        max_length: Longest prompt with its continuation, in tokens; `None`: the shortest context of all models.
        chat_template_args: Arguments of chat templates, such as `{"enable_thinking": False}`.

    Raises:
        ValueError: An argument is unknown or has no such value.
    """

    def __init__(
        self,
        pretrained: str | C2CForCausalLM,
        processor: C2CProcessor | None = None,
        control: str = "c2c",
        receiver: str | None = None,
        sharers: str | None = None,
        dtype: str | None = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        chat_template_args: dict[str, Any] | None = None,
    ) -> None:
        if control not in CONTROLS or CONTROLS[control].needs_mismatched:
            known = [name for name, known in CONTROLS.items() if not known.needs_mismatched]
            raise ValueError(f"`control` must be one of {known}, but got {control!r}; `c2c evaluate` has them all.")
        if not str(batch_size).isdecimal():
            raise ValueError(f"`batch_size` must be a number with the model type c2c, but got {batch_size!r}.")
        if isinstance(pretrained, str):
            processor = C2CProcessor.from_pretrained(pretrained) if processor is None else processor
            others = None if sharers is None else sharers.split("+")
            model = C2CForCausalLM.from_pretrained(pretrained, receiver=receiver, sharers=others, dtype=dtype)
            # The harness asks for its own default, "cuda:0", also where there is none, and falls back itself.
            if device is not None and (torch.cuda.is_available() or not device.startswith("cuda")):
                model.to(device)
        else:
            model = pretrained
        if processor is None:
            raise ValueError("`processor` must be given with a loaded model.")
        # The harness truncates prompts on the left.
        processor.tokenizer.truncation_side = "left"
        super().__init__(
            model,
            tokenizer=processor.tokenizer,
            batch_size=int(batch_size),
            max_length=max_length,
            chat_template_args=chat_template_args,
        )
        self.answerer = C2CAnswerer(model, processor, CONTROLS[control])
        self.answerer.chat_template_kwargs = chat_template_args or {}
        self._chats: dict[str, Query] = {}

    @property
    def max_length(self) -> int:
        """The shortest context of all models that run, in tokens."""
        if self._max_length:
            return self._max_length
        model = self.answerer.c2c_model
        models = [model.receiver, *(model.sharers if self.answerer.control.uses_sharers else [])]
        return min(resolve_max_length(model.config, self.tokenizer) for model in models)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render a conversation with the receiver's template, and keep it for the sharers' own templates."""
        rendered = str(super().apply_chat_template(chat_history, add_generation_prompt))
        self._chats[rendered] = Query(chat_history, continues=not add_generation_prompt)
        return rendered

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations, all those of one prompt together."""
        results: dict[int, tuple[float, bool]] = {}
        empty = [index for index, request in enumerate(requests) if not request.args[0]]
        if empty:
            with self.model.disable_fusion():
                unfused = super().loglikelihood([requests[index] for index in empty], disable_tqdm)
            results.update(zip(empty, unfused, strict=True))
        by_prompt: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            if request.args[0]:
                by_prompt.setdefault(request.args[0], []).append(index)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as progress:
            for firsts in self._batches(requests, [row[0] for row in by_prompt.values()]):
                rows = [by_prompt[requests[index].args[0]] for index in firsts]
                texts = [[requests[index].args[1] for index in row] for row in rows]
                longest = max(len(self.tok_encode(text, add_special_tokens=False)) for row in texts for text in row)
                # The last token of a continuation is only predicted, which leaves a spare one: a space may move.
                self.answerer.max_length = self.max_length - longest
                scores = self.answerer.score([self._query(requests[index]) for index in firsts], texts)
                for row, row_scores in zip(rows, scores, strict=True):
                    for index, score in zip(row, row_scores, strict=True):
                        results[index] = (score.logprob, score.is_greedy)
                        self.cache_hook.add_partial("loglikelihood", requests[index].args, results[index])
                    progress.update(len(row))
        return [results[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts without fusion: there is no prompt to fuse."""
        with self.model.disable_fusion():
            return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate answers up to their stop strings."""
        results: dict[int, str] = {}
        same_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            same_settings.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as progress:
            for indices in same_settings.values():
                kwargs = dict(normalize_gen_kwargs(requests[indices[0]].args[1], self.max_gen_toks))
                stop = handle_stop_sequences(kwargs.pop("until"), eos=None)
                max_new_tokens = kwargs.pop("max_gen_toks")
                if not kwargs["do_sample"]:
                    kwargs.pop("temperature", None)
                if max_new_tokens >= self.max_length:
                    raise ValueError(
                        f"`max_gen_toks` must be below the context of {self.max_length}, but got {max_new_tokens}."
                    )
                self.answerer.max_length = self.max_length - max_new_tokens
                for batch in self._batches(requests, indices):
                    queries = [self._query(requests[index]) for index in batch]
                    answers = self.answerer.generate(queries, max_new_tokens, stop, **kwargs)
                    for index, answer in zip(batch, answers, strict=True):
                        results[index] = answer.text
                        self.cache_hook.add_partial("generate_until", requests[index].args, answer.text)
                    progress.update(len(batch))
        return [results[index] for index in range(len(requests))]

    def _query(self, request: Instance) -> Query:
        prompt = request.args[0]
        return self._chats.get(prompt, Query(prompt))

    def _batches(self, requests: Sequence[Instance], indices: Sequence[int]) -> Iterator[list[int]]:
        """Split requests into batches of one kind of prompt each, the longest first."""
        kinds: dict[tuple[bool, bool], list[int]] = {}
        for index in indices:
            query = self._query(requests[index])
            kinds.setdefault((isinstance(query.prompt, str), query.continues), []).append(index)
        for same_kind in kinds.values():
            same_kind.sort(key=lambda index: -len(requests[index].args[0]))
            for start in range(0, len(same_kind), self.batch_size):
                yield same_kind[start : start + self.batch_size]


def run_lm_eval(arguments: Sequence[str]) -> None:
    """Run the command line of lm-evaluation-harness with the model type `c2c` and the tasks `c2c_...`.

    Args:
        arguments: Command-line arguments of `lm_eval`.

    Raises:
        ValueError: The model type is the harness's own `hf`, and the model a fuser.
    """
    arguments = list(arguments)
    if "--tasks" in arguments and "--include_path" not in arguments:
        arguments += ["--include_path", str(TASK_FOLDER)]
    own, sys.argv = sys.argv, ["c2c lm-eval", *arguments]
    try:
        # It parses `sys.argv`, and inserts a missing subcommand there.
        harness = HarnessCLI()
        parsed = harness.parse_args()
        _check_model_type(getattr(parsed, "model", None) or "hf", getattr(parsed, "model_args", None))
        harness.execute(parsed)
    finally:
        sys.argv = own


def _check_model_type(model_type: str, model_args: object) -> None:
    """Refuse a fuser as model of the harness's own type: its log-likelihoods would be the receiver's.

    That type hands over a prompt with its continuation, so that the model cannot know which tokens to fuse.
    """
    if not model_type.startswith(("hf", "huggingface")) or not isinstance(model_args, Mapping):
        return
    name = str(model_args.get("pretrained", ""))
    hub_kwargs = {key: model_args[key] for key in HUB_KWARGS if model_args.get(key) is not None}
    path = find_file(name, CONFIG_NAME, hub_kwargs) if name else None
    if path is not None and json.loads(Path(path).read_text("utf-8")).get("model_type") == C2CConfig.model_type:
        raise ValueError(
            f"`--model {model_type}` cannot score {name!r}, which is a fuser: it does not say where a prompt ends, so "
            "that the log-likelihoods would be the receiver's; use `--model c2c`."
        )
