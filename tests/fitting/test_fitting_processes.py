"""The closed-form fit by two processes equals that by one."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from fitting_for_tests import memory_pair, texts
from processes_for_tests import needs_fork, run_processes

from c2c_hf.fitting.ridge import fit_ridge


def fit(folder: Path, num_texts: int) -> None:
    from accelerate import PartialState

    model, processor = memory_pair(same=False, memory_source_layers=2)
    options = {"batch_size": 4, "num_selection_tokens": 200, "held_out_share": 0.25, "max_held_out": 100}
    report = fit_ridge(model, processor, texts(num_texts), alphas=[1e-3, 1e-1], progress=False, **options)
    torch.save((asdict(report), model.fuser.state_dict()), folder / f"{PartialState().process_index}.pt")


@needs_fork
@pytest.mark.parametrize("num_texts", [60, 11], ids=["many", "fewer-batches-than-selected"])
def test_two_processes_equal_one(tmp_path: Path, num_texts: int) -> None:
    (tmp_path / "single").mkdir()
    fit(tmp_path / "single", num_texts)
    assert run_processes(2, fit, tmp_path, num_texts) == [0, 0]
    report, weights = torch.load(tmp_path / "single" / "0.pt")
    for index in range(2):
        found, found_weights = torch.load(tmp_path / f"{index}.pt")
        counts = ("num_tokens", "num_held_out", "source_layers", "alphas")
        assert [found[name] for name in counts] == [report[name] for name in counts]
        for name in ("r2_keys", "r2_values"):
            assert found[name] == pytest.approx(report[name], abs=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(found_weights[name], value, rtol=1e-3, atol=1e-4)
