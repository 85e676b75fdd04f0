"""Compare finished runs in a table.

python scripts/compare.py runs/sweep/…                         prints it
python scripts/compare.py runs/sweep/…/ledger.sqlite           with the swept values
python scripts/compare.py runs/sweep/… --into docs/pitfalls.md  replaces the table of a page
python scripts/compare.py runs/sweep/… --html compare.html      writes a page with pictures
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causal_lm import cli
from causal_lm.report.files import write_text
from causal_lm.report.seeds import group, seed_table
from causal_lm.report.table import common_cells, sweep_table

BEGIN, END = "<!-- table -->", "<!-- /table -->"


def markdown_table(summaries: Sequence[dict[str, Any]]) -> str:
    """One row per run, for a Markdown page."""
    head = ["preset", "reported, nats", "true, nats", "perplexity ÷ that of the floor",
            "legal transitions", "PAD or EOS generated", "preflight"]  # fmt: skip
    rows = [[f"`{s['experiment']}`", *common_cells(s)] for s in summaries]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "paths", nargs="+", type=Path, help="folders of runs or sweeps, and ledgers"
    )
    parser.add_argument(
        "--into", type=Path, metavar="PAGE", help=f"replace what is between {BEGIN} and {END}"
    )
    parser.add_argument("--html", type=Path, metavar="PAGE", help="write a page with pictures")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="with --html: pictures as PNG and SVG"
    )
    args = parser.parse_args()
    from compare_runs import read_runs

    runs = read_runs(args.paths)
    if not runs:
        raise FileNotFoundError(f"no summary.json found below {', '.join(map(str, args.paths))}")
    if args.html is not None:
        from compare_page import page

        groups = group(runs)
        shown = [run for g in groups for run in g.runs]
        others = [run["name"] for run in runs if not any(run is each for each in shown)]
        if not shown:
            raise ValueError(f"none of the {len(runs)} runs has a validation loss to show")
        why = "as failed, without a validation loss, or with the seed of a later run"
        left_out = f"Not shown, {why}: {', '.join(others)}." if others else ""
        write_text(args.html, page(groups, args.pictures, left_out))
    if args.into is None:
        print("\n\n".join(filter(None, [sweep_table(runs), seed_table(runs)])))
        return
    before, begin, rest = args.into.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{args.into} has no lines {BEGIN} and {END} to write between")
    table = markdown_table(runs)
    write_text(args.into, f"{before}{BEGIN}\n{table}\n{END}{after}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
