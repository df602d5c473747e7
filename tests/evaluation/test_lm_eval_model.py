"""The model type `c2c` of lm-evaluation-harness, against its own `hf` and our answerers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import randomize_fuser, save_tiny_model
from evaluation_for_tests import CHOICES, NEEDS, PROMPTS, data_dir, pair, save_fuser  # noqa: F401
from processes_for_tests import run_fresh
from tokenizers_for_tests import byte_level_tokenizer

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.cli.main import main

lm_eval = pytest.importorskip("lm_eval", reason=NEEDS)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from c2c_hf.evaluation.lm_eval_model import C2CLM  # noqa: E402
from c2c_hf.evaluation.methods.answerer import Query  # noqa: E402
from c2c_hf.evaluation.tasks.task import TASK_FOLDER  # noqa: E402

CONTINUATIONS = [(prompt, choice) for prompt, row in zip(PROMPTS, CHOICES, strict=True) for choice in row]
PAIRS = [*CONTINUATIONS, ("", "The keeper"), ("Two spaces  ", "end it")]


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def models(control: str = "c2c", batch_size: int = 3, **kwargs) -> tuple[HFLM, C2CLM]:
    model, processor = pair()
    plain = HFLM(model.receiver, tokenizer=processor.tokenizer, batch_size=batch_size, **kwargs)
    return plain, C2CLM(model, processor, control, batch_size=batch_size, **kwargs)


def test_fusion_off_equals_hf() -> None:
    """Log-likelihoods, rolling ones, and answers with stop strings."""
    plain, unfused = models("fusion_off")
    kind = "loglikelihood"
    expected, found = plain.loglikelihood(requests(kind, PAIRS)), unfused.loglikelihood(requests(kind, PAIRS))
    torch.testing.assert_close([a for a, _ in found], [a for a, _ in expected], atol=1e-4, rtol=0)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = [(prompt,) for prompt in PROMPTS]
    for lm in models("fusion_off"), models("c2c"):
        rolling = [one.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for one in lm]
        torch.testing.assert_close(rolling[0], rolling[1], atol=1e-4, rtol=0)
    settings = [{"until": ["ke", "x"], "max_gen_toks": 9}, {"until": [], "max_gen_toks": 5, "do_sample": False}]
    asked = [(prompt, settings[index % 2]) for index, prompt in enumerate(PROMPTS)]
    answers = [one.generate_until(requests("generate_until", asked)) for one in (plain, unfused)]
    assert answers[0] == answers[1]
    assert len(set(answers[0])) == len(PROMPTS)


def test_fused_scores_are_the_answerers() -> None:
    plain, fused = models()
    found = fused.loglikelihood(requests("loglikelihood", CONTINUATIONS))
    rows = fused.answerer.score([Query(prompt) for prompt in PROMPTS], CHOICES)
    expected = [(score.logprob, score.is_greedy) for row in rows for score in row]
    torch.testing.assert_close([a for a, _ in found], [a for a, _ in expected], atol=1e-4, rtol=0)
    receiver = plain.loglikelihood(requests("loglikelihood", CONTINUATIONS))
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, receiver, strict=True)) > 0.1


def test_sharers_render_chats_by_their_own_template() -> None:
    _, fused = models()
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    begun = [*chats[0], {"role": "assistant", "content": "The keeper"}]
    rendered = [fused.apply_chat_template(chat) for chat in chats]
    rendered.append(fused.apply_chat_template(begun, add_generation_prompt=False))
    asked = [(text, {"until": ["<"], "max_gen_toks": 6}) for text in (*rendered, *PROMPTS)]
    answers = fused.generate_until(requests("generate_until", asked))
    queries = [Query(chat) for chat in chats] + [Query(begun, continues=True)] + [Query(prompt) for prompt in PROMPTS]
    assert answers == [fused.answerer.generate([query], 6, ["<"])[0].text for query in queries]
    batch = fused.answerer.tokenize([queries[0]], strip=False)
    assert fused.answerer.tokenizer.decode(batch.input_ids[0]) == rendered[0]


def test_long_prompts_lose_their_beginning() -> None:
    plain, unfused = models("fusion_off", max_length=24)
    asked = [("ships and " * 20 + prompt, choice) for prompt, choice in CONTINUATIONS[:4]]
    expected, found = (one.loglikelihood(requests("loglikelihood", asked)) for one in (plain, unfused))
    # The prompt keeps at least what is left beside the longest continuation of its batch.
    assert len(found) == len(expected)
    batch = unfused.answerer.tokenize([Query(asked[0][0])], strip=True)
    assert batch.input_ids.shape[1] <= 24
    assert unfused.answerer.tokenizer.decode(batch.input_ids[0]).endswith("capital of France?\nAnswer:")
    with pytest.raises(ValueError, match="`max_gen_toks` must be below the context of 24, but got 24"):
        unfused.generate_until(requests("generate_until", [("x", {"until": [], "max_gen_toks": 24})]))


def test_bad_arguments() -> None:
    model, processor = pair()
    with pytest.raises(ValueError, match="`control` must be one of .* but got 'mismatched'"):
        C2CLM(model, processor, "mismatched")
    with pytest.raises(ValueError, match="`batch_size` must be a number with the model type c2c, but got 'auto'"):
        C2CLM(model, processor, batch_size="auto")
    with pytest.raises(ValueError, match="`processor` must be given"):
        C2CLM(model)


def test_the_shortest_context_counts() -> None:
    model, processor = pair()
    model.sharers[0].config.max_position_embeddings = 100
    assert C2CLM(model, processor).max_length == 100
    assert C2CLM(model, processor, "fusion_off").max_length == 256


@pytest.fixture
def fuser(tmp_path: Path) -> Path:
    return save_fuser(tmp_path, "fuser")


def samples(model: str, pretrained: Path, data: Path, task: str = "c2c_arc_easy") -> list[dict]:
    """The harness's results per item; by its library, since its command loads thousands of task files first."""
    manager = TaskManager(include_path=str(TASK_FOLDER), include_defaults=False, metadata={"data_dir": str(data)})
    results = lm_eval.simple_evaluate(
        model=model,
        model_args={"pretrained": str(pretrained)},
        tasks=[task],
        batch_size=4,
        device="cpu",
        task_manager=manager,
    )
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def test_command_line(fuser: Path, data_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """The receiver's numbers from plain `hf` and from `c2c` with fusion off are equal, item by item."""
    own = list(sys.argv)
    arguments = ["--model", "c2c", "--batch_size", "4", "--model_args", f"pretrained={fuser},control=fusion_off"]
    arguments += ["--tasks", "c2c_arc_easy", "--metadata", json.dumps({"data_dir": str(data_dir)}), "--device", "cpu"]
    assert main(["lm-eval", *arguments, "--output_path", str(tmp_path / "out"), "--log_samples"]) == 0
    assert sys.argv == own
    (path,) = (tmp_path / "out").rglob("samples_*.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    unfused = sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])
    plain = samples("hf", fuser.parent / "receiver", data_dir)
    assert len(unfused) == len(plain) == 6
    for found, expected in zip(unfused, plain, strict=True):
        assert found["doc"] == expected["doc"]
        assert [found["acc"], found["acc_norm"]] == [expected["acc"], expected["acc_norm"]]
        pairs = zip(found["filtered_resps"], expected["filtered_resps"], strict=True)
        for (logprob, greedy), (own_logprob, own_greedy) in pairs:
            assert float(logprob) == pytest.approx(float(own_logprob), abs=1e-4)
            assert str(greedy) == str(own_greedy)
    fused = samples("c2c", fuser, data_dir)
    assert [sample["filtered_resps"] for sample in fused] != [sample["filtered_resps"] for sample in plain]


def test_a_fuser_that_needs_no_processor_generates_with_hf(data_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """With an alignment token by token, `hf` loads the fuser as any model, and generates from fused prompts."""
    for seed, name in enumerate(("llama", "qwen3")):
        save_tiny_model(tmp_path / name, name, byte_level_tokenizer(), seed)
    pair_of_names = (tmp_path / "llama", tmp_path / "qwen3")
    model = C2CForCausalLM.from_receiver_and_sharers(*pair_of_names, fuser_hidden_size=16, fuser_intermediate_size=16)
    randomize_fuser(model, 3).save_pretrained(tmp_path / "fuser")
    C2CProcessor.from_receiver_and_sharers(*pair_of_names).save_pretrained(tmp_path / "fuser")
    answers = {
        name: [sample["filtered_resps"] for sample in samples(name, folder, data_dir, "c2c_arc_easy_generate")]
        for name, folder in (("hf", tmp_path / "fuser"), ("c2c", tmp_path / "fuser"))
    }
    assert answers["hf"] == answers["c2c"]
    receiver = samples("hf", tmp_path / "llama", data_dir, "c2c_arc_easy_generate")
    assert answers["c2c"] != [sample["filtered_resps"] for sample in receiver]


def test_the_type_hf_is_refused_for_a_fuser(fuser: Path, capsys: pytest.CaptureFixture) -> None:
    """It would score a continuation without saying where the prompt ends."""
    for words in (["--model", "hf"], ["--model", "hf-auto"], []):
        arguments = [*words, "--model_args", f"pretrained={fuser}", "--tasks", "c2c_arc_easy"]
        assert main(["lm-eval", *arguments]) == 1
        assert "which is a fuser: it does not say where a prompt ends" in capsys.readouterr().err


def test_the_harness_itself_is_refused(tmp_path: Path) -> None:
    """`lm_eval --model hf` with remote code; who imports the package may load the model for other ends."""
    for seed, name in enumerate(("llama", "qwen3")):
        save_tiny_model(tmp_path / name, name, byte_level_tokenizer(), seed)
    model = C2CForCausalLM.from_receiver_and_sharers(tmp_path / "llama", tmp_path / "qwen3", fuser_hidden_size=16)
    model.save_pretrained(tmp_path / "fuser", with_code=True)
    C2CProcessor.from_receiver_and_sharers(tmp_path / "llama", tmp_path / "qwen3").save_pretrained(tmp_path / "fuser")
    code = """
import sys
from lm_eval.models.huggingface import HFLM
try:
    HFLM(sys.argv[1], trust_remote_code=True, device="cpu")
except ValueError as error:
    print(error)
import c2c_hf
HFLM(sys.argv[1], trust_remote_code=True, device="cpu")
"""
    done = run_fresh(code, tmp_path / "fuser")
    assert done.returncode == 0, done.stderr
    assert "use `c2c lm-eval --model c2c`" in done.stdout


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "c2c_hf.evaluation.lm_eval_model", None)
    assert main(["lm-eval", "--help"]) == 1
    assert 'run `pip install "c2c_hf[eval]"`' in capsys.readouterr().err
