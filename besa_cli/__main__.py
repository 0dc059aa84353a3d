"""`python -m besa_cli` is the command `besa`."""

import sys

from besa_cli.app import main

if __name__ == "__main__":
    sys.exit(main())
