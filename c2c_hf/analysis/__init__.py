"""What a fuser does: the states it gets and makes, the tokenizers it joins, and what a transmitted cache reveals."""
