"""Ask a pair of models a question: the receiver alone, the sharer alone, and both through their caches.

python examples/generate.py                                       # the pair that installs from PyPI
python examples/generate.py --receiver Qwen/Qwen3-0.6B --sharer Qwen/Qwen2.5-0.5B-Instruct --dtype bfloat16
python examples/generate.py --fuser me/my-fuser                   # a trained one, its base models by name
"""

import argparse

from c2c_hf import C2CForCausalLM, C2CProcessor
from c2c_hf.demo.compare import answer_side_by_side
from c2c_hf.demo.local_pair import local_pair, questions


def main() -> None:
    """Load or build the pair and print the answers with their times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", help="default: the first of the demo's questions")
    parser.add_argument("--fuser", help="Hub id or folder of a trained fuser")
    parser.add_argument("--receiver", help="Hub id or folder")
    parser.add_argument("--sharer", help="Hub id or folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    arguments = parser.parse_args()

    kwargs = {"dtype": arguments.dtype}
    if arguments.fuser is not None:
        model = C2CForCausalLM.from_pretrained(arguments.fuser, **kwargs)
        processor = C2CProcessor.from_pretrained(arguments.fuser)
    else:
        pair = (arguments.receiver, arguments.sharer)
        receiver, sharer = pair if all(pair) else local_pair()
        model = C2CForCausalLM.from_receiver_and_sharers(
            receiver, sharer, receiver_kwargs=kwargs, sharer_kwargs=kwargs
        )
        processor = C2CProcessor.from_receiver_and_sharers(receiver, sharer)
        print("The fuser is untrained and closed, so C2C equals the receiver alone.")

    question = arguments.question or questions()[0]["question"]
    print(question)
    for name, answer in answer_side_by_side(model, processor, question, arguments.max_new_tokens).items():
        print(f"\n{name} ({answer.seconds:.2f} s):\n{answer.text}")


if __name__ == "__main__":
    main()
