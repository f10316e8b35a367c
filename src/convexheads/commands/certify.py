"""``convexheads certify``: how far a head is from the global optimum, of ours or trained elsewhere."""

from __future__ import annotations

import argparse
from typing import Any

from convexheads.commands import common
from convexheads.commands.fit import bracket_lines, certificate_lines
from convexheads.commands.predict import is_model, load_model
from convexheads.errors import InputError, describe

KEPT = "nothing was written"

_DESCRIPTION = """\
Compute the certificate of a head from its weights and the training tokens alone: the network's objective (loss
plus weight decay) against a lower bound that holds for every network of its family. It needs the tokens and
labels that the head was trained on; on others the numbers are those of the head on that data.

MODEL is a file that `convexheads fit` has saved, with everything in it; or weights of a network trained
elsewhere: a safetensors file or a state dict (.pt) with u (units, size of u) and v (units, k, classes), perhaps
intercept, gates and gate, for which --head and --beta say what they are weights of."""

_EPILOG = """\
examples:
  convexheads certify head.safetensors tokens/photos/train
  convexheads certify head.safetensors tokens/photos/train --beta 1e-3 --json certificate.json

  # a network trained elsewhere on the patch tokens as they lie in the store
  convexheads certify network.pt tokens/photos --head mlp --beta 0.01

  # and on to the optimum from its weights
  convexheads fit tokens/photos --head mlp --beta 0.01 --init network.pt --out optimal.safetensors"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command on ``parser``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument("model", metavar="MODEL", help="file that `convexheads fit` has saved, or a file of weights")
    parser.add_argument(
        "store", metavar="STORE", help="training tokens: a store, a folder with train/ in it, or an .npz file"
    )
    parser.add_argument("--beta", type=common.positive, help="weight decay of the objective (default: the model's)")
    common.add_output(parser, "the certificate", csv_too=False)
    common.add_memory_limit(parser, "the certificate")
    parser.add_argument("--threads", type=common.count, metavar="N", help="processor threads (default: all)")
    group = parser.add_argument_group("weights trained elsewhere")
    group.add_argument("--head", choices=common.HEADS, help="architecture that the weights belong to")
    group.add_argument(
        "--activation", choices=common.ACTIVATIONS, default="linear", help="gated_relu needs gates in the file"
    )
    group.add_argument("--grid", type=common.grid_option, default="auto", metavar="HxW", help="of fno and block_fno")
    group.add_argument("--n-blocks", type=common.count, default=4, metavar="B", help="block_fno (default: 4)")
    common.add_preprocessing(parser, common.Preprocessing())


def run(args: argparse.Namespace) -> int:
    """Certify and print.

    Raises
    ------
    ConvexHeadsError
        If the model or the tokens cannot be used, or do not belong together.
    """
    from convexheads.memory import limited

    output = common.Output(args.json)
    tokens = common.open_tokens(args.store, "train")
    labels = tokens.require_labels()
    common.set_threads(args.threads)
    watch = common.Stopwatch()
    with limited(args.memory_limit):
        of = of_model if is_model(args.model) else of_weights
        certificate, model = of(args, tokens, labels)
    output.print(f"beta            {certificate.beta:.6g}")
    for line in certificate_lines(certificate):
        output.print(line)
    if model is not None:
        output.print(f"when fitted     gap {model.certificate_.relative_gap:.2e} of the objective")
        for line in bracket_lines(model):
            output.print(line)
    output.print(f"next            {advice(certificate, args)}")
    output.write(
        {
            "model": args.model,
            "tokens": tokens.summary(),
            "certificate": certificate.as_dict(),
            "when_fitted": None if model is None else model.certificate_.as_dict(),
            "seconds": watch.seconds,
        }
    )
    return 0


def of_model(args: argparse.Namespace, tokens: common.Tokens, labels: Any) -> tuple[Any, Any]:
    """The certificate of a saved model, and the model."""
    from convexheads import certify

    if args.head is not None:
        raise InputError(describe("--head for a saved model", "no such option", "The model knows its head."))
    model = load_model(args.model, tokens)
    return certify(model, tokens.X, labels, beta=args.beta), model


def of_weights(args: argparse.Namespace, tokens: common.Tokens, labels: Any) -> tuple[Any, None]:
    """The certificate of weights trained elsewhere."""
    import numpy as np

    from convexheads import certify
    from convexheads.certification import read_weights
    from convexheads.inputs import shown

    weights = read_weights(args.model)
    for option in ("head", "beta"):
        if getattr(args, option) is None:
            got = f"{args.model}, a file of weights, without --{option}"
            raise InputError(describe(got, f"--{option} of the network that they belong to"))
    view, grid = common.Preprocessing.from_args(args).chain(tokens)
    X = tokens.X if view is None else shown(view.fit(tokens.X), tokens.X)
    certificate = certify(
        weights, X, labels, args.beta, "cross_entropy", head=args.head, activation=args.activation,
        grid=(grid if args.grid == "auto" else args.grid) if args.head in ("fno", "block_fno") else None,
        n_blocks=args.n_blocks, classes=np.unique(labels),
    )  # fmt: skip
    return certificate, None


def advice(certificate: Any, args: argparse.Namespace) -> str:
    """What to do about the gap."""
    if certificate.relative_gap <= 1e-3:
        return "nothing to gain: no network of this family has an objective lower by more than the gap"
    if not certificate.certified:
        return "the bound is an estimate: fewer features or tokens make a proof possible"
    return (
        f"convexheads fit {args.store} --init {args.model} --beta {certificate.beta:.6g}, with the other options of "
        "its training, goes on from these weights to the optimum"
    )
