"""Loss, perplexity and bits per byte of a checkpoint on any data. No other file is needed.

python scripts/evaluate.py runs/…/checkpoints/last.ckpt data=text data.path=book.txt --split all
"""

import argparse
import json

from causal_lm import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a file that train.py wrote")
    parser.add_argument("overrides", nargs="*", help="data=…, and its keys, as for train.py")
    parser.add_argument("--split", choices=("val", "train", "test", "all"), default="val")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    cli.add_trust(parser)
    args = parser.parse_intermixed_args()

    from causal_lm.evaluate import evaluate
    from causal_lm.report.files import replace_nonfinite

    figures = evaluate(
        args.checkpoint, args.overrides, split=args.split, device=args.device, trust=args.trust
    )
    if args.json:
        print(json.dumps(replace_nonfinite(figures), indent=2))
        return
    bpb = f"{figures['bpb']:.4f} bits per byte, " if figures["bytes"] else ""
    print(
        f"loss {figures['loss']:.4f} nats per token, perplexity {figures['ppl']:.2f}, {bpb}"
        f"over {figures['tokens']:,} tokens ({figures['split']})"
    )


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
