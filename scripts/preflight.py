"""Prove the alignments of a model, without training it.

    python scripts/preflight.py FILE.py:FUNCTION       the function returns (model, batch) or
                                                       (model, batch, loss_fn)
    python scripts/preflight.py experiment=bug …       a configured run and its first batch

Exit code 0: no fault found; 1: faults; 2: it could not run.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from causal_lm import cli, config


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", nargs="*", help="FILE.py:FUNCTION, or overrides of train.py")
    parser.add_argument("--pad-id", type=int, help="token id of PAD")
    parser.add_argument("--eos-id", type=int, help="token id that ends a document")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures")
    args = parser.parse_args()

    with contextlib.redirect_stdout(sys.stderr):  # whatever their code prints, --json is JSON alone
        report = _audit(args)
    if args.html:
        from causal_lm.report.files import write_text
        from causal_preflight import to_html

        write_text(args.html, to_html(report))
    print(json.dumps(report.to_dict(), indent=2) if args.json else report)
    return 1 if report.faults else 0


def _audit(args: argparse.Namespace):
    if len(args.subject) == 1 and ".py:" in args.subject[0]:
        file, _, function = args.subject[0].rpartition(":")
        return _audit_function(file, function, args)
    return _audit_run(args.subject, args.seed)


def _audit_function(file: str, function: str, args: argparse.Namespace):
    from causal_preflight import preflight

    path = Path(file).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"there is no Python file at {file}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # so that it finds its neighbours
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"{file} has no function {function!r}")
    made = getattr(module, function)()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise ValueError(f"{function} must return (model, batch) or (model, batch, loss_fn)")
    return preflight(*made, pad_id=args.pad_id, eos_id=args.eos_id, seed=args.seed)


def _audit_run(overrides: Sequence[str], seed: int):
    cfg = config.load(overrides)
    from causal_lm.build import audit

    return audit(cfg, seed=seed)


if __name__ == "__main__":
    with cli.one_line_errors(failed=2):
        sys.exit(main())
