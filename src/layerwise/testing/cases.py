"""The tensors that methods are tried on: ordinary ones, and ones that break careless code."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from layerwise.core.catalogue import Method
from layerwise.core.reading.symmetry import Symmetry

_STEPS = 12
MODELS = 3
_MERGED = frozenset(
    {"shares", "cuts", "products", "entries", "seeds", "grams", "fishers", "moments"}
    | {"networks", "origin", "symmetries", "loss", "first"}
)
TOKENS = 160  # fewer than a layer's 256 inputs: its gram is singular
_WINDOWS, _VOCABULARY, _LATER = 4, 12, 3
_EXAMPLES, _CLASSES = 60, 3


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
    words: tuple[str, ...],
    weight: Float[Tensor, "out in"],
    *,
    seen: bool = True,
    models: int = MODELS,
) -> Mapping[str, Any]:
    """Everything a method asked for, made to fit one layer.

    Args:
        words: The evidence.
        weight: The layer.
        seen: Whether the calibration text had a token that reached it.
        models: How many models there are, of those that are merged.
    """
    noise = torch.Generator().manual_seed(1)
    inputs = _inputs(weight.shape[1], noise) * seen
    weights = _items(weight)
    norm = inputs.square().mean(dim=0).sqrt()  # (in,)
    costs = _costs(weights)
    stream = inputs.roll(1, 0) + inputs
    length = TOKENS // _WINDOWS
    labels = torch.arange(_EXAMPLES) % _CLASSES
    tuned = [weight.float() + _like(weight.float(), noise) / 10 for _ in range(MODELS)][:models]
    together = torch.stack(tuned)  # (models, ...)
    made: dict[str, Any] = {
        "weight": weight,
        "weights": weights,
        "shapes": [tuple(item.shape) for item in weights],
        "approximation": _coarse(weight),
        "kept": torch.rand(weight.shape, generator=noise) < 0.5,
        "inputs": inputs,
        # A layer answers in its own width; a block, which has no one weight, in that of its input.
        "outputs": inputs @ weight.float().T if "weight" in words else stream,
        "gram": inputs.T @ inputs / len(inputs),  # (in, in)
        "norm": norm,
        "mean": inputs.mean(dim=0),  # (in,)
        "variance": inputs.var(dim=0, correction=0),  # (in,)
        "filters": torch.randn(weight.shape[1], 18, generator=noise),  # (in, fan)
        "shifts": torch.randn(weight.shape[1], generator=noise) / 4,  # (in,)
        "norms": tuple(norm * (1 + place) for place, _ in enumerate(weights)),
        "magnitude": inputs.abs().mean(dim=0),  # (in,)
        "peak": inputs.abs().amax(dim=0),  # (in,)
        "attention": torch.rand(_WINDOWS, length, generator=noise),  # (windows, length)
        "positions": torch.arange(length).repeat(_WINDOWS),
        # Together what a block's outputs are more than its inputs.
        "updates": (inputs.roll(1, 0) / 4, inputs.roll(1, 0) * 3 / 4),
        **_answers(noise, seen),
        "ids": torch.randint(_VOCABULARY, (_WINDOWS, length), generator=noise),
        "skip_effects": torch.rand(_LATER, _WINDOWS, length, generator=noise) * seen,
        "freeze_effects": torch.rand(_LATER, _WINDOWS, length, generator=noise) * seen,
        "echoes": _causal(_WINDOWS, 3, 12, noise),
        "states": inputs[:_EXAMPLES] + _marks(labels, weight.shape[1]) * seen,
        "labels": labels,
        "scores": torch.tensor([0.5, 2.0, 0.0, 1.0]),
        "costs": costs,
        "errors": _errors(costs),
        "grad": _like(weight, noise) * seen / 100,
        "slopes": torch.randn(32, generator=noise) * seen / 100,
        "base": weight.float(),
        "disturbed": stream + inputs.flip(1) / 20,
        "base_outputs": stream + inputs.flip(1),
        "base_states": (stream.roll(1, 1), inputs.flip(1)),
        "later_states": (inputs, stream, stream + inputs.flip(1), stream - inputs.flip(1) / 2),
        "jacobian": functools.partial(_pushed, torch.randn(2 * weight.shape[1:], generator=noise)),
        "attributions": torch.randn(_WINDOWS, length - 1, generator=noise) * seen,
        "tangents": inputs[:16],
        "base_tangents": inputs[:16].flip(1),
        "ends": torch.tensor([1.0, 1.5]),
        "path": torch.tensor([1.0, 1.1, 1.4, 1.3, 1.2]),
        "deep_path": torch.tensor([1.0, 1.3, 1.7, 1.6, 1.5]),
        "random_path": torch.tensor([1.0, 1.1, 1.6, 1.7, 1.3]),
        "growing_path": torch.tensor([1.0, 1.2, 1.9, 1.6, 1.4]),
        "bend": weight.float(),
        "curve": torch.tensor([1.0, 1.3, 1.4, 1.2, 1.1]),
        "hessian": functools.partial(_curved, inputs),
        "models": together,
        "columns": weight.float().norm(dim=0),  # (in,)
        "activations": inputs,
        **_attention(weight, noise, seen),
        "server": weight,
        "clients": together,
        "counts": torch.tensor([30, 10, 60]),
        "state": {},
        "grads": together - weight.float(),
        "place": (0, 1),
        "proxy": functools.partial(_apart, together[0]),
    }
    if _MERGED & set(words):
        made |= _merged(weight.float(), tuned, inputs * seen)
    return {word: made[word] for word in words}


def models_of(method: Method) -> int:
    """How many models a method is tried on."""
    return method.merges or MODELS


def _merged(
    base: Float[Tensor, "out in"], tuned: list[Float[Tensor, "out in"]], inputs: Tensor
) -> dict[str, Any]:
    """Evidence about several models and their base."""
    differences = torch.stack(tuned) - base
    flat = torch.stack(tuned).double().flatten(1)
    sizes = differences.abs().flatten(1)
    kept = max(1, round(0.5 * base.numel()))
    # What each model saw was of another size, and in another order of inputs.
    grams = [
        (size * inputs.roll(shift, 1)).T @ (size * inputs.roll(shift, 1)) / len(inputs)
        for shift, size in ((0, 1.0), (1, 0.5), (2, 2.0))
    ]
    return {
        "shares": torch.tensor([1.0, 0.5, 2.0])[: len(tuned)],
        "cuts": sizes.sort(dim=1, descending=True).values[:, kept - 1],
        "products": flat @ flat.T,
        "entries": torch.arange(base.numel()).reshape(base.shape),
        "seeds": [101, 202, 303][: len(tuned)],
        "grams": torch.stack(grams[: len(tuned)]),
        "fishers": differences.square() * float(inputs.abs().sum() > 0),
        "networks": [_network(one) for one in tuned],
        "moments": {
            "0.weight": _joint(inputs, len(tuned)),
            "1.weight": _joint(inputs @ base.T, len(tuned)),
        },
        "first": 0,
        "origin": _network(base),
        "symmetries": (Symmetry("hidden", {"0.weight": 0, "0.bias": 0, "1.weight": 1}),),
        "loss": functools.partial(_far, _network(base)),
    }


def _joint(inputs: Float[Tensor, "tokens in"], models: int) -> Float[Tensor, "all all"]:
    """Mean products of what some models read, each a little different, and of 1."""
    parts = [inputs + k / 10 * inputs.flip(1) for k in range(models)]
    joined = torch.cat([*parts, torch.ones(len(inputs), 1)], dim=1)
    return joined.T @ joined / len(inputs)


def _network(weight: Float[Tensor, "out in"]) -> dict[str, Tensor]:
    """Two layers, one after the other."""
    return {"0.weight": weight, "0.bias": weight[:, 0] / 4, "1.weight": weight.T / 2}


def _far(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> float:
    """How far a network is from another one."""
    return sum(float((state[name] - one).double().square().sum()) for name, one in wanted.items())


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
        "units": weight.shape[1],
        "rank": min(4, *weight.shape),
        "budget": (least + most) // 2,
        "generations": 1,
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


def _attention(
    weight: Float[Tensor, "out in"], noise: torch.Generator, seen: bool
) -> dict[str, Tensor]:
    """Attention over as many tokens as the weight has columns, each of the size of its rows.

    Two pictures or texts, four heads of queries, two of keys.
    """
    rows, width = weight.shape
    keys = torch.stack([weight.float().T, weight.float().T.flip(0)])  # (2, in, out)
    keys = torch.stack([keys, 3 * keys.roll(1, 1)]) * seen  # (2, 2, in, out)
    queries = torch.randn(2, 4, width, rows, generator=noise) * seen
    products = queries @ keys.repeat_interleave(2, dim=1).transpose(2, 3)  # (2, 4, in, in)
    attentions = (products / rows**0.5).softmax(dim=-1)
    return {"queries": queries, "keys": keys, "attentions": attentions}


def _causal(
    windows: int, heads: int, length: int, noise: torch.Generator
) -> Float[Tensor, "windows heads length length"]:
    """Attention of tokens to those before them and to themselves."""
    scores = torch.randn(windows, heads, length, length, generator=noise)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return scores.where(seen, -torch.inf).softmax(dim=-1)


def _answers(noise: torch.Generator, seen: bool) -> dict[str, list[Tensor]]:
    """Log-probabilities in two batches: the model's, and ever farther ones."""
    shape = (_WINDOWS, TOKENS // _WINDOWS, _VOCABULARY)
    logits = 3 * torch.randn(shape, generator=noise) * seen
    made: dict[str, list[Tensor]] = {}
    for place, word in enumerate(("answers", "frozen", "skipped", "removed", "lens", "erased")):
        moved = logits + place * torch.randn(shape, generator=noise) * seen
        made[word] = list(moved.log_softmax(dim=-1).split(3))
    return made


def _marks(labels: Int64[Tensor, " examples"], width: int) -> Float[Tensor, "examples width"]:
    """What tells classes apart, as far as there is room for it."""
    return 4 * torch.nn.functional.one_hot(labels, max(width, _CLASSES)).float()[:, :width]


def _like(weight: Float[Tensor, "..."], noise: torch.Generator) -> Float[Tensor, "..."]:
    return torch.randn(weight.shape, generator=noise).to(weight.dtype)


def _coarse(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """The weight on seven levels, as a careless quantizer would leave it."""
    step = weight.abs().amax() / 3
    return weight if step == 0 else (weight / step).round() * step


def _curved(inputs: Float[Tensor, "tokens in"], direction: Tensor) -> Tensor:
    """The Hessian of the mean squared output, 2 gram for every row, times a direction."""
    return 2 * direction @ inputs.T @ inputs / len(inputs)


def _pushed(matrix: Tensor, direction: Tensor) -> Tensor:
    """The derivative of x + x M / 4 along a direction."""
    return direction + direction @ matrix / 4


def _apart(wanted: Tensor, tried: Tensor) -> Tensor:
    return (tried.float() - wanted).square().mean()


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
