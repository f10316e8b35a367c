"""Both sides of a ReLU network's global optimum: a certified lower bound, and the objective of a network found.

    p_gated(all patterns) <= p_cones <= p_relu <= min(conversion, local refinement)

The lower bounds hold for the ReLU network only where the program has a gate for every pattern; with sampled gates the
gated program is another one, and only the upper bound says something about the ReLU network.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch

from convexheads.certificate import Certificate
from convexheads.problem import Problem
from convexheads.relu.growth import extend
from convexheads.relu.network import convert, own_signs, refine
from convexheads.relu.relaxation import cone_bound
from convexheads.types import Factors

ROUNDING = 1e-9
"""Relative size of what may be rounding where lower and upper bound meet."""
REFINED = "local refinement of the converted network"
CONVERTED = "conversion of the gated solution"
GROWN = "local refinement, with units added"
REREAD = "local refinement from the gated units with masks of their own"


@dataclass(frozen=True)
class Bracket:
    """Bounds on the least objective of a ReLU head, of any number of units.

    Attributes
    ----------
    lower, upper : a proved lower bound, and the objective of the network that was found.
    covers_all_patterns : whether ``lower`` holds for the ReLU network: it does where the gates have all patterns of the
        training set. Otherwise it holds for the gated network with these gates only, and may even be above ``upper``.
    n_patterns : number of gates of the rectified branches.
    gated : the gated program's dual value, which is the lower bound without cones.
    converted : objective of the network that has the gated solution's outputs on the training set.
    lower_by, upper_by : how the bounds were found.
    proved : whether the lower bound is proved, not estimated.
    """

    lower: float
    upper: float
    covers_all_patterns: bool
    n_patterns: int
    gated: float
    converted: float
    lower_by: str
    upper_by: str
    proved: bool

    @property
    def relative_width(self) -> float:
        """(upper - lower) / upper, infinite where the lower bound does not hold for the ReLU network."""
        if not self.covers_all_patterns:
            return math.inf
        return (self.upper - self.lower) / self.upper if self.upper > 0 else 0.0

    @property
    def closed(self) -> float:
        """The share of the bracket from the gated program's bound that the cones closed."""
        width = self.upper - self.gated
        return (self.lower - self.gated) / width if width > 0 else 0.0

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        upper = f"ReLU network found    {self.upper:.8g}  ({self.upper_by})"
        if not self.covers_all_patterns:
            return (
                f"{upper}\n"
                f"no lower bound        for the ReLU network: {self.n_patterns} sampled patterns, not all of them\n"
                f"gated lower bound     {self.lower:.8g}  (holds for the gated network with these gates only)"
            )
        how = "proved" if self.proved else "not proved"
        return (
            f"{upper}\n"
            f"lower bound           {self.lower:.8g}  ({self.lower_by}, {how}; all {self.n_patterns} patterns)\n"
            f"bracket               {self.relative_width:.2e} of the objective"
        )


def find_bracket(
    program: Problem,
    network: Problem,
    factors: Factors,
    certificate: Certificate,
    *,
    covers_all_patterns: bool,
    bound: str = "gated",
    steps: int = 1000,
    tol: float = 1e-7,
) -> tuple[Factors, Bracket]:
    """The best ReLU network found from a gated solution, and the bracket of the global optimum.

    Parameters
    ----------
    program, network : the gated program, and the same components in their rectified form.
    factors, certificate : solution of ``program`` and its certificate.
    covers_all_patterns : whether the gates have all patterns of the training set.
    bound : ``gated``, or ``cones`` for the tighter bound of :func:`~convexheads.relu.relaxation.cone_bound`, which is
        only computed where all patterns are covered.
    steps : most L-BFGS iterations from each of two starts: the converted network, whose outputs are those of the
        gated one, and the gated solution's units with masks of their own.
    tol : a refinement ends where 50 iterations lower the objective by less than this share of it.

    Raises
    ------
    InputError, MissingExtraError
        As the conversion and ``cone_bound`` do.
    """
    converted = convert(program, network, factors)
    starts = {CONVERTED: converted, REFINED: refine(network, converted, steps, tol)}
    starts[REREAD] = refine(network, own_signs(network, factors), steps, tol)
    values = {name: network.value(found, torch.float64) for name, found in starts.items()}
    # Of equal objectives the one that was reached with less.
    best = min(values, key=lambda name: values[name])
    starts[GROWN] = extend(network, starts[best], steps, tol)
    values[GROWN] = network.value(starts[GROWN], torch.float64)
    best = best if values[GROWN] >= values[best] else GROWN
    lower, proved, by = certificate.dual, certificate.certified, "gated program"
    if bound == "cones" and covers_all_patterns:
        tighter = cone_bound(program, network, factors, certificate)
        lower, proved, by = tighter.value, tighter.proved, "cones relaxed, semidefinite program"
    gates = zip(program.components, network.components, strict=True)
    n_patterns = sum(component.n_gates for component, own in gates if own.form.rectified)
    upper = values[best]
    if covers_all_patterns and lower <= upper * (1 + ROUNDING):
        # Where the two meet rounding could put them in the wrong order; a smaller lower bound is as true.
        lower = min(lower, upper)
    return starts[best], Bracket(
        lower,
        upper,
        covers_all_patterns,
        n_patterns,
        min(certificate.dual, lower),
        values[CONVERTED],
        by,
        best,
        proved,
    )
