"""The command line: one table of commands; nothing heavy is imported before a command is chosen."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("convexheads.commands.demo", "the whole path on scikit-learn's digits, in a few minutes"),
    "extract": ("convexheads.commands.extract", "run images through a frozen backbone and store their tokens on disk"),
    "fit": ("convexheads.commands.fit", "fit one head to stored tokens, to certified optimality, and save it"),
    "predict": ("convexheads.commands.predict", "labels and probabilities of stored tokens by a saved head"),
    "compare": ("convexheads.commands.compare", "fit all heads to the same tokens and print a table"),
    "certify": ("convexheads.commands.certify", "prove again how far a saved head is from the global optimum"),
    "explain": (
        "convexheads.commands.explain",
        "draw the spectrum, latent dimensions, token clusters and evidence of a fitted head",
    ),
    "bench": ("convexheads.commands.bench", "time this library and other programs on the same problems"),
}
"""Name -> (module with ``add_arguments(parser)`` and ``run(args)``, line of help)."""

_DESCRIPTION = """\
Attention-style heads on frozen vision transformers, trained as convex programs: every fit comes with a
proof of how far it is from the global optimum."""

_EPILOG = """\
examples:
  convexheads demo
  convexheads extract --data photos/ --out tokens/photos --resolution 224 --holdout 0.2
  convexheads compare tokens/photos
  convexheads fit tokens/photos --head self_attention --pca 32 --whiten --append-constant --out head.safetensors
  convexheads predict head.safetensors tokens/photos/test --out predictions.csv

`convexheads COMMAND --help` explains a command and its options."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose options are declared only when they are needed."""

    module: str | None = None

    def error(self, message: str) -> NoReturn:
        """Print what is wrong in one line and leave with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; a command's module is imported here, when its name has been read."""
        if self.module is not None:
            module, self.module = self.module, None
            self.formatter_class = argparse.RawDescriptionHelpFormatter
            import_module(module).add_arguments(self)
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command ``convexheads`` with all of its commands."""
    from convexheads import __version__

    parser = Parser(
        prog="convexheads",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"convexheads {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for name, (module, help_line) in COMMANDS.items():
        own = commands.add_parser(name, help=help_line)
        own.module = module
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : arguments without the program's name; None: those of the process.

    Returns
    -------
    int
        0 when all went well; 2 for bad input, with one line on stderr; 130 after Ctrl-C; 141 when nobody reads the
        output any more.
    """
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # --help, --version, or a wrong option that has been reported
        return stop.code if isinstance(stop.code, int) else 0
    module = import_module(COMMANDS[args.command][0])
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        return _shared(args, module)
    # Not before: the base of the errors comes with scikit-learn, which takes a second to import.
    from convexheads.errors import ConvexHeadsError

    try:
        with _short_warnings():
            return int(module.run(args))
    except ConvexHeadsError as error:
        return _failed(error)
    except BrokenPipeError:
        # The reader has gone, as in `convexheads compare ... | head`; Python must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        kept = getattr(module, "KEPT", "nothing was written")
        print(f"\nconvexheads: stopped; {kept}", file=sys.stderr)
        return 130


SHARED = ("extract", "fit")
"""Commands whose work is spread over the workers that torchrun starts."""


def _shared(args: argparse.Namespace, module: Any) -> int:
    """A command as one of several workers: the first one writes and prints; an error is told once."""
    from contextlib import ExitStack, redirect_stderr, redirect_stdout

    from convexheads import distributed
    from convexheads.errors import ConvexHeadsError, InputError, describe

    world = distributed.ALONE
    try:
        with ExitStack() as stack:
            world = stack.enter_context(distributed.joined())
            if args.command not in SHARED:
                got, expected = f"{args.command} under torchrun", f"one process, or one of {', '.join(SHARED)}"
                raise InputError(describe(got, expected))
            if not world.first:
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(silence))
                stack.enter_context(redirect_stderr(silence))
            stack.enter_context(_short_warnings())
            return int(module.run(args))
    except (ConvexHeadsError, OSError) as error:
        return _failed(error) if world.first_to_say(str(error)) else 2
    except KeyboardInterrupt:
        return 130


def _failed(what: object) -> int:
    print("convexheads: error: " + " ".join(str(what).split()), file=sys.stderr)
    return 2


class _short_warnings:
    """Our own warnings as one line each, without file names and source."""

    def __enter__(self) -> None:
        import warnings

        from convexheads.errors import ConvexHeadsWarning

        self._context = warnings.catch_warnings()
        self._context.__enter__()
        usual = warnings.showwarning

        def show(message: Any, category: Any, *rest: Any, **named: Any) -> None:
            if issubclass(category, ConvexHeadsWarning):
                print("convexheads: warning: " + " ".join(str(message).split()), file=sys.stderr)
            else:
                usual(message, category, *rest, **named)

        warnings.showwarning = show

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)


if __name__ == "__main__":
    sys.exit(main())
