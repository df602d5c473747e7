"""The task family reading: questions from files, answers by every method, shares of what prefilling gains."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_for_tests import NEEDS, pair, write_rows

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.inference.loglikelihood import continuation_scores

pytest.importorskip("lm_eval", reason=NEEDS)
pytest.importorskip("scipy", reason=NEEDS)

from c2c_hf.evaluation.evaluate import evaluate  # noqa: E402
from c2c_hf.evaluation.methods import c2c_answerer  # noqa: E402
from c2c_hf.evaluation.methods.answerer import ModelAnswerer  # noqa: E402
from c2c_hf.evaluation.methods.registry import build_methods  # noqa: E402
from c2c_hf.evaluation.metrics.exact_match_f1 import answer_scores  # noqa: E402
from c2c_hf.evaluation.reading import compute_reading, headline  # noqa: E402
from c2c_hf.evaluation.tasks.reading import load_reading  # noqa: E402
from c2c_hf.evaluation.tasks.task import Item  # noqa: E402

METHODS = ["receiver", "receiver_with_context", "sharer", "text_to_text", "c2c", "mismatched"]


def rows(count: int = 5) -> list[dict]:
    return [
        {
            "context": f"The keeper counted {i} ships{' before breakfast' * i}.",
            "question": f"Who counted {i} ships?",
            "answers": ["the keeper", "keeper"],
        }
        for i in range(count)
    ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_rows(tmp_path / "ships" / "test.jsonl", rows())
    return tmp_path / "ships" / "test.jsonl"


def run(models: tuple[C2CForCausalLM, C2CProcessor], output: Path, data: Path, **options: object) -> dict:
    settings = {"methods": METHODS, "background_tokens": 3, "max_new_tokens": 4, "batch_size": 2}
    return evaluate(*models, output, tasks=["reading"], data=[data], **{**settings, **options})


def records(folder: Path) -> dict[tuple[str, str], dict]:
    lines = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    return {(record["method"], record["question"]): record for record in map(json.loads, lines)}


def test_files_of_both_kinds(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Who?\n\nThe keeper.\n\nHe."}, {"role": "assistant", "content": " Keeper "}]
    others = [{"messages": chat[:1] + chat}, {"messages": [{"role": "user", "content": "Who?"}, chat[1]]}]
    path = tmp_path / "chats" / "test.jsonl.gz"
    path.parent.mkdir()
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in [{"messages": chat}, *others, *rows(1)])
    task = load_reading(path)
    assert task.name == "chats/test"
    assert [(item.context, item.question, item.answer) for item in task.items] == [
        ("The keeper.\n\nHe.", "Who?", "Keeper"),
        ("The keeper counted 0 ships.", "Who counted 0 ships?", "the keeper"),
    ]
    assert task.items[0].prompt == "Who?\nAnswer with a few words."


def test_a_draw_takes_one_question_of_each_passage_first(tmp_path: Path) -> None:
    asked = [{**row, "question": f"{row['question']} {i}"} for row in rows(4) for i in range(3)]
    write_rows(tmp_path / "test.jsonl", [*asked, asked[0], {**asked[0], "context": "x" * 101}])
    tasks = [load_reading(tmp_path / "test.jsonl", limit, seed, 100) for limit, seed in ((4, 0), (9, 0), (9, 1))]
    assert len({item.context for item in tasks[0].items}) == 4
    ids = [{item.id for item in task.items} for task in tasks]
    assert ids[0] < ids[1] != ids[2]
    assert len(load_reading(tmp_path / "test.jsonl", max_length=100).items) == 12, "no question twice"
    lengths = [len(item.context) for item in tasks[1].items]
    assert lengths == sorted(lengths)


def test_neighbours_exchange_their_passages(tmp_path: Path, data: Path) -> None:
    task = load_reading(data)
    others = task.mismatched_items()
    assert [task.items.index(others[item.id]) for item in task.items] == [1, 0, 3, 2, 3]
    same = [{**row, "context": rows()[4]["context"] if i else row["context"]} for i, row in enumerate(rows())]
    write_rows(tmp_path / "same.jsonl", same)
    task = load_reading(tmp_path / "same.jsonl")
    assert all(task.mismatched_items()[item.id].context != item.context for item in task.items)
    write_rows(tmp_path / "one.jsonl", rows(1))
    with pytest.raises(ValueError, match="'.*one' needs at least two different passages"):
        load_reading(tmp_path / "one.jsonl").mismatched_items()


def test_files_that_cannot_be_used(tmp_path: Path, data: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'.*none.jsonl' does not exist"):
        load_reading(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no question about a passage of at most 5 characters"):
        load_reading(data, max_length=5)
    write_rows(tmp_path / "test.jsonl", [*rows(1), {"context": "The keeper."}])
    with pytest.raises(ValueError, match="line 2 of .* must be an object with `context`"):
        load_reading(tmp_path / "test.jsonl")
    for tasks, files in ((["reading"], []), (["arc_easy"], [data])):
        with pytest.raises(ValueError, match="`data` must name the files of the task 'reading'"):
            evaluate(*pair(mode="memory"), tmp_path / "run", tasks=tasks, data=files)
    with pytest.raises(ValueError, match="`data`: folder and name must differ between the files"):
        evaluate(*pair(mode="memory"), tmp_path / "run", tasks=["reading"], data=[data, data])


def test_log_likelihoods_are_those_of_the_whole_answer(tmp_path: Path, data: Path) -> None:
    model, processor = pair(mode="memory")
    run((model, processor), tmp_path / "run", data)
    found, task = records(tmp_path / "run"), load_reading(data)
    assert len(found) == len(METHODS) * 5
    ids = [*processor.tokenizer("the keeper", add_special_tokens=False)["input_ids"], processor.tokenizer.eos_token_id]

    def c2c(item: Item, context: str) -> float:
        inputs = processor.apply_chat_template([[{"role": "user", "content": item.question}]], sharer_context=context)
        with torch.no_grad():
            return float(continuation_scores(model, inputs, [[ids]]).logprobs.sum())

    def receiver(prompt: str) -> float:
        chat = [{"role": "user", "content": prompt}]
        text = processor.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        whole = torch.tensor([processor.tokenizer(text, add_special_tokens=False)["input_ids"] + ids])
        with torch.no_grad():
            logprobs = model.receiver(input_ids=whole).logits.log_softmax(-1)[0, -len(ids) - 1 : -1]
        return float(logprobs.gather(1, torch.tensor(ids)[:, None]).sum())

    for item in task.items:
        other = task.mismatched_items()[item.id].context
        expected = {
            "receiver": receiver(item.question),
            "receiver_with_context": receiver(f"{item.context}\n\n{item.question}"),
            "c2c": c2c(item, item.context),
            "mismatched": c2c(item, other),
        }
        for method, value in expected.items():
            record = found[method, item.question]
            assert record["loglikelihood"] == pytest.approx(value, abs=1e-3), method
            assert record["num_answer_tokens"] == len(ids)
        assert expected["c2c"] != pytest.approx(expected["mismatched"], abs=1e-2)


@pytest.mark.parametrize("mode", ["fusion", "memory"])
def test_a_run_continues(mode: str, tmp_path: Path, data: Path) -> None:
    models = pair(mode=mode)
    metrics = run(models, tmp_path / "run", data)
    path = tmp_path / "run" / "predictions.jsonl"
    whole = records(tmp_path / "run")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:17]) + lines[17][:9], encoding="utf-8")
    again = run(models, tmp_path / "run", data)
    assert again["reading"] == metrics["reading"]
    assert records(tmp_path / "run").keys() == whole.keys()
    report = (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert report.index("ships/test, containment") < report.index("## ships/test, 5 questions")
    assert all(f"| {method} |" in report for method in METHODS)


def test_other_fusers_reuse_what_no_fuser_changes(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = pair(mode="memory")
    run((model, processor), tmp_path / "first", data)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a baseline is answered again")

    monkeypatch.setattr(ModelAnswerer, "score", fail)
    with torch.no_grad():
        for parameter in model.fuser.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    run((model, processor), tmp_path / "second", data)
    first, second = records(tmp_path / "first"), records(tmp_path / "second")
    for (method, question), record in first.items():
        is_same = record["loglikelihood"] == second[method, question]["loglikelihood"]
        assert is_same == (method not in ("c2c", "mismatched")), method
    with pytest.raises(AssertionError, match="answered again"):
        run((model, processor), tmp_path / "third", data, max_new_tokens=5)


def test_own_states_equal_the_prefilled_context(tmp_path: Path, data: Path) -> None:
    """The receiver's own keys and values as slots leave nothing to lose; either of them alone does."""
    methods = ["receiver_with_context", "c2c", "own_states", "own_states=0", "own_keys", "own_values"]
    run(pair(mode="memory"), tmp_path / "run", data, methods=methods)
    found = records(tmp_path / "run")
    items = {item for _, item in found}
    scores = {name: [found[name, item]["loglikelihood"] for item in sorted(items)] for name in methods}
    torch.testing.assert_close(scores["own_states"], scores["receiver_with_context"], atol=1e-3, rtol=0)
    for name in ("c2c", "own_states=0", "own_keys", "own_values"):
        assert max(abs(a - b) for a, b in zip(scores[name], scores["own_states"], strict=True)) > 0.01


def test_own_states_need_slots_on_the_receivers_tokens() -> None:
    for fields in ({"mode": "fusion"}, {"mode": "memory", "memory_grid": "sharer"}):
        with pytest.raises(ValueError, match="'own_keys' needs a memory fuser of one sharer"):
            build_methods(["own_keys"], *pair(**fields))
    with pytest.raises(ValueError, match="'own_states=0-99' must name receiver layers from 0 to"):
        build_methods(["own_states=0-99"], *pair(mode="memory"))


def test_sharers_prefill_a_batch_once(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, prefill = [], c2c_answerer.prefill_sharer

    def count(*args: object) -> object:
        calls.append(args)
        return prefill(*args)

    monkeypatch.setattr(c2c_answerer, "prefill_sharer", count)
    write_rows(data, rows(4))
    run(pair(mode="memory"), tmp_path / "run", data, methods=["c2c", "mismatched"])
    assert len(calls) == 2, "one call for each of two batches, for two methods that score and generate"


def record(method: str, item: int, loglikelihood: float, contains: float = 0.0, tokens: int = 2) -> dict:
    return {
        **{"task": "t", "method": method, "id": str(item), "context_length": 400 + 200 * item},
        **{"loglikelihood": loglikelihood, "num_answer_tokens": tokens},
        **{"contains": contains, "exact_match": contains, "f1": contains},
    }


def test_shares() -> None:
    values = {"receiver": -6.0, "receiver_with_context": -2.0, "c2c": -3.0, "mismatched": -7.0}
    noise = np.random.default_rng(0).normal(0, 0.1, (20, len(values)))
    rows = [
        record(method, item, value + noise[item, index], float(method == "receiver_with_context" or item % 2))
        for index, (method, value) in enumerate(values.items())
        for item in range(20)
    ]
    (result,) = compute_reading(rows)
    assert result["num_items"] == 20
    likelihood = result["shares"]["loglikelihood"]
    assert likelihood["prefill_gain"] == pytest.approx(2.0, abs=0.1)
    for name, expected in (("memory", 0.75), ("right_over_another", 1.0)):
        low, high = likelihood[name]["interval"]
        assert low < likelihood[name]["value"] < high
        assert likelihood[name]["value"] == pytest.approx(expected, abs=0.05)
    assert likelihood["p_value"] < 1e-6
    assert result["methods"]["c2c"]["loglikelihood"]["value"] == pytest.approx(-1.5, abs=0.05)
    contained = result["shares"]["contains"]
    assert contained["memory"]["value"] == 0.0 and contained["p_value"] == 1.0
    assert [part["num_items"] for part in result["lengths"]] == [1, 3, 5, 10, 1][: len(result["lengths"])]
    lines = list(headline([result]))
    assert lines[0].startswith("**t, log-likelihood per answer token: 7") and "20 questions" in lines[0]


def test_no_share_of_no_gain() -> None:
    rows = [record(m, i, -2.0) for m in ("receiver", "receiver_with_context", "c2c", "mismatched") for i in range(3)]
    (result,) = compute_reading(rows)
    assert result["shares"]["loglikelihood"]["memory"] is None
    assert "t, log-likelihood per answer token**: no share" in next(headline([result]))
    (alone,) = compute_reading([record("c2c", i, -2.0) for i in range(3)])
    assert alone["shares"]["loglikelihood"] is None


@pytest.mark.parametrize(
    ("text", "accepted", "contains"),
    [
        ("It was the Hunter-River.", ["a hunter river"], 1.0),
        ("It was in 1996.", ["199"], 0.0),
        ("它在北京市。", ["北京"], 1.0),
        ("The.", ["the"], 0.0),
    ],
)
def test_containment_compares_whole_words(text: str, accepted: list[str], contains: float) -> None:
    assert answer_scores(text, accepted).contains == contains
