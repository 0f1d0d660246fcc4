"""`python -m hf_zoo.curvature` is `hf-zoo curvature`."""

import sys
from importlib import import_module

if __name__ == "__main__":
    sys.exit(import_module("hf_zoo.measuring").main())
