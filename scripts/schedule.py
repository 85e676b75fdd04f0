"""Draw a learning-rate schedule in the terminal, or into a file.

    python scripts/schedule.py scheduler=cosine_restarts scheduler.peak_decay=0.7
    python scripts/schedule.py data=docstrings scheduler=step --svg schedule.svg

Takes the overrides of train.py and draws the schedule of the run that they describe.
"""

import argparse
from pathlib import Path

import curve
from hydra.utils import instantiate

from causal_lm import cli, config
from causal_lm.report.files import write_text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of train.py, such as scheduler=step")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write an SVG file")
    args = parser.parse_intermixed_args()

    cfg = config.load(args.overrides)
    total, epochs = cfg.trainer.max_steps, cfg.trainer.get("max_epochs")
    if total < 1 or epochs not in (None, -1):
        needs = "the schedule is drawn over trainer.max_steps above 0, with trainer.max_epochs=-1"
        raise config.ConfigError(f"{needs}: the steps of an epoch are known once data are loaded")
    factor = instantiate(cfg.scheduler)(total)
    name = cfg.scheduler._target_.rpartition(".")[2]
    title = f"{name}: fraction of optimizer.lr={cfg.optimizer.lr} over {total} optimizer steps"
    values = [factor(step) for step in range(total)]
    if args.svg:
        write_text(args.svg, curve.to_svg(values, title))
        print(f"written to {args.svg}")
    else:
        print(curve.to_text(values, title))


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
