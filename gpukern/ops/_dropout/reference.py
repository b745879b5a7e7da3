"""Dropout in plain torch, with the same random numbers as the kernels."""

from __future__ import annotations

import torch

from gpukern.ops._dropout.problem import Shape, chance

_LOW = 2**32 - 1
#: Philox 4×32: the factors of a round, and what is added to the key after one.
_FACTORS = 0xD2511F53, 0xCD9E8D57
_KEYS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def dropout(
    input: torch.Tensor,
    residual: torch.Tensor | None,
    state: torch.Tensor | None,
    p: float,
    features: int,
    key: int,
    offset: int,
    order: Shape,
) -> torch.Tensor:
    """``x · m + residual`` laid out in ``order``, m = 1 / (1 − p) or 0; see :data:`gpukern.ops.dropout.dropout`."""
    if state is not None:
        key, offset = state.tolist()
    dtype = torch.promote_types(input.dtype, torch.float32)
    dtype = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
    factors = _factors(input, p, features, key, offset, order, dtype)
    y = input.to(dtype) * factors
    if residual is not None:
        y = y + residual.to(dtype)
    return empty(input, order, residual).copy_(y)


def dropout_(input: torch.Tensor, *others) -> None:
    input.copy_(dropout(input, None, *others))


def empty(input: torch.Tensor, order: Shape, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Allocate a dense tensor of ``input``'s shape whose dimensions lie in ``order``, outermost first.

    Its dtype is that of the sum with ``residual``.
    """
    dtype = input.dtype if residual is None else torch.promote_types(input.dtype, residual.dtype)
    if not order:
        return input.new_empty(input.shape, dtype=dtype)
    places = sorted(range(len(order)), key=order.__getitem__)
    return input.new_empty([input.shape[i] for i in order], dtype=dtype).permute(places)


def _factors(
    input: torch.Tensor, p: float, features: int, key: int, offset: int, order: Shape, dtype: torch.dtype
) -> torch.Tensor:
    """What each element is multiplied with, in a shape that broadcasts to ``input``'s."""
    threshold, scale = chance(p)
    shape = (*input.shape[:features], *(1,) * (input.dim() - features)) if features else input.shape
    count = input.shape[:features].numel() if features else input.numel()
    kept = numbers(count, key, offset, input.device) >= threshold
    factors = kept.to(dtype) * scale
    if features or not order:
        return factors.reshape(shape)
    places = sorted(range(len(order)), key=order.__getitem__)
    return factors.reshape([shape[i] for i in order]).permute(places)


def numbers(count: int, key: int, offset: int, device: torch.device | None = None) -> torch.Tensor:
    """The 32 random bits of each place from 0 to ``count``, as int64."""
    counters = torch.arange(-(-count // 4), dtype=torch.int64, device=device)
    return torch.stack(philox(counters & _LOW, counters >> 32, key, offset), 1).flatten()[:count]


def philox(low: torch.Tensor, high: torch.Tensor, key: int, offset: int) -> tuple[torch.Tensor, ...]:
    """Four numbers for each counter (low and high 32 bits, int64), all below 2³²."""
    a, b = torch.full_like(low, offset & _LOW), torch.full_like(low, offset >> 32 & _LOW)
    c, d = low, high
    keys = key & _LOW, key >> 32 & _LOW
    for _ in range(_ROUNDS):
        first, second = a * _FACTORS[0], c * _FACTORS[1]  # modulo 2⁶⁴
        a, b = (second >> 32 & _LOW) ^ b ^ keys[0], second & _LOW
        c, d = (first >> 32 & _LOW) ^ d ^ keys[1], first & _LOW
        keys = (keys[0] + _KEYS[0]) & _LOW, (keys[1] + _KEYS[1]) & _LOW
    return a, b, c, d
