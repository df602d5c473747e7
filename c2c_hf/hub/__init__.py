"""Publishing fusers on the Hugging Face Hub."""
