"""Run the preflight on a model and one batch, without training.

    python scripts/preflight.py FILE.py:FUNCTION       FUNCTION returns (model, batch) or
                                                       (model, batch, loss_fn)
    python scripts/preflight.py experiment=bug …       a configured run and its first batch

examples/audit_me.py is such a file. Exit code 0: no fault found; 1: faults; 2: it could not run, or
nothing could be examined.
"""

import argparse
import contextlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from causal_lm import cli, config


def main() -> int:
    """Print the report (and write the page); returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="*", help="FILE.py:FUNCTION, or overrides of train.py")
    parser.add_argument("--pad-id", type=int, help="token id of PAD")
    parser.add_argument("--eos-id", type=int, help="token id that ends a document")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="tell why each probe was skipped")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with pictures")
    args = parser.parse_args()

    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the report alone
        report = _audit(args)
    if args.html:
        from causal_lm.report.files import write_text
        from causal_preflight import to_html

        write_text(args.html, to_html(report))
    text = str(report) if args.verbose else report.summary()
    print(json.dumps(report.to_dict(), indent=2) if args.json else text)
    return 1 if report.faults else 0 if report.audited else 2


def _audit(args: argparse.Namespace) -> Any:
    """The report; torch is imported only once the arguments are known to be right."""
    if len(args.target) == 1 and ".py:" in args.target[0]:
        file, _, function = args.target[0].rpartition(":")
        made = _call(file, function)
        from causal_preflight import preflight

        return preflight(*made, pad_id=args.pad_id, eos_id=args.eos_id, seed=args.seed)
    return audit_run(config.load(args.target), args.seed)


def audit_run(cfg: Any, seed: int = 0) -> Any:
    """The report on a configured run, of its first batch."""
    from causal_lm.build import prepare
    from causal_preflight.lightning import audit_batch

    data, corpus, module = prepare(cfg)
    ids = {"pad_id": corpus.tokenizer.pad_id, "eos_id": corpus.tokenizer.eos_id}
    batch, loss = next(iter(data.train_dataloader())), module.accumulated_loss
    is_split = cfg.trainer.accumulate_grad_batches > 1
    return audit_batch(module, batch, loss, parted=is_split, seed=seed, **ids)


def _call(file: str, function: str) -> tuple[Any, ...]:
    """What `function` of the Python file returns: (model, batch) or (model, batch, loss_fn)."""
    path = Path(file).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"there is no Python file at {file}")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # so that it can import the files beside it
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ValueError(f"{file} has no function {function!r}")
    made = getattr(module, function)()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise ValueError(f"{function} must return (model, batch) or (model, batch, loss_fn)")
    return made


if __name__ == "__main__":
    with cli.one_line_errors(exit_code=2):
        sys.exit(main())
