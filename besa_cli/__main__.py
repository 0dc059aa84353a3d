"""`python -m besa_cli` is the command `besa`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:  # python put the current directory first; what lies there is the user's, not ours
        sys.path.append(sys.path.pop(0))  # last, for a program that is not installed but runs where its source is
    from besa_cli.app import main

    sys.exit(main())
