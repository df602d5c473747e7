"""The page of `c2c demo --web` as a Hugging Face Space."""

from c2c_hf.demo.web import build_page, launch, load_pairs

page = build_page(*load_pairs())

if __name__ == "__main__":
    launch(page)
