"""Train a fuser on chats, multiple choice or prompt/completion rows; `c2c train` does the same from a YAML file.

The pair that installs from PyPI:

    python examples/train.py --train-data chats.jsonl --output-dir my-fuser

Another one (on eight GPUs, with `torchrun --nproc-per-node 8` in front):

    examples/train.py --receiver Qwen/Qwen3-0.6B --sharer Qwen/Qwen2.5-0.5B-Instruct --dtype bfloat16 --bf16
        --train-data teknium/OpenHermes-2.5 --output-dir my-fuser
"""

import argparse

from transformers import set_seed

from c2c_hf import C2CForCausalLM, C2CProcessor, C2CTrainer, C2CTrainingArguments
from c2c_hf.demo import local_pair
from c2c_hf.training.dataset import load_rows


def main() -> None:
    """Build the pair, train on the rows, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--receiver", help="Hub id or folder")
    parser.add_argument("--sharer", help="Hub id or folder")
    parser.add_argument("--train-data", required=True, help="JSON Lines file or Hub id")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--max-steps", type=int, default=300)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", help="of the base models")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    options = parser.parse_args()

    arguments = C2CTrainingArguments(
        options.output_dir, max_steps=options.max_steps, max_length=options.max_length, bf16=options.bf16
    )
    set_seed(arguments.seed)
    pair = (options.receiver, options.sharer) if options.receiver and options.sharer else local_pair()
    kwargs = {"dtype": options.dtype}
    sizes = {"fuser_hidden_size": options.hidden_size, "fuser_intermediate_size": options.hidden_size}
    model = C2CForCausalLM.from_receiver_and_sharers(*pair, kwargs, kwargs, **sizes)
    processor = C2CProcessor.from_receiver_and_sharers(*pair)
    rows = load_rows(options.train_data)

    trainer = C2CTrainer(model, arguments, train_dataset=rows, processing_class=processor)
    trainer.train(resume_from_checkpoint="auto")  # resumes from the last checkpoint if there is one
    trainer.save_model()
    print(f"Saved the fuser and its processor to {options.output_dir}.")


if __name__ == "__main__":
    main()
