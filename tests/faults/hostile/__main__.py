"""Type at every hostile input, and count by kind what is answered rightly.

python tests/faults/hostile                                   # all; part of `make faults`
python tests/faults/hostile --kinds config index --every 3    # a part
python tests/faults/hostile --subset                          # what `make test` does
python tests/faults/hostile --write benchmarks/results/FAULTS.md      # and put the table there
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).parents[2])
sys.path.insert(0, str(Path(__file__).parents[3]))

_NOWHERE = "http://127.0.0.1:9"  # nothing answers there


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases, print the table; 1 if any answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", default=[], metavar="WORD", help="kinds that hold one of these")
    parser.add_argument("--names", nargs="*", default=[], metavar="WORD", help="cases that hold one of these")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every N-th case of a kind")
    parser.add_argument("--fields", type=int, default=11, metavar="N", help="only every N-th wrong value of a field")
    parser.add_argument("--subset", action="store_true", help="the one of each kind that `make test` tries")
    parser.add_argument("--list", action="store_true", help="only list the cases")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table into this file, too")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="besa-hostile-") as place:
        return _campaign(Path(place), options)


def _campaign(place: Path, options: argparse.Namespace) -> int:
    from faults.hostile import liar

    os.environ.update(own_environment(place, liar.serve()))  # before anything imports the hub's library
    from faults.hostile import catalogue

    return catalogue.campaign(place, options)


def own_environment(place: Path, hub: str) -> dict[str, str]:
    """Nothing of the person who runs it, and no network."""
    for name in list(os.environ):
        if name.startswith(("BESA_", "HF_", "XDG_", "http", "HTTP", "no_proxy")):
            del os.environ[name]
    return {
        "HOME": str(place / "home"),
        "BESA_CACHE": str(place / "cache"),
        "HF_HOME": str(place / "hf"),
        "HF_ENDPOINT": hub,
        "HTTP_PROXY": _NOWHERE,
        "HTTPS_PROXY": _NOWHERE,
        "NO_PROXY": "127.0.0.1",
        "TMPDIR": str(place),
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PIP_INDEX_URL": _NOWHERE,
        "PIP_RETRIES": "0",
    }


if __name__ == "__main__":
    sys.exit(main())
