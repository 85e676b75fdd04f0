"""A checkpoint as a folder that transformers loads: weights, sizes, tokenizer.

python scripts/export.py runs/…/checkpoints/best.ckpt exported
"""

import argparse
from pathlib import Path

from causal_lm import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a file that train.py wrote")
    parser.add_argument("folder", type=Path, help="a new folder")
    args = parser.parse_args()

    from causal_lm.export import export

    print(f"written to {export(args.checkpoint, args.folder)}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
