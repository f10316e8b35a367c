"""Attention-style heads on frozen vision transformers, trained as convex programs to certified optimality."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convexheads.certification import certify
    from convexheads.estimators import ConvexHeadClassifier, ConvexHeadRegressor, load
    from convexheads.model_selection import ConvexHeadClassifierCV, ConvexHeadRegressorCV

__all__ = [
    "ConvexHeadClassifier",
    "ConvexHeadClassifierCV",
    "ConvexHeadRegressor",
    "ConvexHeadRegressorCV",
    "certify",
    "load",
]
__version__ = "0.1.0"

_HOME = {
    "ConvexHeadClassifier": "estimators",
    "ConvexHeadClassifierCV": "model_selection",
    "ConvexHeadRegressor": "estimators",
    "ConvexHeadRegressorCV": "model_selection",
    "certify": "certification",
    "load": "estimators",
}


def __getattr__(name: str) -> Any:
    # On first use: `convexheads --help` must not wait for torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
