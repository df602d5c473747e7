"""The shared latent space: several pairs in one run, a third model that joins, and what is saved."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import enlarge_weights
from tokenizers_for_tests import TURN_TEMPLATE, byte_level_tokenizer, metaspace_tokenizer
from training_for_tests import QUESTIONS, base_models, chat_rows, logged_losses, make_model, make_trainer

from c2c_hf import C2CForCausalLM, C2CProcessor, C2CTrainingArguments
from c2c_hf.fusers import fuser_state_dict
from c2c_hf.training.dataset import prepare_dataset
from c2c_hf.training.shared_space import SharedSpaceTrainer, add_sharer, share_encoders

TOKENIZERS = [
    byte_level_tokenizer(),
    metaspace_tokenizer(chat_template=TURN_TEMPLATE),
    byte_level_tokenizer(350, chat_template=TURN_TEMPLATE),
]
FIELDS = {
    "fuser_type": "c2c_shared",
    "shared_hidden_size": 12,
    "shared_num_layers": 3,
    "fuser_hidden_size": 16,
    "fuser_intermediate_size": 16,
    "fuser_dropout": 0.0,
    "unrotate_keys": True,
    "token_alignment": "span",
}


def shared_model(bases: list, receiver: int, sharers: list[int]) -> C2CForCausalLM:
    return C2CForCausalLM.from_receiver_and_sharers(bases[receiver], [bases[index] for index in sharers], **FIELDS)


def processor_of(receiver: int, sharers: list[int]) -> C2CProcessor:
    return C2CProcessor(TOKENIZERS[receiver], [TOKENIZERS[index] for index in sharers], "span")


def trainer_of(folder: Path, models: list[C2CForCausalLM], members: list[tuple[int, list[int]]], **fields):
    processors = [processor_of(receiver, sharers) for receiver, sharers in members]
    data = [prepare_dataset(chat_rows(QUESTIONS), processor) for processor in processors]
    # Unequal data sets: the shorter ones start again.
    data[0] = data[0].select(range(5))
    fields = {"max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", **fields}
    args = C2CTrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, per_device_train_batch_size=4, **fields
    )
    return SharedSpaceTrainer(models, args, data, processors)


def weights(*models: C2CForCausalLM) -> list[dict[str, torch.Tensor]]:
    return [{name: value.clone() for name, value in fuser_state_dict(model.fuser).items()} for model in models]


def parameter_count(modules) -> int:
    return sum(p.numel() for p in {id(p): p for module in modules for p in module.parameters()}.values())


def test_a_third_model_touches_no_weight_of_the_others(tmp_path: Path) -> None:
    """Two models that share with each other are trained, then a third shares with both and both with it."""
    torch.manual_seed(0)
    bases = base_models(sharers=2)
    first, second = shared_model(bases, 0, [1]), shared_model(bases, 1, [0])
    trainer = trainer_of(tmp_path / "two", [first, second], [(0, [1]), (1, [0])])
    initial = weights(first, second)
    trainer.train()
    losses = logged_losses(trainer)
    assert losses[-1] < losses[0]
    trained = weights(first, second)
    for before, after in zip(initial, trained, strict=True):
        assert all(not torch.equal(value, after[name]) for name, value in before.items() if ".groups." in name)

    inputs = processor_of(0, [1])("hello ships")
    with torch.no_grad():
        logits = first.eval()(**inputs).logits
    grown = [add_sharer(model, bases[2], "span") for model in (first, second)]
    third = shared_model(bases, 2, [0, 1])
    share_encoders([*grown, third])
    # One encoder and one set of projectors per model, gates per pair.
    encoders = {id(fuser.encoder): fuser.encoder for model in (*grown, third) for fuser in model.fuser}
    projectors = {id(g.projector): g.projector for m in (*grown, third) for f in m.fuser for g in f.groups}
    gates = {id(g.gate): g.gate for m in (*grown, third) for f in m.fuser for g in f.groups}
    assert len(encoders) == 3
    assert len(projectors) == sum(len(model.fuser[0].groups) for model in (*grown, third))
    whole = parameter_count([model.fuser for model in (*grown, third)])
    assert whole == sum(parameter_count(d.values()) for d in (encoders, projectors, gates))
    assert parameter_count(gates.values()) == 2 * sum(2 * len(m.config.receiver_layer_shapes) for m in (*grown, third))

    members = [(0, [1, 2]), (1, [0, 2]), (2, [0, 1])]
    fresh = weights(*grown, third)
    trainer = trainer_of(tmp_path / "three", [*grown, third], members)
    trainer.train()
    for model, old, kept in zip(grown, (first, second), trained, strict=True):
        own = fuser_state_dict(model.fuser)
        for name, value in kept.items():
            if not name.endswith("gate_temperature"):
                assert torch.equal(own[name], value), name
                assert torch.equal(fuser_state_dict(old.fuser)[name], value), name
        new = {name for name in own if name not in kept}
        assert new and all(name.startswith("fuser.1.") for name in new)
    changed = [
        name
        for before, after in zip(fresh, weights(*grown, third), strict=True)
        for name, value in before.items()
        if not torch.equal(value, after[name])
    ]
    # What joined has been trained: its encoder, its projectors, and the gates of every pair with it.
    for part in ("fuser.1.encoder", "fuser.1.groups.0.gate", "fuser.0.groups.0.projector", "fuser.0.groups.0.gate"):
        assert any(name.startswith(part) for name in changed), part
    with torch.no_grad():
        assert torch.equal(first.eval()(**inputs).logits, logits), "the old pair answers as before"


def test_saved_loaded_and_resumed(tmp_path: Path) -> None:
    """With two sharers, whose projectors are saved once; training goes on from a checkpoint as if never stopped."""
    torch.manual_seed(1)
    bases = base_models(sharers=2)
    members = [(0, [1, 2]), (1, [0])]
    models = [shared_model(bases, *own) for own in members]
    start = copy.deepcopy(weights(*models))
    trainer = trainer_of(tmp_path / "run", models, members, save_strategy="steps", save_steps=3)
    trainer.train()
    trainer.save_model()
    finished = weights(*models)
    assert not any(name.startswith("fuser.1.groups.0.projector") for name in finished[0])
    processor = processor_of(*members[0])
    inputs = processor("hello ships")
    loaded = C2CForCausalLM.from_pretrained(
        tmp_path / "run" / "0", receiver=bases[0], sharers=[bases[1], bases[2]], verify_base_models=False
    )
    assert loaded.fuser[0].groups[0].projector is loaded.fuser[1].groups[0].projector
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, models[0].eval()(**inputs).logits)
    for model, own in zip(models, start, strict=True):
        model.load_state_dict(own, strict=False)
    again = trainer_of(tmp_path / "run", models, members, save_strategy="no")
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for resumed, whole in zip(weights(*models), finished, strict=True):
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_one_pair_is_trained_as_any_other(tmp_path: Path) -> None:
    model = make_model(2, fuser_type="c2c_shared", shared_hidden_size=8, shared_num_layers=2)
    trainer = make_trainer(tmp_path, model, max_steps=4, learning_rate=1e-2, save_strategy="steps", save_steps=2)
    trainer.train()
    finished = weights(model)[0]
    trainer = make_trainer(tmp_path, model, max_steps=4, learning_rate=1e-2)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, finished[name]) for name, value in weights(model)[0].items())


def test_invalid_arguments_are_rejected(tmp_path: Path) -> None:
    bases = base_models(sharers=1)
    model = shared_model(bases, 0, [1])
    with pytest.raises(ValueError, match="must have `fuser_type='c2c_shared'`, but has 'c2c'"):
        add_sharer(make_model(), bases[1])
    other = C2CForCausalLM.from_receiver_and_sharers(
        enlarge_weights(copy.deepcopy(bases[0])), bases[1], **{**FIELDS, "shared_hidden_size": 8}
    )
    with pytest.raises(ValueError, match="the encoders of .* differ in shape"):
        share_encoders([model, other])
    args = C2CTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=r"must be as many as `models` \(1\), but got 0 and 1"):
        SharedSpaceTrainer([model], args, [], [processor_of(0, [1])])
    args = C2CTrainingArguments(str(tmp_path), use_cpu=True, choice_weight=1.0)
    with pytest.raises(ValueError, match="`choice_weight` is not supported"):
        SharedSpaceTrainer([model], args, [[]], [processor_of(0, [1])])
    with pytest.raises(ValueError, match="has one projector for all sharers"):
        make_model(2, fuser_type="c2c_shared", fuser_hidden_size=[8, 16])
