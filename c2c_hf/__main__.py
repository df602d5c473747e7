"""The command `c2c` as `python -m c2c_hf`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
