"""One file a head. Importing this package registers all of them."""

from convexheads.architectures import block_fno, fno, linear, mixer, mlp, self_attention
from convexheads.architectures.base import (
    ARCHITECTURES,
    Architecture,
    Pullback,
    Stats,
    architecture_class,
    by_feature,
    register,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "Pullback",
    "Stats",
    "architecture_class",
    "block_fno",
    "by_feature",
    "fno",
    "linear",
    "mixer",
    "mlp",
    "register",
    "self_attention",
]
