"""Attention-style heads on frozen vision transformers, trained as convex programs to certified optimality."""

from convexheads.estimators import ConvexHeadClassifier, ConvexHeadRegressor, load

__all__ = ["ConvexHeadClassifier", "ConvexHeadRegressor", "load"]
__version__ = "0.1.0"
