"""Time the parts of a training step of the pair that installs from PyPI, 192 prompt and 64 answer tokens a row.

    python examples/benchmark_training.py --dtype bfloat16

The receiver's part is the rest of the forward pass.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections import defaultdict

import torch

from c2c_hf import C2CForCausalLM
from c2c_hf.demo import local_pair


def measure(batch_size: int, hidden_size: int, dtype: str, steps: int) -> str:
    """Return one line of the table."""
    kwargs, sizes = {"dtype": dtype}, {"fuser_hidden_size": hidden_size, "fuser_intermediate_size": hidden_size}
    model = C2CForCausalLM.from_receiver_and_sharers(*local_pair(), kwargs, kwargs, **sizes).train()
    optimizer = torch.optim.AdamW(model.fuser.parameters(), lr=1e-4)
    seconds: dict[str, float] = defaultdict(float)
    for name, module in (("sharer", model.sharers[0].base_model), ("fuser", model.fuser[0])):
        for hook, sign in ((module.register_forward_pre_hook, -1), (module.register_forward_hook, 1)):
            hook(lambda *_, name=name, sign=sign: seconds.update({name: seconds[name] + sign * time.perf_counter()}))
    ids, columns = torch.randint(100, 40000, (batch_size, 256)), torch.arange(256)
    batch = {"sharer_input_ids": ids[:, :192], "logits_to_keep": 65, "labels": ids.masked_fill(columns < 192, -100)}
    batch["sharer_alignment"] = columns.masked_fill(columns >= 191, -1).expand(batch_size, -1)
    for step in range(steps + 1):
        if step == 1:  # the first one warms up
            seconds.clear()
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=ids, use_cache=False, **batch).loss
        forward = time.perf_counter()
        loss.backward()
        seconds["backward"] += time.perf_counter() - forward
        optimizer.step()
        optimizer.zero_grad()
        seconds["all"] += time.perf_counter() - begin
    seconds["receiver"] = 2 * seconds["all"] - sum(seconds.values())
    shares = "".join(f"{seconds[name] / seconds['all']:10.0%}" for name in ("sharer", "receiver", "fuser", "backward"))
    memory, each = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, seconds["all"] / steps
    return f"{batch_size:5} {hidden_size:6} {each:8.2f} {batch_size * 256 / each:8.0f} {memory:9.2f}{shares}"


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--one", type=int, nargs=2, metavar=("BATCH", "HIDDEN"), help="only this line")
if __name__ == "__main__":
    arguments = parser.parse_args()
    if arguments.one:
        sys.exit(print(measure(*arguments.one, arguments.dtype, arguments.steps)))
    print("batch hidden   s/step tokens/s  peak GiB    sharer  receiver     fuser  backward", flush=True)
    for one in (("1", "256"), ("1", "1024"), ("4", "256"), ("4", "1024")):
        subprocess.run([sys.executable, *sys.argv, "--one", *one], check=True)
