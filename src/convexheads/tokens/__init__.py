"""Tokens: stores on disk, their extraction from images, and transforms."""

from convexheads.tokens.store import TokenStore, open_splits

__all__ = ["TokenStore", "open_splits"]
