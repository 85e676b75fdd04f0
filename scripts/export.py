"""Export a checkpoint into a folder that transformers loads: weights, sizes, tokenizer.

python scripts/export.py runs/…/checkpoints/best.ckpt exported
python scripts/export.py runs/…/checkpoints/best.ckpt exported --merge     (a run with model.lora)
"""

import argparse
from pathlib import Path

from causal_lm import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a file that train.py wrote")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument(
        "--merge", action="store_true", help="merge LoRA adapters, which are written alone if not"
    )
    cli.add_trust(parser)
    args = parser.parse_args()

    from causal_lm.build import restore
    from causal_lm.models import hf_conversion

    module, tokenizer, config = restore(args.checkpoint, args.trust)
    max_length = config["data"]["max_length"]
    folder = hf_conversion.export(module.model, tokenizer, max_length, args.folder, args.merge)
    print(f"written to {folder}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
