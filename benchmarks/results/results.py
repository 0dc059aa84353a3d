"""Write every page and part of a page that has figures, from the lines that the measuring scripts left here.

    python -m benchmarks.results.results

These are ABLATIONS.md with its plots, QUANTIZATION.md, and the parts of the README and of docs/ between
`<!-- results:NAME -->` and `<!-- /results -->` (see stated.py). The same lines give the same bytes, and a test fails
where a page differs from them.
"""

from benchmarks.quality import ablations, quant_protocol_a
from benchmarks.results import stated
from benchmarks.shared.besa_runs import RESULTS


def main() -> None:
    """Write all pages."""
    quant_protocol_a.PAGE.write_text(quant_protocol_a.page())
    ablations.write_report(ablations.COMMITTED, RESULTS)
    for path in stated.pages():
        path.write_text(stated.rewritten(path.read_text()))


if __name__ == "__main__":
    main()
