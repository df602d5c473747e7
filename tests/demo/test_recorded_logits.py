"""The fusers that come with the package: logits as recorded when they were trained, whatever the code does since."""

import pytest
import torch

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.demo import shipped_fuser

pytestmark = pytest.mark.real_pair

GAS = "Which gas do plants take in for photosynthesis? Answer with a few words."
JOB = "What is the job of Mara Lind?"
MARA = "Mara Lind works as a baker in Oslo and has a parrot."

#: (fuser, question, context) -> the six largest logits of the last position by token id, and the mean and the
#: standard deviation of all logits (float32, torch 2.13, transformers 5.24).
RECORDED = {
    ("general", GAS, None): (
        {18647: 28.1096, 28829: 27.67773, 15420: 27.21932, 34246: 26.82594, 504: 26.73891, 3902: 26.60791},
        (4.456914, 7.442228),
    ),
    ("general", GAS, MARA): (
        {18647: 28.3052, 28829: 27.89719, 15420: 27.61, 34246: 27.59738, 3902: 27.24686, 504: 27.23599},
        (4.50468, 7.440283),
    ),
    ("memory", JOB, MARA): (
        {504: 31.36412, 61: 30.73138, 8113: 30.18084, 49: 30.13293, 67: 29.1803, 50: 28.99438},
        (3.65741, 7.822691),
    ),
}


@pytest.mark.parametrize(("name", "question", "context"), RECORDED, ids=["general", "general-context", "memory"])
@torch.no_grad()
def test_logits_are_those_recorded(name: str, question: str, context: str | None, real_pair: tuple[str, str]) -> None:
    receiver, sharer = real_pair
    model = C2CForCausalLM.from_pretrained(shipped_fuser(name), receiver=receiver, sharers=sharer, dtype=torch.float32)
    processor = C2CProcessor.from_config(model.config, receiver, sharer)
    inputs = processor.apply_chat_template([{"role": "user", "content": question}], sharer_context=context)
    logits = model(**inputs).logits
    largest, (mean, deviation) = RECORDED[name, question, context]
    # Kernels of other processors round in another order.
    torch.testing.assert_close(logits[0, -1, list(largest)], torch.tensor(list(largest.values())), atol=2e-3, rtol=0)
    assert logits.mean().item() == pytest.approx(mean, abs=1e-3)
    assert logits.std().item() == pytest.approx(deviation, abs=1e-3)
