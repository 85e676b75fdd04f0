"""Sample from a checkpoint. No other file is needed.

python scripts/generate.py runs/…/checkpoints/last.ckpt --prompt "Return the " --top-k 20
"""

import argparse

from causal_lm import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a file that train.py wrote")
    parser.add_argument("--prompt", default="", help="text to continue; empty begins a document")
    parser.add_argument("--count", type=int, default=4, help="samples")
    parser.add_argument("--length", type=int, default=None, help="tokens in all, BOS counted")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest")
    parser.add_argument("--top-k", type=int, default=50, help="draw among the k likeliest")
    parser.add_argument("--seed", type=int, default=0)
    cli.add_trust(parser)
    args = parser.parse_args()
    for name in ("count", "top_k"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")

    from causal_lm.build import restore
    from causal_lm.generation import generate_text
    from causal_lm.report.samples import printable

    module, tokenizer, config = restore(args.checkpoint, args.trust)
    limit = config["data"]["max_length"]
    length = limit if args.length is None else args.length
    if length > limit:
        raise ValueError(f"--length {length} is above data.max_length={limit} of the training run")
    texts = generate_text(
        module, tokenizer, args.prompt, length, count=args.count, seed=args.seed,
        temperature=args.temperature, top_k=args.top_k,
    )  # fmt: skip
    for number, text in enumerate(texts, start=1):
        print(f"--- {number}\n{printable(text)}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
