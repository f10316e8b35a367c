"""The linear classifier that a head applies to each token of an image, and what each token adds to the logits.

Self-attention and MLP heads classify token p linearly, once the masks are known: f(X)_p = x_p^T Phi_p with

* self-attention: Phi_p = sum_g sum_{k,l} G_{g,p}[k,l] Z_g^{(k,l)},  G_{g,p} = sum_q M_g[p,q] x_q x_q^T;
* MLP: Phi_p = sum_g M_g[p] Z_g;  linear: Phi_p = W.

Phi_p depends on p through its gate rows alone: tokens whose gate rows agree share one classifier, exactly.

Mixer and FNO heads mix tokens before anything is read: output row t is no function of x_t alone, and no token has a
classifier of its own. With the masks fixed they are linear in the tokens, so each *input* token's part of the logits
is still defined: :func:`token_contributions` gives it for every head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convexheads.errors import InputError, describe
from convexheads.explain.fitted import Fitted
from convexheads.heads import Block, Branch

OWN = ("self_attention", "mlp", "linear")
"""Heads that apply a classifier to each token."""
WORKSPACE = 1 << 25
"""Numbers held at once."""


@dataclass(frozen=True)
class TokenClassifiers:
    """The effective linear classifiers of the tokens of one sample.

    Attributes
    ----------
    tokens : (s, d) as the head reads them, after its view.
    phi : (s, d, c) effective classifiers.
    pattern : (s,) integers from 0; equal where the rows of all gates agree, and then so are the classifiers, to the
        last bit. One pattern for linear activation.
    """

    tokens: np.ndarray
    phi: np.ndarray
    pattern: np.ndarray

    @property
    def evidence(self) -> np.ndarray:
        """x_p^T Phi_p, (s, c): their mean over tokens plus the intercept is the pooled logits."""
        return np.einsum("pd,pdc->pc", self.tokens, self.phi)


def token_classifiers(estimator: Any, x: Any, branch: int | None = None) -> TokenClassifiers:
    """Effective linear classifiers of the tokens of one sample.

    Parameters
    ----------
    estimator : fitted estimator with self_attention, mlp or linear heads, or a pipeline that ends in one.
    x : tokens (s, d) or (1, s, d) of the sample, as for ``predict``.
    branch : which head of a sum of heads; None: the only one, or the sum of all where they read the same tokens
        (no views).

    Raises
    ------
    InputError
        For a mixer or FNO head, whose tokens have no classifier of their own (use :func:`token_contributions`), for
        several samples, or where ``branch`` is needed to tell which tokens are meant.
    """
    fitted = Fitted(estimator)
    rows = fitted.tokens(x)
    if int(rows.shape[0]) != 1:
        raise InputError("x: " + describe(f"{int(rows.shape[0])} samples", "the tokens (s, d) of one sample"))
    return _classifiers(fitted, rows, _chosen(fitted, branch))


def effective_classifiers(estimator: Any, X: Any, branch: int | None = None) -> np.ndarray:
    """Effective linear classifiers (n, s, d, c) of all tokens of samples X (n, s, d).

    Otherwise as :func:`token_classifiers`. The result is held in memory: n s d c numbers of 8 bytes.
    """
    fitted = Fitted(estimator)
    rows = fitted.tokens(X)
    chosen = _chosen(fitted, branch)
    return np.stack([_classifiers(fitted, rows[i : i + 1], chosen).phi for i in range(int(rows.shape[0]))])


def token_contributions(estimator: Any, X: Any, branch: int | None = None) -> np.ndarray:
    """What each token adds to the outputs: (n, s, c), whose mean over s plus the intercept is the pooled logit.

    For self-attention, MLP and linear heads it is x_p^T Phi_p: token p as the one that is classified. For mixer and
    FNO heads it is the output with every other token set to zero and the masks of the whole sample, summed over
    output rows: token q as the one that is read.

    Parameters
    ----------
    estimator : fitted estimator, or a pipeline that ends in one.
    X : tokens (n, s, d), or (s, d) for one sample, as for ``predict``.
    branch : which head of a sum of heads; None: the sum over all of them, which must read equally many tokens.

    Raises
    ------
    InputError
        For tokens that do not fit, or heads whose views leave different numbers of tokens.
    """
    fitted = Fitted(estimator)
    rows = fitted.tokens(X)
    chosen = range(len(fitted.branches)) if branch is None else [fitted.check_branch(branch)]
    counts = {fitted.branches[index].tokens for index in chosen}
    if len(counts) > 1:
        raise InputError(
            "branch: "
            + describe(
                f"None with heads on {', '.join(map(str, sorted(counts)))} tokens",
                f"one of 0 to {len(fitted.branches) - 1}",
                "The heads of this sum read different tokens.",
            )
        )
    n, s = int(rows.shape[0]), counts.pop()
    total = np.zeros((n, s, fitted.branches[0].outputs))
    for index in chosen:
        done = 0
        for tokens in fitted.view(rows, index):
            for x in tokens:
                total[done] += _contributions(fitted, index, x)
                done += 1
    return total


def _chosen(fitted: Fitted, branch: int | None) -> list[int]:
    """The branches whose classifiers are summed."""
    if branch is None:
        chosen = list(range(len(fitted.branches)))
        if len(chosen) > 1 and any(each.view is not None for each in fitted.branches):
            raise InputError(
                "branch: "
                + describe(
                    "None with heads that have views of their own",
                    f"one of 0 to {len(chosen) - 1}",
                    "Each head classifies the tokens of its own view.",
                )
            )
    else:
        chosen = [fitted.check_branch(branch)]
    for index in chosen:
        head = fitted.branches[index].head
        if head not in OWN:
            raise InputError(
                "head: "
                + describe(
                    f"{head!r}, which mixes tokens before it reads them, so that no token has a classifier of its own",
                    f"a head among {', '.join(OWN)}",
                    "Use token_contributions, which gives each input token's part of the logits for every head.",
                )
            )
    return chosen


def _classifiers(fitted: Fitted, rows: Any, chosen: list[int]) -> TokenClassifiers:
    """Of one sample: the classifiers summed over branches, computed once for each distinct set of gate rows."""
    tokens = [next(iter(fitted.view(rows, index)))[0] for index in chosen]
    masks = [_masks(fitted.branches[index], x) for index, x in zip(chosen, tokens, strict=True)]
    s = len(tokens[0])
    flat = [mask.transpose(0, 1).reshape(s, -1) for mask in masks if mask is not None]
    signs = torch.cat([*flat, torch.ones(s, 1, dtype=torch.bool)], 1).numpy()
    _, first, pattern = np.unique(signs, axis=0, return_index=True, return_inverse=True)
    pattern = pattern.reshape(-1)
    # Patterns are numbered in the order in which tokens show them, not in the order of their bits.
    order = np.argsort(first, kind="stable")
    number = np.empty(len(order), dtype=np.int64)
    number[order] = np.arange(len(order))
    pattern, first = number[pattern], first[order]
    phi = sum(
        _phi(fitted, index, x, None if mask is None else mask[:, torch.from_numpy(first)], len(first))
        for index, x, mask in zip(chosen, tokens, masks, strict=True)
    )
    assert isinstance(phi, Tensor)
    return TokenClassifiers(tokens[0].numpy(), phi.numpy()[pattern], pattern)


def _masks(branch: Branch, x: Tensor) -> Tensor | None:
    """Masks (P, s, ...) of a gated branch for one sample, gate row p at [:, p]; None for linear activation."""
    gates = branch.gates[0]
    return None if gates is None else branch.architecture.masks(x[None], gates)[0]


def _phi(fitted: Fitted, index: int, x: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Classifiers (count, d, c) for the gate rows in ``mask`` (P, count, ...); all the same where it is None."""
    branch = fitted.branches[index]
    d, c = branch.features, branch.outputs
    total = torch.zeros(count, d, c, dtype=torch.float64)
    for g, block in enumerate(fitted.blocks_of(index, 0)):
        if not len(block.u):
            continue
        u, v = torch.from_numpy(block.u), torch.from_numpy(block.v)
        if branch.head != "self_attention":
            Z = u.mT @ v
            total += Z if mask is None else mask[g, :, None, None].double() * Z
        elif mask is None:
            total += _attend(u.reshape(-1, d, d), v.reshape(-1, d, c), (x.mT @ x)[None])
        else:
            rows = mask[g].double()
            step = max(1, WORKSPACE // (len(u) * d * d))
            for start in range(0, count, step):
                G = (rows[start : start + step, :, None] * x).mT @ x
                total[start : start + step] += _attend(u.reshape(-1, d, d), v.reshape(-1, d, c), G)
    return total


def _attend(W1: Tensor, W2: Tensor, G: Tensor) -> Tensor:
    """sum_r W1_r G_p W2_r: W1 (r, d, d), W2 (r, d, c), G (p, d, d) -> (p, d, c)."""
    mixed = torch.einsum("rak,pkl->parl", W1, G)
    return mixed.flatten(2) @ W2.flatten(0, 1)


def _contributions(fitted: Fitted, index: int, x: Tensor) -> np.ndarray:
    """Of one sample x (s, d) in the view of branch ``index``: (s, c)."""
    branch = fitted.branches[index]
    s = len(x)
    if branch.head in OWN:
        phi = _phi(fitted, index, x, _masks(branch, x), s)
        return torch.einsum("pd,pdc->pc", x, phi).numpy()
    architecture = branch.architecture
    outputs = np.zeros((s, branch.outputs))
    for group, ((inputs, columns), gates) in enumerate(zip(architecture.groups, branch.gates, strict=True)):
        own = x[:, inputs]
        masks = None if gates is None else architecture.masks(own[None], gates)[0]
        for g, block in enumerate(fitted.blocks_of(index, group)):
            if len(block.u):
                outputs[:, columns] += _read(architecture, own, block, None if masks is None else masks[g])
    return outputs


def _read(architecture: Any, x: Tensor, block: Block, mask: Tensor | None) -> np.ndarray:
    """sum over output rows of what each single token of x (s, d) gives with this mask: (s, c)."""
    s, d = x.shape
    u = torch.from_numpy(block.u).reshape(-1, *architecture.u_shape)
    v = torch.from_numpy(block.v)
    k = architecture.value_width
    parts = []
    step = max(1, WORKSPACE // (len(u) * s * max(d, k)))
    for start in range(0, s, step):
        count = min(step, s - start)
        alone = torch.zeros(count, s, d, dtype=torch.float64)
        alone[torch.arange(count), torch.arange(start, start + count)] = x[start : start + count]
        H = architecture.hidden(alone, u)
        if mask is not None:
            H = H * mask
        T = architecture.values(alone, H).sum(2)
        parts.append(T.flatten(1) @ v.reshape(len(u) * k, -1))
    return torch.cat(parts).numpy()
