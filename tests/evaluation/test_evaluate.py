"""`evaluate` and `c2c evaluate` as a whole: tables, interruptions, failures and errors."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import randomize_fuser
from evaluation_for_tests import NEEDS, choice_rows, data_dir, pair, save_fuser, write_rows  # noqa: F401

import c2c_hf
from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.checkpoints.receiver_adapter import add_adapter
from c2c_hf.cli.main import main
from c2c_hf.inference.loglikelihood import continuation_scores

pytest.importorskip("lm_eval", reason=NEEDS)
pytest.importorskip("scipy", reason=NEEDS)

from c2c_hf.evaluation.evaluate import evaluate  # noqa: E402
from c2c_hf.evaluation.methods.registry import METHODS, build_methods  # noqa: E402
from c2c_hf.evaluation.run_records import RunFolder  # noqa: E402
from c2c_hf.evaluation.tasks.task import Item, load_tasks  # noqa: E402

#: Values of the parameters in the methods' names.
VALUES = {"<k>": "2", "<l>": "1", "<list>": "0,2", "<share>": "0.4"}
NEED_MORE = ("receiver_with_adapter", "receiver_as_sharer", "same_text_fusion", "swapped_pair", "two_sharers")
#: `own_...` need memory mode, see `test_reading.py`.
PLAIN = [name for name in METHODS if name not in NEED_MORE and not name.startswith("own_")]
ALL = [re.sub("<.*>", lambda match: VALUES[match[0]], name) for name in PLAIN]


@pytest.fixture(scope="module")
def fuser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved fuser beside its base models."""
    return save_fuser(tmp_path_factory.mktemp("fuser"), "tiny")


def predictions(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_leaves_evidence(fuser: Path, data_dir: Path, capsys: pytest.CaptureFixture) -> None:  # noqa: F811
    output = data_dir.parent / "run"
    arguments = ["evaluate", str(fuser), "--data-dir", str(data_dir), "--output", str(output), "--batch-size", "4"]
    arguments += ["--background-tokens", "8", "--tasks", "arc_easy", "ceval_letter"]
    assert main([*arguments, "--methods", *ALL]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    shown = {(result["task"], result["method"]) for result in metrics["results"]}
    # The best layers are chosen among all.
    every_layer = {f"single_layer={layer}" for layer in range(3)}
    assert shown == {(task, method) for task in ("arc_easy", "ceval_letter") for method in {*ALL, *every_layer}}
    for result in metrics["results"]:
        assert result["interval"][0] <= result["value"] <= result["interval"][1]
        assert result["num_items"] == {"arc_easy": 6, "ceval_letter": 4}[result["task"]]
        assert result["num_failed"] == 0
        assert re.search(rf"{result['task']} +{re.escape(result['method'])} ", printed)
    assert [gain["task"] for gain in metrics["pairing_gain"]] == ["arc_easy", "ceval_letter"]
    assert metrics["seed"] == 0
    assert metrics["versions"]["transformers"]
    # Methods that switch fusion off agree with the receiver, item by item.
    scores = {(r["task"], r["method"], r["id"]): r["scores"] for r in predictions(output)}
    for task, method, item in scores:
        if method in ("fusion_off", "closed_gates"):
            assert scores[task, method, item] == pytest.approx(scores[task, "receiver", item], abs=1e-4)
    report = (output / "report.md").read_text(encoding="utf-8")
    # The tests run on a processor.
    assert "C2C's prefill includes the sharers', which run beside the receiver where that is faster." in report
    assert report.index("Pairing gain, arc_easy") < report.index("## arc_easy")
    assert all(f"| {method} |" in report for method in ALL)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert config["receiver_fingerprint"]
    assert config["fuser"] == str(fuser)


def test_generated_answers_with_every_method(data_dir: Path) -> None:  # noqa: F811
    model, processor = pair(sharers=2)
    output = data_dir.parent / "run"
    methods = ["receiver", "sharer", "text_to_text", "c2c", "mismatched", "fusion_off"]
    metrics = evaluate(
        model,
        processor,
        output,
        ["arc_easy_generate", "gsm8k_generate"],
        methods,
        data_dir,
        max_new_tokens=6,
        background_tokens=8,
    )
    shown = {result["method"] for result in metrics["results"]}
    assert shown == {*methods, "sharer_0", "sharer_1"} - {"sharer"}
    assert {result["metric"] for result in metrics["results"]} == {"accuracy", "accuracy_strict"}
    records = predictions(output)
    assert all(record["num_tokens"] > 0 and record["prompt_tokens"] > 0 for record in records)
    answers = {(r["task"], r["method"], r["id"]): r["text"] for r in records}
    same = [answers[task, "receiver", item] == text for (task, m, item), text in answers.items() if m == "fusion_off"]
    assert same and all(same)
    assert any(answers[t, "receiver", i] != text for (t, m, i), text in answers.items() if m == "c2c")
    with pytest.raises(ValueError, match=r"'routing' .*\['arc_easy_generate'\] generate answers"):
        evaluate(model, processor, output, ["arc_easy_generate"], ["routing"], data_dir)


def test_plots(data_dir: Path) -> None:  # noqa: F811
    pytest.importorskip("matplotlib", reason=NEEDS)
    model, processor = pair()
    output = data_dir.parent / "run"
    evaluate(model, processor, output, ["arc_easy"], ["receiver", "c2c"], data_dir)
    report = (output / "report.md").read_text(encoding="utf-8")
    for name in ("accuracy.png", "latency.png", "subjects.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in report


def test_batch_size_makes_no_difference(data_dir: Path) -> None:  # noqa: F811
    model, processor = pair()
    scores = []
    for size in (1, 4):
        output = data_dir.parent / f"run-{size}"
        methods = ["sharer", "c2c", "mismatched", "noise"]
        evaluate(model, processor, output, ["arc_easy"], methods, data_dir, batch_size=size)
        scores.append({(r["method"], r["id"]): r for r in predictions(output)})
    assert scores[0].keys() == scores[1].keys()
    for key, record in scores[0].items():
        assert record["scores"] == pytest.approx(scores[1][key]["scores"], abs=1e-3)
        assert record["prediction"] == scores[1][key]["prediction"]


def test_predictions_are_per_token_and_right_is_counted(data_dir: Path) -> None:  # noqa: F811
    model, processor = pair()
    output = data_dir.parent / "run"
    evaluate(model, processor, output, ["arc_easy"], ["c2c"], data_dir)
    for record in predictions(output):
        means = [score / count for score, count in zip(record["scores"], record["num_tokens"], strict=True)]
        assert record["prediction"] == means.index(max(means))
        assert record["correct"] == (record["prediction"] == record["answer"])
        assert 1 / len(means) <= record["confidence"] <= 1


def test_a_killed_run_goes_on(fuser: Path, data_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """After `kill -9` the same command answers the rest, and nothing twice."""
    write_rows(data_dir / "arc_easy" / "test.jsonl", choice_rows(14))
    output = tmp_path / "run"
    command = ["evaluate", str(fuser), "--tasks", "arc_easy", "--methods", "receiver", "c2c"]
    command += ["--data-dir", str(data_dir), "--output", str(output), "--batch-size", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(c2c_hf.__file__).parent.parent)}
    code = "import sys; from c2c_hf.cli.main import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    file = output / "predictions.jsonl"
    deadline = time.monotonic() + 120
    while not (file.exists() and file.read_bytes().count(b"\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = predictions(output) if file.read_bytes().endswith(b"\n") else predictions(output)[:-1]
    assert 2 < len(before) < 28
    # As if the kill had come within a line.
    with file.open("a", encoding="utf-8") as handle:
        handle.write('{"task": "arc_easy", "meth')
    assert main(command) == 0
    records = predictions(output)
    assert records[: len(before)] == before
    assert len({(record["method"], record["id"]) for record in records}) == len(records) == 28


def test_a_failing_item_counts_as_wrong_and_is_listed(data_dir: Path) -> None:  # noqa: F811
    rows = choice_rows()
    rows[3]["question"] = "ships " * 300
    write_rows(data_dir / "arc_easy" / "test.jsonl", rows)
    model, processor = pair()
    output = data_dir.parent / "run"
    metrics = evaluate(model, processor, output, ["arc_easy"], ["receiver", "c2c"], data_dir)
    for result in metrics["results"]:
        assert (result["num_items"], result["num_failed"], result["num_without_answer"]) == (6, 1, 1)
    failed = [record for record in predictions(output) if "error" in record]
    assert [(record["id"], record["correct"]) for record in failed] == [("q3", 0)] * 2
    report = (output / "report.md").read_text(encoding="utf-8")
    assert "Failed items, counted as wrong" in report
    assert "- arc_easy, c2c, q3: ValueError: `queries`: the text has" in report


def test_folders_of_another_run(data_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    model, processor = pair()
    output = tmp_path / "run"
    evaluate(model, processor, output, ["arc_easy"], ["receiver"], data_dir, limit=3)
    with pytest.raises(ValueError, match=r"was started with limit=3, not 4; choose another folder"):
        evaluate(model, processor, output, ["arc_easy"], ["receiver"], data_dir, limit=4)
    randomize_fuser(model, 10)
    with pytest.raises(ValueError, match="was started with fuser_sha256="):
        evaluate(model, processor, output, ["arc_easy"], ["receiver"], data_dir, limit=3)
    randomize_fuser(model, 9)
    # A further method joins those that are answered.
    metrics = evaluate(model, processor, output, ["arc_easy"], ["c2c"], data_dir, limit=3)
    assert {result["method"] for result in metrics["results"]} == {"receiver", "c2c"}
    assert len(predictions(output)) == 6
    file = output / "predictions.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    for damaged, message in (
        (lines[1][:20], "line 2 is not JSON"),
        ('{"task": "arc_easy"}', r"line 2 lacks \['method'"),
    ):
        file.write_text("\n".join([lines[0], damaged, *lines[2:]]) + "\n", encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            RunFolder(output, json.loads((output / "config.json").read_text(encoding="utf-8")))
    with pytest.raises(ValueError, match="`output` must be a folder, but"):
        RunFolder(file, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "arc_hard"], r"`tasks` must be among \["),
        (["--methods", "telepathy"], r"`methods` must be among \['receiver'.*but got \['telepathy'\]"),
        (["--methods", "receiver_with_adapter"], "'receiver_with_adapter' needs `adapter`"),
        (["--methods", "receiver_as_sharer"], "'receiver_as_sharer' needs `self_fuser`"),
        (["--methods", "swapped_pair"], "'swapped_pair' needs `swapped_fuser`"),
        (["--methods", "two_sharers"], "'two_sharers' needs `two_sharer_fuser`"),
        (["--methods", "few_shot"], r"but got \['few_shot'\]"),
        (["--methods", "few_shot=0"], "'few_shot=0' must end with a number above 0 up to 16"),
        (["--methods", "oracle_enrichment=x"], "'oracle_enrichment=x' must end with a number above 0"),
        (["--methods", "best_layers=4"], "'best_layers=4' must end with a number above 0 up to 3"),
        (["--methods", "single_layer=3"], "'single_layer=3' must name receiver layers from 0 to 2"),
        (["--methods", "layers=0,x"], r"'layers=0,x' has no parameter of the right kind \(invalid literal"),
        (["--methods", "last=1.5"], r"'last=1.5' has no parameter of the right kind \(`share` must be in"),
        (["--tasks", "openbookqa"], r"`data_dir` has no file '.*openbookqa/test.jsonl'"),
    ],
)
def test_errors(
    arguments: list[str],
    message: str,
    fuser: Path,
    data_dir: Path,  # noqa: F811
    capsys: pytest.CaptureFixture,
) -> None:
    command = ["evaluate", str(fuser), "--data-dir", str(data_dir), "--output", str(data_dir.parent / "run")]
    assert main([*command, "--tasks", "arc_easy", *arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(f"^c2c evaluate: .*{message}", error)


def test_a_memory_fuser_needs_contexts(data_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    model, processor = pair(mode="memory")
    with pytest.raises(ValueError, match=r"`tasks`: \['arc_easy'\] have no contexts"):
        evaluate(model, processor, tmp_path / "run", ["arc_easy"], ["c2c"], data_dir)


def test_taught_facts_name_the_mismatched_question(tmp_path: Path) -> None:
    """The control prefills the same question about another person, and records say whether that fact is named."""
    model, processor = pair()
    methods, tasks = ["receiver", "c2c", "mismatched"], ["taught_facts", "taught_facts_generate"]
    metrics = evaluate(model, processor, tmp_path / "run", tasks, methods, limit=4, chat=False)
    assert [gain["task"] for gain in metrics["pairing_gain"]] == tasks
    shown = {(row["task"], row["method"], row["metric"]) for row in metrics["results"]}
    assert {(task, method, "mismatched_answer") for task in tasks for method in methods} <= shown
    assert "answer of the mismatched question" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    (task,) = load_tasks(tasks[:1], limit=4)
    answered = [record for record in predictions(tmp_path / "run") if record["task"] == task.name]
    scores = {(record["method"], record["id"]): record for record in answered}
    for item in task.items:
        other = task.mismatched_items()[item.id]
        assert other.prompt == item.doc["mismatched_question"] != item.prompt
        record = scores["mismatched", item.id]
        assert record["mismatched"] == (record["prediction"] == item.doc["mismatched_answer"])
        assert record["scores"] != scores["c2c", item.id]["scores"]


def test_contexts_are_prefilled_where_a_method_says_so(tmp_path: Path) -> None:
    model, processor = pair(mode="memory")
    methods = ["receiver", "receiver_with_context", "sharer", "c2c", "same_text_fusion", "mismatched", "zero"]
    methods.append("fusion_off")
    settings = {"limit": 5, "fusion_fuser": pair()}
    metrics = evaluate(model, processor, tmp_path / "run", ["private_facts"], methods, **settings)
    assert [gain["task"] for gain in metrics["pairing_gain"]] == ["private_facts"]
    assert not any(result["num_failed"] for result in metrics["results"])
    scores: dict[str, dict[str, list[float]]] = {}
    for record in predictions(tmp_path / "run"):
        scores.setdefault(record["method"], {})[record["id"]] = record["scores"]
    (task,) = load_tasks(["private_facts"], limit=5)
    mismatched = task.mismatched_items()
    for item in task.items:
        assert item.context and item.context not in item.prompt
        assert mismatched[item.id].context != item.context

        def expected(prompt: str, context: str | None, item: Item = item) -> list[float]:
            inputs = processor([prompt], sharer_context=context)
            seam = processor.tokenizer(prompt)["input_ids"]
            ids = [processor.tokenizer(prompt + choice)["input_ids"][len(seam) :] for choice in item.choices]
            return pytest.approx(continuation_scores(model, inputs, [ids]).logprobs.sum(1).tolist(), abs=1e-3)

        assert scores["c2c"][item.id] == expected(item.prompt, item.context)
        assert scores["mismatched"][item.id] == expected(item.prompt, mismatched[item.id].context)
        assert scores["receiver_with_context"][item.id] == expected(f"{item.context}\n\n{item.prompt}", None)
        assert scores["receiver"][item.id] == expected(item.prompt, None)
        assert scores["fusion_off"][item.id] == pytest.approx(scores["receiver"][item.id], abs=1e-4)
    for name in ("receiver_with_context", "c2c", "same_text_fusion", "mismatched", "zero"):
        assert scores[name] != scores["receiver"]
    for name in ("closed_gates", "all_gates_open", "single_layer=1", "best_layers=1", "fuse_only", "project_only"):
        with pytest.raises(ValueError, match=f"'{'single_layer=0' if 'best' in name else name}' needs gates"):
            evaluate(model, processor, tmp_path / "other", ["private_facts"], [name], limit=5)
    with pytest.raises(ValueError, match="'same_text_fusion' needs `fusion_fuser`"):
        evaluate(model, processor, tmp_path / "other", ["private_facts"], ["same_text_fusion"], limit=5)


def test_best_layers_are_chosen_on_other_items(data_dir: Path) -> None:  # noqa: F811
    model, processor = pair()
    output = data_dir.parent / "run"
    evaluate(model, processor, output, ["arc_easy"], ["best_layers=2"], data_dir)
    evaluate(model, processor, output, ["arc_easy"], ["layers=0,1", "layers=0,2", "layers=1-2"], data_dir)
    records = predictions(output)
    scores = {(r["method"], r["id"]): r["scores"] for r in records}

    def quality(layer: int, item: str) -> float:
        record = next(r for r in records if (r["method"], r["id"]) == (f"single_layer={layer}", item))
        means = [score / count for score, count in zip(record["scores"], record["num_tokens"], strict=True)]
        return torch.tensor(means).softmax(0)[record["answer"]].item()

    (task,) = load_tasks(["arc_easy"], str(data_dir))
    items = [item.id for item in sorted(task.items, key=lambda item: item.seed(0))]
    names = {(0, 1): "layers=0,1", (0, 2): "layers=0,2", (1, 2): "layers=1-2"}
    for half, others in ((items[:3], items[3:]), (items[3:], items[:3])):
        best = sorted(range(3), key=lambda layer: -sum(quality(layer, item) for item in others))[:2]
        for item in half:
            assert scores["best_layers=2", item] == pytest.approx(scores[names[tuple(sorted(best))], item], abs=1e-4)


def test_other_fusers(data_dir: Path) -> None:  # noqa: F811
    """A pair the other way round, and one with a second sharer."""
    model, processor = pair()
    swapped = C2CForCausalLM.from_receiver_and_sharers(
        model.sharers[0], model.receiver, fuser_hidden_size=8, fuser_intermediate_size=8
    )
    other = (randomize_fuser(swapped, 4), C2CProcessor(processor.sharer_tokenizers[0], processor.tokenizer))
    output, methods = data_dir.parent / "run", ["receiver", "sharer", "c2c", "swapped_pair", "two_sharers"]
    evaluate(
        *(model, processor, output, ["arc_easy"], methods, data_dir),
        swapped_fuser=other,
        two_sharer_fuser=pair(sharers=2),
    )
    scores = {(r["method"], r["id"]): r["scores"] for r in predictions(output)}
    for method in ("swapped_pair", "two_sharers"):
        for base in ("receiver", "sharer", "c2c"):
            assert any(scores[method, f"q{i}"] != pytest.approx(scores[base, f"q{i}"], abs=1e-2) for i in range(6))
    with pytest.raises(ValueError, match="the receiver of the fuser for 'swapped_pair' is not the first sharer"):
        build_methods(["swapped_pair"], model, processor, swapped_fuser=(model, processor))
    with pytest.raises(ValueError, match="'two_sharers' needs a fuser with several sharers"):
        build_methods(["two_sharers"], model, processor, two_sharer_fuser=(model, processor))


def test_lists(capsys: pytest.CaptureFixture) -> None:
    assert main(["evaluate", "--tasks", "?"]) == 0
    printed = capsys.readouterr().out
    assert "arc_challenge_generate" in printed
    assert all(name in printed for name in METHODS)


# Asked for by peft itself.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_and_the_receiver_as_sharer(data_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    peft = pytest.importorskip("peft")
    model, processor = pair()
    base = build_methods(["receiver"], model, processor)["receiver"].base_model
    before = {name: value.clone() for name, value in base.state_dict().items()}
    adapted = peft.get_peft_model(
        type(base)(base.config), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "lora")
    itself = C2CForCausalLM.from_receiver_and_sharers(
        model.receiver, model.receiver, token_alignment="identity", fuser_hidden_size=16, fuser_intermediate_size=16
    )
    own = (randomize_fuser(itself, 4), C2CProcessor(processor.tokenizer, [processor.tokenizer]))
    evaluate(
        model,
        processor,
        tmp_path / "run",
        ["arc_easy"],
        ["receiver", "receiver_with_adapter", "receiver_as_sharer"],
        data_dir,
        adapter=str(tmp_path / "lora"),
        self_fuser=own,
    )
    scores = {(r["method"], r["id"]): r["scores"] for r in predictions(tmp_path / "run")}
    for method in ("receiver_with_adapter", "receiver_as_sharer"):
        assert any(scores[method, f"q{i}"] != pytest.approx(scores["receiver", f"q{i}"], abs=1e-2) for i in range(6))
    assert all(before[name].equal(value) for name, value in base.state_dict().items()), "the receiver stays as it was"
    methods = build_methods(["receiver_with_adapter"], model, processor, adapter=str(tmp_path / "lora"))
    expected = peft.PeftModel.from_pretrained(deepcopy(base), tmp_path / "lora")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(methods["receiver_with_adapter"].model(ids).logits, expected(ids).logits)


def test_a_fuser_with_an_adapter(data_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    """The method `receiver` is without the adapter; `fusion_off` is with it."""
    peft = pytest.importorskip("peft")
    model, processor = pair()
    plain, _ = pair()
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    add_adapter(model.receiver, config)
    methods = ["receiver", "receiver_with_adapter", "fusion_off", "c2c"]
    evaluate(model, processor, tmp_path / "run", ["arc_easy"], methods, data_dir)
    evaluate(plain, processor, tmp_path / "plain", ["arc_easy"], ["receiver", "c2c"], data_dir)
    scores = {(r["method"], r["id"]): r["scores"] for r in predictions(tmp_path / "run")}
    without = {(r["method"], r["id"]): r["scores"] for r in predictions(tmp_path / "plain")}
    for index in range(6):
        item = f"q{index}"
        assert scores["receiver", item] == pytest.approx(without["receiver", item], abs=1e-4)
        assert scores["fusion_off", item] == pytest.approx(scores["receiver_with_adapter", item], abs=1e-4)
        assert scores["receiver_with_adapter", item] != pytest.approx(scores["receiver", item], abs=1e-3)
        assert scores["c2c", item] != pytest.approx(without["c2c", item], abs=1e-3)
    # The same adapter from the folder of a fuser; then the receiver that has it is not touched.
    model.save_pretrained(tmp_path / "fuser")
    adapter = str(tmp_path / "fuser")
    evaluate(plain, processor, tmp_path / "lora", ["arc_easy"], ["receiver_with_adapter"], data_dir, adapter=adapter)
    for record in predictions(tmp_path / "lora"):
        assert record["scores"] == pytest.approx(scores["receiver_with_adapter", record["id"]], abs=1e-3)
    settings = [json.loads((tmp_path / run / "config.json").read_text(encoding="utf-8")) for run in ("run", "plain")]
    assert settings[0]["fuser_sha256"] != settings[1]["fuser_sha256"]
