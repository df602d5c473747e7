"""The closed-form fit: exact where it can be, evaluated on held-out tokens, saved, and trained further."""

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from fitting_for_tests import WORDS, memory_pair, texts
from tokenizers_for_tests import byte_level_tokenizer

from c2c_hf import C2CForCausalLM, C2CProcessor, C2CTrainer, C2CTrainingArguments
from c2c_hf.fitting.ridge import aligned_states, fit_ridge
from c2c_hf.fitting.solver import choose_source_layers, layer_targets, score_source_layers
from c2c_hf.fusers.memory import MemoryFuser
from c2c_hf.training.dataset import prepare_dataset


@torch.no_grad()
def test_recovers_the_identity() -> None:
    """Where the sharer prefills the same tokens at the same places, memory equals the receiver's own prefill."""
    model, processor = memory_pair(same=True, sink=0, memory_token_embeddings=0)
    # Without a chat template nothing is in front of the context on either side.
    processor.chat_template = None
    report = fit_ridge(model, processor, texts(120), alphas=[1e-9, 1e-6], choose_layers=False, progress=False)
    assert min(report.r2_keys + report.r2_values) > 0.999
    inputs = processor("hello ships", sharer_context="The keeper counted")
    logits = model(**inputs, logits_to_keep=1).logits
    expected = model.receiver(inputs["input_ids"]).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05)


@torch.no_grad()
def test_is_the_least_squares_solution() -> None:
    """As torch solves the same problem from all tokens at once."""
    # One embedding: there are few tokens.
    model, processor = memory_pair(same=False, memory_token_embeddings=1)
    # The second of two batches is held out.
    report = fit_ridge(model, processor, texts(15)[:16], alphas=[1e-8], held_out_share=0.5, progress=False)
    fuser = model.fuser[0]
    fitted, held = (aligned_states(model, processor, batch, 0, 512) for batch in (texts(15)[:8], texts(15)[8:16]))
    assert report.num_tokens == len(fitted) and report.num_held_out == len(held)
    x = fuser.features(*fuser.standardize(fitted.sharer, fitted.embeddings), 0).double()
    centred = (x - x.mean(0)).T
    keys, values = (states.flatten(1).double() for states in fuser(fitted.sharer, fitted.embeddings)[0])
    # The normal equations: residuals are orthogonal to the features.
    target = torch.cat([fitted.receiver[0], fitted.receiver[len(fitted.receiver) // 2]], -1).double()
    products = centred @ (target - torch.cat([keys, values], -1))
    assert products.abs().max().item() < 1e-3 * (centred @ target).abs().max().item()


def test_a_wide_bottleneck_explains_as_much_as_full_rank() -> None:
    scores = {}
    for rank in (None, 4, 16):
        model, processor = memory_pair(same=False, memory_rank=rank, memory_source_layers=2)
        report = fit_ridge(model, processor, texts(60), batch_size=4, alphas=[1e-2], progress=False)
        scores[rank] = sum(report.r2_keys + report.r2_values)
    assert scores[4] < scores[16] <= scores[None] + 1e-6
    width = model.fuser[0].maps[0].rank_proj.in_features
    model, processor = memory_pair(same=False, memory_rank=width, memory_source_layers=2)
    report = fit_ridge(model, processor, texts(60), batch_size=4, alphas=[1e-2], progress=False)
    assert sum(report.r2_keys + report.r2_values) == pytest.approx(scores[None], abs=1e-3)


@torch.no_grad()
def test_the_best_source_layers_are_chosen() -> None:
    """A sharer that is the receiver with its layers in another order: each layer is found, and recorded."""
    model, processor = memory_pair(same=True, sink=0, memory_token_embeddings=0)
    processor.chat_template = None
    num_layers = len(model.fuser[0].maps)
    fuser = model.fuser[0]
    states = aligned_states(model, processor, texts(40), 0, 512)
    order = list(reversed(range(num_layers)))
    shuffled = [states.sharer[half * num_layers + i] for half in (0, 1) for i in order]
    features = (torch.cat([shuffled[i], shuffled[num_layers + i]], dim=-1) for i in range(num_layers))
    scores = score_source_layers(features, layer_targets(fuser, states.receiver))
    assert choose_source_layers(scores, 1) == [[i] for i in order]
    fit_ridge(model, processor, texts(120), progress=False)
    assert model.config.sharers[0].memory_source_layers == [[i] for i in range(num_layers)]
    assert model.fuser[0].source_layers == model.config.sharers[0].memory_source_layers


@torch.no_grad()
def test_token_embeddings_explain_more() -> None:
    scores = {}
    for name, fields in {"with": {}, "without": {"memory_token_embeddings": 0}}.items():
        model, processor = memory_pair(same=False, **fields)
        report = fit_ridge(model, processor, texts(120), batch_size=4, progress=False)
        scores[name] = sum(report.r2_keys + report.r2_values)
    assert scores["with"] > scores["without"] + 0.1


def test_a_residual_network_starts_at_the_fitted_map() -> None:
    model, processor = memory_pair(same=False, memory_hidden_size=8)
    plain, _ = memory_pair(same=False)
    for each in (model, plain):
        fit_ridge(each, processor, texts(30), batch_size=2, progress=False)
    inputs = processor(["hello", "the capital of France"], sharer_context=["Paris is short", "ships"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_saved_and_loaded(tmp_path) -> None:
    model, processor = memory_pair(same=False, memory_rank=4)
    fit_ridge(model, processor, texts(30), batch_size=2, progress=False)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = C2CForCausalLM.from_pretrained(tmp_path, receiver=model.receiver, sharers=list(model.sharers))
    again = C2CProcessor.from_pretrained(tmp_path)
    inputs = again("hello", sharer_context="ships")
    assert (
        inputs["sharer_alignment"].tolist() == processor("hello", sharer_context="ships")["sharer_alignment"].tolist()
    )
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_training_continues_from_the_fitted_map(tmp_path) -> None:
    """Rows with a sharer-only context: the loss of answers falls, with choice loss, guard loss and checkpoints."""
    model, processor = memory_pair(same=False, memory_rank=8, memory_hidden_size=8)
    fit_ridge(model, processor, texts(30), batch_size=2, progress=False)
    rows = [
        {"question": "hello", "choices": ["ships", "Paris", "café"], "answer": i % 3, "sharer_context": WORDS[i] * 3}
        for i in range(6)
    ]
    template = {"answer_format": "text", "question_template": "{question}", "plain_choices": True}
    examples = prepare_dataset(Dataset.from_list(rows), processor, **template)
    fields = {"per_device_train_batch_size": 6, "max_steps": 40, "learning_rate": 1e-2, "logging_steps": 1}
    args = C2CTrainingArguments(
        str(tmp_path), use_cpu=True, choice_weight=1.0, guard_weight=0.01, report_to="none", save_steps=40, **fields
    )
    trainer = C2CTrainer(model, args, None, examples, examples, processor)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before - 1.0
    with model.disable_fusion():
        assert trainer.evaluate()["eval_loss"] > before - 1.0
    assert (tmp_path / "checkpoint-40" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="`min_fused_fraction` must be 1 in memory mode"):
        C2CTrainer(
            model,
            C2CTrainingArguments(str(tmp_path), use_cpu=True, min_fused_fraction=0.5),
            None,
            examples,
            None,
            processor,
        )


def test_invalid_arguments_are_rejected() -> None:
    model, processor = memory_pair(same=False)
    with pytest.raises(ValueError, match="`texts` must hold more than 10 batches of 8"):
        fit_ridge(model, processor, texts(20), progress=False)
    with pytest.raises(ValueError, match="needs `token_alignment='span'`"):
        C2CProcessor(byte_level_tokenizer(), byte_level_tokenizer(), "identity", mode="memory")
    with pytest.raises(ValueError, match="`alphas`: .* are all too small"):
        fit_ridge(model, processor, texts(1), alphas=[-1.0], batch_size=1, held_out_share=0.5, progress=False)
    with pytest.raises(ValueError, match="`memory_source_layers` of a sharer must hold layers below"):
        MemoryFuser(model.config, replace(model.config.sharers[0], memory_source_layers=[[0]]))
    with pytest.raises(ValueError, match="`memory_grid` must be one of"):
        memory_pair(same=False, memory_grid="both")
    model.config.mode = "fusion"
    with pytest.raises(ValueError, match="`fit_ridge` needs `mode='memory'`"):
        fit_ridge(model, processor, texts(20), progress=False)


@pytest.mark.parametrize("count", [1, 9])
@torch.no_grad()
def test_every_layer_has_its_own_map(count: int) -> None:
    """Also where all of them have the same features, of all sharer layers; features and results are standardized."""
    model, _ = memory_pair(same=False, memory_source_layers=count, memory_hidden_size=4)
    fuser, generator = model.fuser[0], torch.Generator().manual_seed(0)
    for buffer in fuser.buffers():
        buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    torch.nn.init.normal_(fuser.maps[1].residual.down_proj.weight)
    tokens = [torch.randn(5, width, generator=generator) for width in fuser.sharer_widths]
    embeddings = torch.randn(5, fuser.embedding_size, generator=generator)
    states = fuser(tokens, embeddings)
    num_layers = len(fuser.receiver_shapes)
    standardized = (torch.cat(tokens, -1) - fuser.sharer_mean) / fuser.sharer_scale
    parts = standardized.split(fuser.sharer_widths, -1)
    for layer_idx, memory_map in enumerate(fuser.maps):
        features = torch.cat([parts[entry] for entry in fuser.entries(layer_idx)], -1)
        features = torch.cat([features, (embeddings - fuser.embedding_mean) / fuser.embedding_scale], -1)
        residual = memory_map.residual
        gated = torch.nn.functional.silu(residual.gate_proj(features)) * residual.up_proj(features)
        expected = memory_map.out_proj(features) + residual.down_proj(gated)
        for kind, own in enumerate(expected.chunk(2, -1)):
            entry = kind * num_layers + layer_idx
            scale, mean = (b.split(fuser.receiver_widths)[entry] for b in (fuser.receiver_scale, fuser.receiver_mean))
            torch.testing.assert_close(states[layer_idx][kind].flatten(1), own * scale + mean)
    with pytest.raises(ValueError, match="`token_embeddings` must be given"):
        fuser(tokens)
