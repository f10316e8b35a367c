"""ReLU heads: the patterns of their units, their conversion from gated heads, and bounds on their global optimum."""

from convexheads.relu.arrangement import cover_bound, enumerate_cells
from convexheads.relu.bracket import Bracket, find_bracket
from convexheads.relu.growth import extend
from convexheads.relu.network import check_cones, convert, enumerate_gates, refine
from convexheads.relu.relaxation import LowerBound, cone_bound

__all__ = [
    "Bracket",
    "LowerBound",
    "check_cones",
    "cone_bound",
    "convert",
    "cover_bound",
    "enumerate_cells",
    "enumerate_gates",
    "extend",
    "find_bracket",
    "refine",
]
