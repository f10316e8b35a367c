"""``convexheads fit``: one head on stored tokens, to certified optimality."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from convexheads.commands import common
from convexheads.errors import InputError, describe

KEPT = "no model was written: one is only saved when its fit is done; the same command goes on from the checkpoint"

_DESCRIPTION = """\
Fit one head to the tokens of a store. The fit is a convex program: it stops when it is proved to be within
--tol of the global optimum, and prints the proof's numbers. The saved model holds the head, its certificate
and everything that is done to the tokens before it.

beta, the weight decay, is chosen on a part of the training set unless you give it.

Once a minute the fit is written to a checkpoint, from which the same command goes on if it was stopped. Under
torchrun the samples are spread over its workers, and the result is the same."""

_EPILOG = """\
examples:
  # self-attention on 32 whitened principal components of the patch tokens; beta chosen by validation
  convexheads fit tokens/photos/train --head self_attention --pca 32 --whiten --append-constant \\
      --scale auto --out head.safetensors

  # gated ReLU with 16 random gates at a given share of beta_max
  convexheads fit tokens/photos --head mlp --activation gated_relu --gates 16 --pca 32 --whiten \\
      --beta-ratio 0.02 --out mlp.safetensors

  # the same head as a network trained by AdamW, with curves; then on to the optimum from its weights
  convexheads fit tokens/photos --head mlp --beta-ratio 0.02 --solver adamw --learning-rates 0.003,0.01 \\
      --seeds 3 --plot curves.svg --out network.safetensors
  convexheads fit tokens/photos --head mlp --beta-ratio 0.02 --init network.safetensors --out mlp.safetensors

  # arrays instead of a store: an .npz file with X (n, s, d) and y (n,)
  convexheads fit tokens.npz --head fno --grid 7x7 --out fno.safetensors

  # at most 4 GB for the fit, whatever the size of the store
  convexheads fit tokens/photos --head mixer --memory-limit 4GB --out mixer.safetensors

  # four processes, on one machine or (see torchrun --help) on several that see the same files
  torchrun --nproc-per-node=4 -m convexheads fit tokens/photos --out head.safetensors

what next:
  convexheads predict head.safetensors tokens/photos/test --out predictions.csv
  in Python: convexheads.load("head.safetensors").to_module()"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command on ``parser``."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.add_argument(
        "store", metavar="STORE", help="token store, a folder with train/ in it, or an .npz file with X and y"
    )
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="where to save the model, such as head.safetensors"
    )
    common.add_output(parser, "the result", csv_too=False)
    add_head(parser)
    common.add_preprocessing(parser, common.Preprocessing())
    common.add_validation(parser, "0.3,0.1,0.03,0.01,0.003,0.001", 2)
    common.add_computation(parser)
    add_solver(parser)
    group = parser.add_argument_group("checkpoint")
    group.add_argument(
        "--checkpoint", metavar="FILE", help="where a long fit is kept while it runs (default: beside --out)"
    )
    group.add_argument(
        "--checkpoint-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="least time between two writings of it (default: %(default)g)",
    )


def add_solver(parser: argparse.ArgumentParser) -> None:
    """Options of the solver and of its start."""
    group = parser.add_argument_group(
        "solver", "factored solves the convex program; adamw and lbfgs train the non-convex network, without a promise"
    )
    group.add_argument(
        "--solver",
        choices=common.SOLVERS,
        default=common.SOLVERS[0],
        help="factored; fista (dense, small sizes); or as baselines adamw and lbfgs (default: %(default)s)",
    )
    group.add_argument(
        "--init", metavar="MODEL", help="saved head of the same kind to start from, such as one trained by adamw"
    )
    common.add_training(group)
    group.add_argument(
        "--plot", metavar="FILE", help="draw objective and gap over time, for all trained networks: .svg, .png or .pdf"
    )


def add_head(parser: argparse.ArgumentParser) -> None:
    """Options of one head and its program."""
    group = parser.add_argument_group("head")
    group.add_argument(
        "--head", choices=common.HEADS, default="self_attention", help="architecture (default: %(default)s)"
    )
    group.add_argument(
        "--activation",
        choices=(*common.ACTIVATIONS, "relu"),
        default="linear",
        help="linear; gated_relu: ReLUs with fixed random masks; relu: the same, converted into a ReLU network "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--gates",
        type=common.gates_option,
        default=16,
        metavar="P",
        help="number of masks; all: every pattern that the training set allows, for tiny data (default: 16)",
    )
    group.add_argument(
        "--relu-bound",
        choices=["gated", "cones"],
        default="gated",
        help="relu with --gates all: lower bound by the gated program, or a tighter one (default: %(default)s)",
    )
    group.add_argument(
        "--grid",
        type=common.grid_option,
        default="auto",
        metavar="HxW",
        help="fno and block_fno: grid of the tokens for two-dimensional shifts; auto: that of the store; "
        "none: one-dimensional (default: auto)",
    )
    group.add_argument(
        "--n-blocks", type=common.count, default=4, metavar="B", help="block_fno: channel groups (default: %(default)s)"
    )
    group.add_argument("--max-rank", type=common.count, metavar="M", help="most units in all (default: no limit)")
    group.add_argument("--no-intercept", action="store_true", help="fit without intercept")
    group.add_argument(
        "--label-smoothing", type=float, default=0.0, metavar="SHARE", help="of each label's mass (default: 0)"
    )
    group.add_argument("--class-weight", choices=["balanced"], help="balanced: every class counts the same")
    beta = group.add_mutually_exclusive_group()
    beta.add_argument("--beta", type=common.positive, metavar="BETA", help="weight decay")
    beta.add_argument(
        "--beta-ratio",
        type=common.ratio_or_auto,
        metavar="R",
        help="weight decay as a share of beta_max, above which the head is empty; auto: chosen by validation (default)",
    )


def head_parameters(args: argparse.Namespace, tokens: common.Tokens) -> tuple[dict[str, Any], common.Preprocessing]:
    """Parameters of the estimator that the options ask for, with the view in ``head``."""
    preprocessing = common.Preprocessing.from_args(args)
    view, found = preprocessing.chain(tokens)
    grid = (found if args.grid == "auto" else args.grid) if args.head in ("fno", "block_fno") else None
    return {
        "head": args.head if view is None else {"head": args.head, "view": view},
        "activation": args.activation,
        "gates": args.gates,
        "relu_bound": args.relu_bound,
        "grid": grid,
        "n_blocks": args.n_blocks,
        "fit_intercept": not args.no_intercept,
        "tol": args.tol,
        "max_iter": args.max_iter,
        "max_rank": args.max_rank,
        "random_state": args.seed,
        "device": args.device,
        "dtype": args.dtype,
        "verbose": 0 if args.quiet else 1,
        "label_smoothing": args.label_smoothing,
        "class_weight": args.class_weight,
        "solver": args.solver,
        "solver_options": common.training_options(args) or None,
        "memory_limit": args.memory_limit,
    }, preprocessing


def run(args: argparse.Namespace) -> int:
    """Fit, print the certificate, save.

    Raises
    ------
    ConvexHeadsError
        If the tokens or an option cannot be used; the message is one line.
    """
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise InputError("--out: " + describe(repr(args.out), "a file name that ends in .safetensors"))
    output = common.Output(args.json)
    common.writable(out)
    common.check_figure("--plot", args.plot)
    tokens = common.open_tokens(args.store, "train")
    labels = tokens.require_labels()
    parameters, preprocessing = head_parameters(args, tokens)
    common.set_threads(args.threads)

    from convexheads import ConvexHeadClassifier, ConvexHeadClassifierCV, distributed
    from convexheads.checkpoint import Checkpoints
    from convexheads.memory import library_memory, resident_memory

    world = distributed.current()
    checkpoint = Checkpoints(
        out.with_name(f"{out.name}.checkpoint") if args.checkpoint is None else Path(args.checkpoint),
        args.checkpoint_seconds,
    )
    code, before = library_memory(), resident_memory()
    watch = common.Stopwatch()
    model: Any
    if args.beta is None and args.beta_ratio is None:
        model = ConvexHeadClassifierCV(
            **parameters,
            beta_ratios=args.beta_ratios,
            validation=args.validation,
            path_tol=args.path_tol,
            path_until=args.path_until,
            patience=args.patience,
            criterion=args.criterion,
        )
    else:
        ratio = 0.02 if args.beta_ratio is None else args.beta_ratio
        model = ConvexHeadClassifier(**parameters, beta=args.beta, beta_ratio=ratio)
    start = start_from(args, model, tokens)
    with common.prints_to_stderr():
        model.fit(tokens.X, labels, checkpoint=checkpoint, **start)
    seconds = watch.seconds
    if isinstance(model, ConvexHeadClassifierCV):
        common.hint_at_the_edge(model.path_, model.best_beta_ratio_, args.beta_ratios, args.quiet)
    accuracy = train_accuracy(model, tokens.X, labels, world)
    if not world.first:
        return 0
    model.save(out)
    checkpoint.remove()
    result = {
        "model": str(out),
        "tokens": tokens.summary(),
        "preprocessing": preprocessing.as_dict(),
        "head": args.head,
        "activation": args.activation if args.head != "linear" else "linear",
        "gates": args.gates if args.activation != "linear" else None,
        "grid": parameters["grid"],
        "n_blocks": args.n_blocks if args.head == "block_fno" else None,
        "beta": model.beta_,
        "beta_max": model.beta_max_,
        "rank": model.rank_,
        "certificate": model.certificate_.as_dict(),
        "bracket": None if model.bracket_ is None else model.bracket_.as_dict(),
        "converged": model.certificate_.relative_gap <= args.tol,
        "train_accuracy": accuracy,
        "iterations": model.n_iter_,
        "seconds": seconds,
        "workers": world.size,
        "memory": common.memory_used(before, args.memory_limit, code),
        "path": getattr(model, "path_", None),
        "solver": args.solver,
        "message": model.message_,
        "runs": model.runs_,
    }
    if args.plot is not None:
        draw(model, args)
    _show(output, model, result, args)
    output.write(result)
    return 0


def start_from(args: argparse.Namespace, model: Any, tokens: common.Tokens) -> dict[str, Any]:
    """What --init adds to a fit at one beta; the gates of the model are those of the start."""
    if args.init is None:
        return {}
    if args.beta is None and args.beta_ratio is None:
        raise InputError(describe("--init without a beta", "--beta or --beta-ratio R beside it"))
    from convexheads.certification import read_weights
    from convexheads.commands.predict import is_model, load_model

    if not is_model(args.init):
        weights = read_weights(args.init)
        if weights.get("gates") is not None:
            model.set_params(gates=weights["gates"].numpy())
        return {"init": weights}
    init = load_model(args.init, tokens)
    if args.activation == "gated_relu" and init.activation == "gated_relu":
        model.set_params(gates=common.fixed_gates(init))
    return {"init": init}


def draw(model: Any, args: argparse.Namespace) -> None:
    """Objective and gap over time; of every network that was trained, where there are several."""
    from convexheads.explain.figures import history_figure, save_figure

    curves: dict[str, list] = {}
    for run_ in model.runs_:
        rate = run_["learning_rate"]
        curves.setdefault(args.solver if rate is None else f"learning rate {rate:g}", []).append(run_["history"])
    save_figure(history_figure(curves or model.history_, None, args.tol, log_time=bool(curves)), args.plot)


def train_accuracy(model: Any, X: Any, labels: Any, world: Any) -> float:
    """Share of the samples that are labelled rightly, each worker counting its own."""
    import numpy as np

    from convexheads.inputs import as_tokens, own_rows

    rows = world.rows(len(labels))
    mine = X if world.size == 1 else own_rows(as_tokens(X, check=False), rows)
    hits = int((model.predict(mine) == np.asarray(labels)[rows]).sum())
    return world.total(float(hits)) / len(labels)


def _show(output: common.Output, model: Any, result: dict[str, Any], args: argparse.Namespace) -> None:
    branch = model._branches[0]
    chosen = f", chosen on {common.percent(args.validation)} of the training set" if result["path"] else ""
    share = f" = {model.beta_ / model.beta_max_:.3g} beta_max" if model.beta_max_ > 0 else ""
    output.print(
        f"{args.head} ({result['activation']}): {model.rank_} units on {branch.tokens} tokens of {branch.features} "
        f"features, {branch.outputs} classes"
    )
    output.print(f"beta            {model.beta_:.4g}{share}{chosen}")
    for line in certificate_lines(model.certificate_):
        output.print(line)
    if not result["converged"]:
        output.print(f"stopped         {result['message']}")
    for line in bracket_lines(model):
        output.print(line)
    output.print(f"train accuracy  {common.percent(result['train_accuracy'])}")
    used = common.memory_line(result["memory"])
    if used is not None:
        output.print(used)
    output.print(f"saved           {args.out}  ({result['seconds']:.1f} s)")


def bracket_lines(model: Any) -> list[str]:
    """What is known about the ReLU network that a fit ended with: nothing for other activations."""
    if model.bracket_ is None:
        return []
    return [
        "the above is of the gated program; the ReLU network made of it, when fitted:",
        *str(model.bracket_).splitlines(),
    ]


def certificate_lines(certificate: Any) -> list[str]:
    """A certificate in three lines."""
    how = "proved" if certificate.certified else "not proved"
    return [
        f"objective       {certificate.primal:.8g}",
        f"lower bound     {certificate.dual:.8g}",
        f"gap             {certificate.gap:.3g}, {certificate.relative_gap:.2e} of the objective "
        f"({how}: {certificate.sigma_max.method})",
    ]
