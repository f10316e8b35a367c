"""``convexheads certify``: how far a saved head is from the global optimum, computed anew."""

from __future__ import annotations

import argparse

from convexheads.commands import common
from convexheads.commands.fit import bracket_lines, certificate_lines
from convexheads.commands.predict import load_model

KEPT = "nothing was written"

_DESCRIPTION = """\
Compute the certificate of a saved head again, from its weights and the training tokens alone: the network's
objective (loss plus weight decay) against a lower bound that holds for every network of its family. It needs
the tokens and labels that the head was trained on; on others the numbers are those of the head on that data."""

_EPILOG = """\
examples:
  convexheads certify head.safetensors tokens/photos/train
  convexheads certify head.safetensors tokens/photos/train --beta 1e-3 --json certificate.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command on ``parser``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("model", metavar="MODEL", help="file that `convexheads fit` has saved")
    parser.add_argument(
        "store", metavar="STORE", help="training tokens: a store, a folder with train/ in it, or an .npz file"
    )
    parser.add_argument("--beta", type=common.positive, help="weight decay of the objective (default: the model's)")
    common.add_output(parser, "the certificate", csv_too=False)
    parser.add_argument("--threads", type=common.count, metavar="N", help="processor threads (default: all)")


def run(args: argparse.Namespace) -> int:
    """Certify and print.

    Raises
    ------
    ConvexHeadsError
        If the model or the tokens cannot be used, or do not belong together.
    """
    output = common.Output(args.json)
    tokens = common.open_tokens(args.store, "train")
    model = load_model(args.model, tokens)
    labels = tokens.require_labels()
    common.set_threads(args.threads)

    from convexheads import certify

    watch = common.Stopwatch()
    certificate = certify(model, tokens.X, labels, beta=args.beta)
    output.print(f"beta            {certificate.beta:.6g}")
    for line in certificate_lines(certificate):
        output.print(line)
    output.print(f"when fitted     gap {model.certificate_.relative_gap:.2e} of the objective")
    for line in bracket_lines(model):
        output.print(line)
    output.write(
        {
            "model": args.model,
            "tokens": tokens.summary(),
            "certificate": certificate.as_dict(),
            "when_fitted": model.certificate_.as_dict(),
            "seconds": watch.seconds,
        }
    )
    return 0
