"""Errors and warnings: each says what was got, what was expected, and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType

from sklearn.exceptions import ConvergenceWarning


class ConvexHeadsError(Exception):
    """Base of every error this library raises on purpose; the command line prints it as one line."""


class InputError(ConvexHeadsError, ValueError):
    """A value, shape or option that cannot be used."""


class DataError(ConvexHeadsError, OSError):
    """A file or folder that is missing, unreadable, corrupt or that does not belong together."""


class MissingExtraError(ConvexHeadsError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class ConvexHeadsWarning(UserWarning):
    """Base of the library's warnings."""


class NotConvergedWarning(ConvexHeadsWarning, ConvergenceWarning):
    """A fit stopped before its tolerance; the message gives the gap reached and what to change."""


def describe(got: object, expected: object, fix: str = "") -> str:
    """One line in the form every message of this library has: got, expected, what to do."""
    text = f"got {got}; expected {expected}"
    return f"{text}. {fix}" if fix else text


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Parameters
    ----------
    module : name of the module to import, such as ``"matplotlib.pyplot"``.
    extra : the extra of this package that installs it.

    Raises
    ------
    MissingExtraError
        If the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is not None and error.name.partition(".")[0] != top:
            raise
        raise MissingExtraError(
            f"this needs the package {top!r}, which is not installed: pip install 'convexheads[{extra}]'"
        ) from error
