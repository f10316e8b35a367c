"""What each transform of tokens does, as torch modules (n, s, d) -> (n, s', d').

The one place where the mathematics of :mod:`convexheads.tokens.transforms` is written. Every module can be
scripted, traced, and (but for `PowerByEigenvalues`) exported to ONNX. Annotations are evaluated in this
file, not deferred, since TorchScript reads the types of the buffers from them.
"""

import torch
from torch import Tensor, nn


class Affine(nn.Module):
    """x @ matrix + offset."""

    matrix: Tensor
    offset: Tensor

    def __init__(self, matrix: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.matrix) + self.offset


class Standardize(nn.Module):
    """(x - mean) / scale."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale


class Project(nn.Module):
    """(x - mean) @ matrix."""

    mean: Tensor
    matrix: Tensor

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        # Centring first keeps float32 accurate when the mean is large beside the deviations.
        return torch.matmul(x - self.mean, self.matrix)


class Scale(nn.Module):
    """x * factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Append(nn.Module):
    """[x, value]."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, torch.full_like(x[:, :, :1], self.value)], dim=2)


class MixTokens(nn.Module):
    """weights @ x: linear in the tokens of a sample, weights (s', s)."""

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(self.weights, x)


class Mean(nn.Module):
    """The mean token."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1, keepdim=True)


class Slice(nn.Module):
    """Tokens start, start + step, ... before stop."""

    def __init__(self, start: int, stop: int | None, step: int) -> None:
        super().__init__()
        self.start = start
        # Slicing stops at the end by itself; an integer is what TorchScript and ONNX take.
        self.stop = 2**31 - 1 if stop is None else stop
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.stop : self.step]


class Index(nn.Module):
    """The tokens at `indices`, which count from the end where negative."""

    indices: Tensor

    def __init__(self, indices: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)

    def forward(self, x: Tensor) -> Tensor:
        # Negative indices count from the end of the sample at hand, whatever its number of tokens.
        return x.index_select(1, torch.where(self.indices < 0, self.indices + x.size(1), self.indices))


class PowerByEigenvalues(nn.Module):
    """x (x^T x / s + eps I)^exponent by eigenvalues; in float64 inside, since eps is small beside G."""

    def __init__(self, eps: float, exponent: float, by_tokens: bool) -> None:
        super().__init__()
        self.eps = eps
        self.exponent = exponent
        self.by_tokens = by_tokens

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float64)
        if self.by_tokens:
            y = y.transpose(1, 2)
        gram = torch.matmul(y.transpose(1, 2), y) / x.size(1)
        values, vectors = torch.linalg.eigh(gram)
        powers = (values.clamp(min=0.0) + self.eps).pow(self.exponent).unsqueeze(1)
        y = torch.matmul(torch.matmul(y, vectors) * powers, vectors.transpose(1, 2))
        if self.by_tokens:
            y = y.transpose(1, 2)
        return y.to(x.dtype)


class PowerByNewton(nn.Module):
    """The same with exponent -1/p, p = 2**halvings, by matrix products only."""

    def __init__(self, eps: float, halvings: int, iterations: int, by_tokens: bool) -> None:
        super().__init__()
        self.eps = eps
        self.halvings = halvings
        self.p = 2**halvings
        self.iterations = iterations
        self.by_tokens = by_tokens

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float64)
        if self.by_tokens:
            y = y.transpose(1, 2)
        gram = torch.matmul(y.transpose(1, 2), y) / x.size(1)
        identity = torch.eye(gram.size(2), dtype=torch.float64, device=x.device)
        gram = gram + self.eps * identity
        norm = gram.pow(2).sum(dim=(1, 2), keepdim=True).sqrt()
        # Invariant: M = A T^p / norm for the product T of all steps, so T -> (A / norm)^(-1/p) as M -> I.
        M = gram / norm
        root = identity.expand_as(gram)
        for _ in range(self.iterations):
            step = ((self.p + 1) * identity - M) / self.p
            root = torch.matmul(root, step)
            for _ in range(self.halvings):
                step = torch.matmul(step, step)
            M = torch.matmul(step, M)
        y = torch.matmul(y, root) * norm.pow(-1.0 / self.p)
        if self.by_tokens:
            y = y.transpose(1, 2)
        return y.to(x.dtype)


class Concatenate(nn.Module):
    """Several views side by side along the features."""

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        self.views = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for view in self.views:
            parts.append(view(x))
        return torch.cat(parts, dim=2)
