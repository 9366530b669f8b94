"""Orthogonal matrices of any size, applied without being formed.

Turning a vector by an orthogonal matrix spreads what stands out in a few entries over all of them,
and turning it back undoes it.  Every matrix here is a Kronecker product of small ones behind a
diagonal of signs, so that a product with it takes n (n_1 + n_2 + …) multiplications, not n^2.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Kind = Literal["hadamard", "orthogonal", "kronecker"]

# A Hadamard matrix that is no Kronecker product is multiplied in full: none larger is looked for.
LARGEST = 1024
# Powers of two are split into factors of this size: few steps, each a product worth making.
_STEP = 16
# Entries that are turned at once: every step makes a copy of them.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Rotation:
    """The orthogonal Q = diag(signs) (A_1 ⊗ A_2 ⊗ …), which turns row vectors: x Q.

    Attributes:
        signs: 1 or -1 for each entry; float64.
        factors: The small orthogonal matrices; float64.
    """

    signs: Float[Tensor, " n"]
    factors: Sequence[Float[Tensor, "_ _"]]

    @property
    def size(self) -> int:
        """Entries of the vectors that it turns."""
        return len(self.signs)

    def apply(self, vectors: Float[Tensor, "*batch entries"]) -> Float[Tensor, "*batch entries"]:
        """Turn vectors x into x Q, in their own dtype.

        Vectors of several times its size are turned in pieces, as by a block-diagonal matrix.
        """
        return self._turned(vectors, self._forwards)

    def invert(self, vectors: Float[Tensor, "*batch entries"]) -> Float[Tensor, "*batch entries"]:
        """Turn vectors x into x Q^T, which undoes `apply`."""
        return self._turned(vectors, self._backwards)

    def dense(self) -> Float[Tensor, "n n"]:
        """Q itself, in float64."""
        return self.apply(torch.eye(self.size, dtype=torch.float64))

    def _forwards(self, pieces: Tensor) -> Tensor:
        return self._product(pieces * self.signs.to(pieces), self.factors)

    def _backwards(self, pieces: Tensor) -> Tensor:
        turned = self._product(pieces, [factor.T for factor in self.factors])
        return turned * self.signs.to(pieces)

    def _turned(self, vectors: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
        """Vectors that are turned a few at a time."""
        pieces = vectors.reshape(-1, self.size)
        made = torch.empty(pieces.shape, dtype=vectors.dtype, device=vectors.device)
        few = max(1, _AT_ONCE // self.size)
        for part, place in zip(pieces.split(few), made.split(few), strict=True):
            place.copy_(turn(part))
        return made.reshape(vectors.shape)

    def _product(self, pieces: Tensor, factors: Sequence[Tensor]) -> Tensor:
        for factor in factors:
            # The axis that is multiplied goes last; after all factors they are in order again.
            rest = self.size // len(factor)
            split = pieces.reshape(-1, len(factor), rest).transpose(1, 2)
            pieces = (split @ factor.to(pieces)).reshape(-1, self.size)
        return pieces


def rotation(kind: Kind, size: int, seed: int = 0) -> Rotation:
    """An orthogonal matrix of a kind.

    - "hadamard": entries ±1/sqrt(n) with random signs of the inputs.  Where no Hadamard matrix of
      the size can be made, the largest that divides it is used, times a random orthogonal one.
    - "orthogonal": one random orthogonal matrix.
    - "kronecker": two random ones, of the closest pair of factors.

    Args:
        kind: One of these.
        size: Entries of the vectors to turn.
        seed: What all that is random comes of.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "orthogonal":
        parts = [random_orthogonal(size, generator)]
    elif kind == "kronecker":
        parts = [random_orthogonal(part, generator) for part in closest_pair(size)]
    else:
        orders, rest = hadamard_orders(size)
        parts = [_primitive(order) / order**0.5 for order in orders]
        parts += [random_orthogonal(rest, generator)] if rest > 1 else []
    signs = torch.ones(size, dtype=torch.float64)
    if kind == "hadamard":
        signs -= 2.0 * torch.randint(2, (size,), generator=generator)
    return Rotation(signs, parts)


def random_orthogonal(size: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """A matrix drawn evenly from all orthogonal ones, in float64.

    It is the Q of a Gaussian matrix whose R has a positive diagonal; without that condition the
    draw would depend on how QR is computed (Mezzadri, 2007, math-ph/0609050).
    """
    drawn = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).contiguous()


def closest_pair(size: int) -> tuple[int, int]:
    """The factors a <= b of `size` = a b that are closest to each other; 1 and a prime itself."""
    first = next(a for a in range(math.isqrt(size), 0, -1) if size % a == 0)
    return first, size // first


def hadamard(size: int) -> Float[Tensor, "n n"] | None:
    """A matrix H of 1 and -1 with H H^T = n I, in float64; None where none can be made here.

    It is a Kronecker product of matrices by Sylvester (powers of two) and Paley (see `_paley`).
    Those of 92, 116, 156, 172, 188 and some larger sizes are known too, by other constructions.
    """
    orders, rest = hadamard_orders(size)
    return functools.reduce(torch.kron, map(_primitive, orders)) if rest == 1 else None


@functools.cache
def hadamard_orders(size: int) -> tuple[tuple[int, ...], int]:
    """Orders whose Hadamard matrices make the largest one that divides a size, and what is left."""
    for whole in sorted(_divisors(size), reverse=True):
        if (orders := _orders(whole)) is not None:
            return orders, size // whole
    raise AssertionError  # 1 divides every size


@functools.cache
def _orders(size: int) -> tuple[int, ...] | None:
    """Orders of which a Hadamard matrix is the Kronecker product, with small ones preferred."""
    if size & (size - 1) == 0:
        steps = (size.bit_length() - 1) // (_STEP.bit_length() - 1)
        rest = size // _STEP**steps
        return (*([rest] if rest > 1 or not steps else []), *[_STEP] * steps)
    for order in _divisors(size):
        odd = order & (order - 1) != 0
        if odd and order % 4 == 0 and order <= LARGEST and _paley_field(order):
            rest = _orders(size // order)
            if rest is not None:
                return (*(one for one in rest if one > 1), order)
    return None


@functools.cache
def _primitive(order: int) -> Float[Tensor, "n n"]:
    if order & (order - 1) == 0:
        pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        one = torch.ones(1, 1, dtype=torch.float64)
        return functools.reduce(torch.kron, [pair] * (order.bit_length() - 1), one)
    return _paley(order)


def _paley(order: int) -> Float[Tensor, "n n"]:
    """Paley's Hadamard matrix (On orthogonal matrices, J. Math. Phys. 12, 1933).

    With χ(x) = 0 at 0, 1 at the other squares of the field of q elements and -1 elsewhere:

        S = [[0, 1^T], [±1, χ(a - b) for all a, b]]
        I:  n = q + 1,  q = 3 mod 4 (S skew):       H = I + S
        II: n = 2(q+1), q = 1 mod 4 (S symmetric):  H = S ⊗ [[1,1], [1,-1]] + I ⊗ [[1,-1], [-1,-1]]
    """
    field = _paley_field(order)
    assert field is not None
    q, prime, degree = field
    digits = torch.tensor(
        [[n // prime**place % prime for place in range(degree)] for n in range(q)]
    )
    places = torch.tensor([prime**place for place in range(degree)])
    differences = ((digits[:, None] - digits[None]) % prime) @ places  # (q, q)
    eye = torch.eye(q + 1, dtype=torch.float64)
    for coefficients in itertools.product(range(prime), repeat=degree):
        squares = _squares(digits.tolist(), coefficients, prime) @ places
        character = -torch.ones(q, dtype=torch.float64)
        character[squares] = 1.0
        character[0] = 0.0
        core = torch.ones(q + 1, q + 1, dtype=torch.float64)
        core[1:, 0] = -1.0 if q % 4 == 3 else 1.0
        core[0, 0] = 0.0
        core[1:, 1:] = character[differences]
        if q % 4 == 3:
            made = eye + core
        else:
            pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
            other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
            made = torch.kron(core, pair) + torch.kron(eye, other)
        # A polynomial that has factors makes no field, and the rows are not orthogonal.
        if torch.equal(made @ made.T, order * torch.eye(order, dtype=torch.float64)):
            return made
    raise AssertionError(f"no field of {q} elements")


def _squares(elements: Sequence[Sequence[int]], coefficients: Sequence[int], prime: int) -> Tensor:
    """The square of each polynomial modulo x^k - (coefficients), its digits; (elements, k)."""
    degree = len(coefficients)
    made: list[list[int]] = []
    for element in elements:
        product = [0] * (2 * degree - 1)
        for (i, a), (j, b) in itertools.product(enumerate(element), repeat=2):
            product[i + j] += a * b
        for power in range(2 * degree - 2, degree - 1, -1):
            for place, coefficient in enumerate(coefficients):
                product[power - degree + place] += product[power] * coefficient
        made.append([one % prime for one in product[:degree]])
    return torch.tensor(made)


def _paley_field(order: int) -> tuple[int, int, int] | None:
    """Elements q of the field, their prime and its power; None where there is no such matrix."""
    for q, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if q % 4 == remainder and (power := _prime_power(q)):
            return q, *power
    return None


def _prime_power(number: int) -> tuple[int, int] | None:
    if number < 2:
        return None
    prime = next((p for p in range(2, math.isqrt(number) + 1) if number % p == 0), number)
    degree = 0
    while number % prime == 0:
        number, degree = number // prime, degree + 1
    return (prime, degree) if number == 1 else None


def _divisors(size: int) -> list[int]:
    below = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    return sorted({*below, *(size // d for d in below)})
