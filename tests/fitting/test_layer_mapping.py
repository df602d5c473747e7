"""The learned layer mapping: the best layers are found, recorded, trained and saved."""

import copy
from pathlib import Path

import pytest
import torch
from fitting_for_tests import texts
from tokenizers_for_tests import byte_level_tokenizer
from training_for_tests import PROCESSOR, logged_losses, make_model, make_processor, make_trainer

from c2c_hf import C2CForCausalLM, C2CProcessor, fit_layer_mapping

LEARNED = {"layer_alignment": "learned", "fusion_source_layers": 2, "fuser_initialization": "zero_output"}


@pytest.mark.parametrize("unrotate_keys", [False, True])
@torch.no_grad()
def test_each_layer_finds_itself(unrotate_keys: bool) -> None:
    """A sharer that is the receiver: every layer is predicted best by itself, and from there by its neighbours."""
    receiver = make_model().receiver
    model = C2CForCausalLM.from_receiver_and_sharers(
        receiver, copy.deepcopy(receiver), layer_alignment="learned", unrotate_keys=unrotate_keys, fuser_hidden_size=8
    )
    processor = C2CProcessor(byte_level_tokenizer(), byte_level_tokenizer(), "identity")
    report = fit_layer_mapping(model, processor, texts(30), progress=False)
    num_layers = len(report.scores)
    assert report.source_layers == [[layer] for layer in range(num_layers)]
    assert all(report.scores[layer][layer] > 0.9 for layer in range(num_layers))
    assert model.config.sharers[0].fusion_source_layers == report.source_layers
    assert model.fuser[0].sources == [[entry] for entry in range(2 * num_layers)]


def test_the_chosen_layers_are_trained_and_saved(tmp_path: Path) -> None:
    """Of the second of two sharers alone; the first has neighbouring layers."""
    model = make_model(2, **LEARNED, fuser_type="c2c_complex", joint_keys_values=True, unrotate_keys=True)
    processor = make_processor(sharers=2)
    first = model.fuser[0]
    report = fit_layer_mapping(model, processor, texts(20), sharer_index=1, progress=False)
    assert model.fuser[0] is first and model.config.sharers[0].fusion_source_layers is None
    num_sharer_layers = len(model.config.sharers[1].layer_shapes)
    expected = [[kind * num_sharer_layers + layer for layer in own for kind in (0, 1)] for own in report.source_layers]
    assert model.fuser[1].sources == expected * 2
    assert [len(own) for own in report.source_layers] == [2] * len(report.scores)
    for scores, own in zip(report.scores, report.source_layers, strict=True):
        assert min(scores[layer] for layer in own) >= max(s for layer, s in enumerate(scores) if layer not in own)

    trainer = make_trainer(tmp_path / "run", model, max_steps=12, learning_rate=1e-2)
    trainer.train()
    losses = logged_losses(trainer)
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    loaded = C2CForCausalLM.from_pretrained(tmp_path, receiver=model.receiver, sharers=list(model.sharers))
    assert loaded.fuser[1].sources == model.fuser[1].sources
    inputs = processor("hello ships")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_invalid_arguments_are_rejected() -> None:
    with pytest.raises(ValueError, match="needs `mode='fusion'` and `layer_alignment='learned'`, but the model has"):
        fit_layer_mapping(make_model(), PROCESSOR, texts(3), progress=False)
    model = make_model(layer_alignment="learned")
    with pytest.raises(ValueError, match="`texts` must hold at least 8 aligned tokens"):
        fit_layer_mapping(model, PROCESSOR, ["", " "], progress=False)
    with pytest.raises(ValueError, match="`fusion_source_layers` of a sharer must hold layers below 3"):
        model.config.sharers[0].fusion_source_layers = [[0], [3]]
        C2CForCausalLM(model.config, model.receiver, list(model.sharers))
