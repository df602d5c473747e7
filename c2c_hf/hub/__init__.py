"""Publishing to the Hugging Face Hub and downloading from it."""
