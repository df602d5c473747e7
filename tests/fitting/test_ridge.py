"""The closed-form fit: exact where it can be, evaluated on held-out tokens, saved, and trained further."""

import pytest
import torch
from conftest import tiny_model
from datasets import Dataset
from fitting_for_tests import WORDS, memory_pair, texts
from tokenizers_for_tests import byte_level_tokenizer, metaspace_tokenizer

from c2c_hf import C2CForCausalLM, C2CProcessor, C2CTrainer, C2CTrainingArguments
from c2c_hf.fitting.ridge import aligned_states, fit_ridge
from c2c_hf.training.dataset import prepare_dataset


def test_recovers_the_identity() -> None:
    """Without a sink both models prefill the same tokens, and memory equals the receiver's own prefill."""
    model, processor = memory_pair(same=True, sink=0)
    report = fit_ridge(model, processor, texts(120), alphas=[1e-9, 1e-6], progress=False)
    assert min(report.r2_keys + report.r2_values) > 0.9999
    inputs = processor("hello ships", sharer_context="The keeper counted")
    ids = torch.cat(
        [inputs["sharer_input_ids"], processor.tokenizer("hello ships", return_tensors="pt")["input_ids"]], 1
    )
    with torch.no_grad():
        logits, expected = model(**inputs, logits_to_keep=1).logits, model.receiver(ids).logits[:, -1:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05)


def test_is_the_least_squares_solution() -> None:
    """As torch solves the same problem from all tokens at once."""
    model, processor = memory_pair(same=False)
    # The second of two batches is held out.
    report = fit_ridge(model, processor, texts(15)[:16], alphas=[1e-8], held_out_share=0.5, progress=False)
    fuser = model.fuser[0]
    (sharer_tokens, receiver_tokens), held = (
        aligned_states(model, processor, batch, 0, 512) for batch in (texts(15)[:8], texts(15)[8:16])
    )
    assert report.num_tokens == len(sharer_tokens[0]) and report.num_held_out == len(held[0][0])
    x = fuser.features(sharer_tokens, 0).double()
    centred = (x - x.mean(0)).T
    keys, values = (states.flatten(1).double() for states in fuser(sharer_tokens)[0])
    fitted = torch.cat([keys, values], -1)
    # The normal equations: residuals are orthogonal to the features.
    target = torch.cat([receiver_tokens[0], receiver_tokens[len(receiver_tokens) // 2]], -1).double()
    products = centred @ (target - fitted)
    assert products.abs().max().item() < 1e-3 * (centred @ target).abs().max().item()


def test_a_wide_bottleneck_explains_as_much_as_full_rank() -> None:
    scores = {}
    for rank in (None, 4, 16):
        model, processor = memory_pair(same=False, memory_rank=rank, memory_source_layers=2)
        report = fit_ridge(model, processor, texts(60), batch_size=4, progress=False)
        scores[rank] = sum(report.r2_keys + report.r2_values)
    assert scores[4] < scores[16] <= scores[None] + 1e-6
    width = model.fuser[0].groups[0].out_proj.weight.shape[1]
    model, processor = memory_pair(same=False, memory_rank=width, memory_source_layers=2)
    fit_ridge(model, processor, texts(60), batch_size=4, progress=False)


def test_one_bottleneck_for_all_layers() -> None:
    """It explains less than one of the same rank per layer with far fewer weights, and a wide one explains all."""
    scores, sizes = {}, {}
    for name, fields in {
        "shared 8": {"memory_rank": 8, "memory_shared_bottleneck": True},
        "shared 96": {"memory_rank": 96, "memory_shared_bottleneck": True},
        "own 8": {"memory_rank": 8, "memory_source_layers": 9},
        "full": {"memory_source_layers": 9},
    }.items():
        model, processor = memory_pair(same=False, **fields)
        report = fit_ridge(model, processor, texts(60), batch_size=4, alphas=[1e-2], progress=False)
        scores[name] = sum(report.r2_keys + report.r2_values)
        sizes[name] = sum(parameter.numel() for parameter in model.fuser.parameters())
    assert scores["shared 8"] < scores["own 8"] < scores["full"]
    assert scores["shared 96"] == pytest.approx(scores["full"], abs=1e-3)
    assert sizes["shared 8"] < sizes["own 8"] < sizes["full"]
    # Its hidden states are of unit size, whatever the sizes of the states.
    model, processor = memory_pair(same=False, memory_rank=8, memory_shared_bottleneck=True)
    model.sharers[0].model.layers[1].self_attn.v_proj.weight.data *= 100.0
    fit_ridge(model, processor, texts(60), batch_size=4, progress=False)
    fuser, (sharer_tokens, _) = model.fuser[0], aligned_states(model, processor, texts(60), 0, 512)
    hidden = fuser.down_proj(fuser.features(sharer_tokens, 0))
    assert hidden.std(0).tolist() == pytest.approx([1.0] * 8, rel=0.2)
    assert fuser.sharer_scales.log2().frac().eq(0).all() and fuser.sharer_scales[len(fuser.sharer_scales) // 2 + 1] > 1


def test_a_residual_network_starts_at_the_fitted_map() -> None:
    model, processor = memory_pair(same=False, memory_hidden_size=8)
    plain, _ = memory_pair(same=False)
    for each in (model, plain):
        fit_ridge(each, processor, texts(30), batch_size=2, progress=False)
    inputs = processor(["hello", "the capital of France"], sharer_context=["Paris is short", "ships"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)


def test_slots_of_the_processor() -> None:
    """Rows of unequal contexts and prompts, with several sharers, equal single rows."""
    receiver, first, second = byte_level_tokenizer(), metaspace_tokenizer(), byte_level_tokenizer(vocab_size=330)
    models = [
        tiny_model(n, i, len(t))
        for i, (n, t) in enumerate(zip(("llama", "gemma3", "qwen3"), (receiver, first, second), strict=True))
    ]
    model = C2CForCausalLM.from_receiver_and_sharers(models[0], models[1:], mode="memory")
    processor = C2CProcessor(receiver, [first, second], mode="memory")
    prompts, contexts = ["hello ships", "What is the capital of France?", "café"], ["The keeper", "", "北京的天空很蓝"]
    batch = processor(prompts, sharer_context=contexts)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    for inputs, make in (
        (batch, lambda row: processor(prompts[row], sharer_context=contexts[row])),
        (
            processor.apply_chat_template(chats, sharer_context=contexts),
            lambda row: processor.apply_chat_template(chats[row], sharer_context=contexts[row]),
        ),
    ):
        assert list(inputs) == processor.model_input_names
        with torch.no_grad():
            logits = model(**inputs, logits_to_keep=1).logits
        for row in range(3):
            single = make(row)
            with torch.no_grad():
                expected = model(**single, logits_to_keep=1).logits
            torch.testing.assert_close(logits[row], expected[0], rtol=0, atol=1e-4)
            slots = [(alignment >= 0)[0] for alignment in single["sharer_alignment"]]
            sharer_ids = [ids[0] for ids in single["sharer_input_ids"]]
            if contexts[row]:
                assert sharer_ids[0][0] == first.bos_token_id and slots[0].nonzero()[0] == 1, (
                    "behind the receiver's sink"
                )
                assert [int(slot.sum()) for slot in slots] == [len(sharer_ids[0]) - 1, len(sharer_ids[1])]
                assert slots[1].nonzero()[0] == slots[0].nonzero()[-1] + 1, "one after the other"
            else:
                assert not any(slot.any() for slot in slots)
    plain = receiver("café")["input_ids"]
    assert processor("café", return_tensors=None)["input_ids"] == plain
    decoded = receiver.decode(batch["input_ids"][0], skip_special_tokens=True)
    assert decoded == "hello ships"


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
    with pytest.raises(ValueError, match="`memory_shared_bottleneck` needs `memory_rank`"):
        memory_pair(same=False, memory_shared_bottleneck=True)
    model.config.mode = "fusion"
    with pytest.raises(ValueError, match="`fit_ridge` needs `mode='memory'`"):
        fit_ridge(model, processor, texts(20), progress=False)


@pytest.mark.parametrize("count", [1, 9])
def test_every_layer_has_its_own_map(count: int) -> None:
    """Also where all of them have the same features, of all sharer layers."""
    model, _ = memory_pair(same=False, memory_source_layers=count)
    fuser = model.fuser[0]
    with torch.no_grad():
        fuser.sharer_scales.copy_(2.0 ** torch.arange(len(fuser.sharer_scales)))
        fuser.receiver_scales.copy_(2.0 ** torch.arange(len(fuser.receiver_scales)))
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(5, width, generator=generator) for width in fuser.entry_widths]
    num_layers = len(fuser.receiver_shapes)
    for group in fuser.groups:
        for index, layer_idx in enumerate(group.layers):
            entries = fuser.entries(layer_idx)
            features = torch.cat([tokens[entry] / fuser.sharer_scales[entry] for entry in entries], -1)
            expected = features @ group.out_proj.weight[index].T + group.out_proj.bias[index]
            for kind, own in enumerate(expected.chunk(2, -1)):
                made = fuser(tokens)[layer_idx][kind].flatten(1)
                torch.testing.assert_close(made, own * fuser.receiver_scales[kind * num_layers + layer_idx])
