"""Ask a pair of models a question: answers of the receiver, the sharer, and the receiver on the fused cache.

python examples/generate.py                                       # the pair that installs from PyPI, untrained
python examples/generate.py --fuser general                       # the same pair with the package's trained fuser
python examples/generate.py --fuser me/my-fuser                   # a trained one, its base models by name
python examples/generate.py --receiver Qwen/Qwen3-0.6B --sharer Qwen/Qwen2.5-0.5B-Instruct --dtype bfloat16
"""

import argparse

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.demo import from_pretrained, local_pair, questions
from c2c_hf.demo.compare import compare_models


def main() -> None:
    """Load or build the pair and print the answers with their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", help="default: the first of the demo's questions")
    parser.add_argument("--fuser", help="folder or Hub id of a trained fuser; general or memory: the package's")
    parser.add_argument("--receiver", help="folder or Hub id")
    parser.add_argument("--sharer", help="folder or Hub id")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_args()

    kwargs = {"dtype": arguments.dtype}
    if arguments.fuser is not None:
        model, processor = from_pretrained(arguments.fuser, **kwargs)
    else:
        pair = (arguments.receiver, arguments.sharer)
        receiver, sharer = pair if all(pair) else local_pair()
        model = C2CForCausalLM.from_receiver_and_sharers(
            receiver, sharer, receiver_kwargs=kwargs, sharer_kwargs=kwargs
        )
        processor = C2CProcessor.from_receiver_and_sharers(receiver, sharer)
        print("The fuser is untrained, its gates are closed: C2C equals the receiver.")

    question = arguments.question or questions()[0]["question"]
    print(question)
    for name, answer in compare_models(model, processor, question, arguments.max_new_tokens).items():
        print(f"\n{name} ({answer.seconds:.2f} s):\n{answer.text}")


if __name__ == "__main__":
    main()
