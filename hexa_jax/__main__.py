"""`python -m hexa_jax`: the same as the command `hexa`."""

import sys

from hexa_jax.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
