"""A counter-based random number generator: each number is a hash of its use, and can be drawn again at any time.

A draw is a pure function of (seed, epoch, sample, number of the draw). So a resumed job gets the same views, a sample's
view does not depend on its batch, and CPU and GPU draw the same bits. The hash is SplitMix64 (Steele, Lea &
Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) in wrapping int64 arithmetic.
"""

import torch
from torch import Tensor

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def key(*words: int) -> int:
    """Hash a few integers into one; the order matters."""
    state = 0
    for word in words:
        state = _mix_int((state ^ (word & _WORD)) + _GOLDEN & _WORD)
    return _signed(state)


def streams(key: int, index: Tensor) -> Tensor:
    """Return one SplitMix64 state for each sample index (int64)."""
    return _mix(index * _signed(_GOLDEN) + key)


def draws(states: Tensor, count: int) -> Tensor:
    """Return the first outputs of every stream, `count` × N: 64 random bits each, as int64."""
    steps = torch.arange(1, count + 1, device=states.device) * _signed(_GOLDEN)
    return _mix(states + steps.view(-1, *[1] * states.dim()))


def below(bits: Tensor, bound: int) -> Tensor:
    """Return integers in 0..bound-1, for bounds up to 2³¹."""
    return (_shift(bits, 32) * bound) >> 32


def unit(bits: Tensor) -> Tensor:
    """Return float64 in [0, 1)."""
    return _shift(bits, 11).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    return x ^ _shift(x, 31)


def _mix_int(x: int) -> int:
    x = (x ^ x >> 30) * _FIRST & _WORD
    x = (x ^ x >> 27) * _SECOND & _WORD
    return x ^ x >> 31


def _shift(x: Tensor, places: int) -> Tensor:
    """Shift right and fill with zeros: int64 is used as uint64 here."""
    return torch.bitwise_and(x >> places, (1 << (64 - places)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word
