"""The tensors that methods are tried on: ordinary ones, and ones that break careless code."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.catalogue import Method

_STEPS = 12
TOKENS = 160  # fewer than a layer's 256 inputs: its gram is singular


def weights() -> dict[str, Float[Tensor, "_ _"]]:
    """Layers to try, by what is awkward about them."""
    noise = torch.Generator().manual_seed(0)
    plain = torch.randn(48, 256, generator=noise)
    outlier, dead, flat = plain.clone(), plain.clone(), torch.full((48, 256), 0.3)
    outlier[3, 5] = 1e4
    dead[7], dead[:, 11] = 0.0, 0.0
    return {
        "plain": plain,
        "outlier": outlier,
        "dead row and column": dead,
        "constant": flat,
        "all positive": plain.abs() + 1,
        "all zero": torch.zeros(48, 256),
        "one column": plain[:, :1],
        "ragged width": plain[:, :181],
        "not contiguous": plain.T,
        "bfloat16": plain.bfloat16(),
        "float16": plain.half(),
        "one row": plain[:1],
    }


def evidence(
    words: tuple[str, ...], weight: Float[Tensor, "out in"], *, seen: bool = True
) -> Mapping[str, Any]:
    """Everything a method asked for, made to fit one layer; of no token at all unless `seen`."""
    noise = torch.Generator().manual_seed(1)
    inputs = _inputs(weight.shape[1], noise) * seen
    weights = _items(weight)
    norm = inputs.square().mean(dim=0).sqrt()  # (in,)
    costs = _costs(weights)
    models = torch.stack([weight + _like(weight, noise) / 10 for _ in range(3)])  # (models, ...)
    made: dict[str, Any] = {
        "weight": weight,
        "weights": weights,
        "shapes": [tuple(item.shape) for item in weights],
        "approximation": _coarse(weight),
        "inputs": inputs,
        # A layer answers in its own width; a block, which has no one weight, in that of its input.
        "outputs": inputs @ weight.float().T if "weight" in words else inputs.roll(1, 0) + inputs,
        "gram": inputs.T @ inputs / len(inputs),  # (in, in)
        "norm": norm,
        "norms": tuple(norm * (1 + place) for place, _ in enumerate(weights)),
        "magnitude": inputs.abs().mean(dim=0),  # (in,)
        "peak": inputs.abs().amax(dim=0),  # (in,)
        "attention": torch.rand(4, TOKENS // 4, generator=noise),  # (windows, length)
        "scores": torch.tensor([0.5, 2.0, 0.0, 1.0]),
        "costs": costs,
        "errors": _errors(costs),
        "grad": _like(weight, noise) * seen / 100,
        "base": weight,
        "models": models,
        "server": weight,
        "clients": models,
        "counts": torch.tensor([30, 10, 60]),
        "state": {},
        "grads": models - weight,
        "place": (0, 1),
        "proxy": lambda tried: (tried.float() - models[0].float()).square().mean(),
    }
    return {word: made[word] for word in words}


def options(method: Method, weight: Float[Tensor, "out in"]) -> dict[str, Any]:
    """An ordinary value of every option that a verb requires, where the method has it.

    Any other option, and the size of a group, is left at the method's default; little is learned.
    """
    costs = _costs(_items(weight))
    least, most = (sum(int(levels[end]) for levels in costs) for end in (0, -1))
    ordinary = {
        "bits": width(method, 4),
        "symmetric": False,
        "density": 0.5,
        "rank": min(4, *weight.shape),
        "budget": (least + most) // 2,
    }
    return method.accepts(ordinary) | steps(method)


def steps(method: Method) -> dict[str, int]:
    """As few steps as will do: what is learned keeps the laws from its first step on."""
    return {"steps": _STEPS} if method.learns is not None else {}


def width(method: Method, bits: int) -> int:
    """A width of codes, or the narrowest the method has if it lacks that one."""
    return bits if bits in method.widths else method.widths[0]


def _inputs(width: int, noise: torch.Generator) -> Float[Tensor, "tokens width"]:
    """Correlated inputs of unequal size, one far larger than the rest, one constant, one dead."""
    shared = torch.randn(TOKENS, 8, generator=noise) @ torch.randn(8, width, generator=noise)
    inputs = shared / 3 + torch.randn(TOKENS, width, generator=noise)
    inputs *= torch.linspace(0.5, 2.0, width)
    inputs[:, 2:3] *= 30
    inputs[:, 17:18] = 0.0
    inputs[:, 23:24] = 1.0
    return inputs


def _like(weight: Float[Tensor, "..."], noise: torch.Generator) -> Float[Tensor, "..."]:
    return torch.randn(weight.shape, generator=noise).to(weight.dtype)


def _coarse(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The weight on seven levels, as a careless quantizer would leave it."""
    step = weight.abs().amax() / 3
    return weight if step == 0 else (weight / step).round() * step


def _items(weight: Float[Tensor, "out in"]) -> tuple[Float[Tensor, "_ _"], ...]:
    """The layers of a model to budget: unequal in size, scale and offset."""
    return (weight, 3 * weight[: len(weight) // 2], weight + 1, weight[-4:] / 8)


def _costs(items: tuple[Float[Tensor, "_ _"], ...]) -> tuple[Int64[Tensor, " _"], ...]:
    """Weights kept at each level: four levels, and three for the last item."""
    fractions = torch.tensor([0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    levels = [(item.numel() * fractions).ceil().long() for item in items]
    return (*levels[:-1], levels[-1][1:])


def _errors(costs: tuple[Int64[Tensor, " _"], ...]) -> tuple[Float[Tensor, " _"], ...]:
    """Falling with cost; the second item gains most from its last level, so it is not convex."""
    convex = torch.tensor([1.0, 0.4, 0.15, 0.1])
    late = torch.tensor([1.0, 0.9, 0.8, 0.05])
    curves = (convex, 2 * late, convex / 4, 3 * convex)
    return tuple(curve[-len(levels) :] for curve, levels in zip(curves, costs, strict=True))
