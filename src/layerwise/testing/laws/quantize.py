"""Laws of quantizers."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise.core.catalogue import Method
from layerwise.core.errors import UserError
from layerwise.core.results import Quantized
from layerwise.testing import cases

BITS = (1, 3, 8)
_SCALES = (torch.float16, torch.bfloat16)


def codes_fit_their_width(method: Method) -> None:
    """No code and no zero point needs more than `bits` bits, and no shape changes."""
    if method.stores is not Quantized:
        return
    for name, weight in cases.weights().items():
        for bits in _widths(method, *BITS):
            quantized = _quantize(method, weight, bits=bits)
            assert quantized.codes.shape == weight.shape, name
            for stored in (quantized.codes, quantized.zero):
                assert not stored.is_floating_point(), name
                assert 0 <= int(stored.min()) <= int(stored.max()) < 2**bits, name


def scales_are_storable(method: Method) -> None:
    """There is one positive, normal, 16-bit scale for every group, however short the last is."""
    if method.stores is not Quantized:
        return
    for name, weight in cases.weights().items():
        for factor in (1e-6, 1.0, 1e5):
            scaled = factor * weight.float()  # whose range has room for it
            quantized = _quantize(method, scaled, bits=cases.width(method, 2), group=32)
            assert quantized.scale.shape == (len(weight), math.ceil(weight.shape[1] / 32)), name
            assert quantized.zero.shape == quantized.scale.shape, name
            assert quantized.scale.dtype in _SCALES, name
            assert bool(quantized.scale.isfinite().all()), name
            assert quantized.scale.min() >= torch.finfo(quantized.scale.dtype).tiny, name


def reports_what_was_asked(method: Method) -> None:
    """Bits, group and symmetry come back as given, and a symmetric grid needs no zero points."""
    weight = cases.weights()["plain"]
    for asked, group, symmetric in ((4, 32, True), (3, 100, False), (8, 1000, True)):
        bits = cases.width(method, asked)
        quantized = _quantize(method, weight, bits=bits, group=group, symmetric=symmetric)
        assert quantized.bits == bits
        if method.stores is not Quantized:
            continue
        assert quantized.group == group
        assert quantized.symmetric == symmetric
        points = quantized.points
        middle = 2 ** (bits - 1) if points is None else int(points.abs().argmin())
        assert not symmetric or bool((quantized.zero == middle).all())


def each_bit_quarters_the_loss(method: Method) -> None:
    """At b bits the loss is below 32 / 4^b of what losing the whole layer would cost."""
    for name, weight in cases.weights().items():
        given = cases.evidence(method.evidence, weight)
        nothing = _loss(torch.zeros_like(weight, dtype=torch.float32), given)
        tried = ((3, False), (4, True), (8, False), (8, True), (16, False))
        for bits, symmetric in [one for one in tried if one[0] in method.widths]:
            quantized = _quantize(method, weight, bits=bits, symmetric=symmetric)
            assert _loss(quantized.dequantize(), given) <= nothing * 32 / 4**bits, (name, bits)


def more_bits_never_hurt(method: Method) -> None:
    """The error falls with every bit from 2 to 8."""
    weight = cases.weights()["plain"]
    given = cases.evidence(method.evidence, weight)
    for symmetric in (False, True):
        losses = [
            _loss(_quantize(method, weight, bits=bits, symmetric=symmetric).dequantize(), given)
            for bits in _widths(method, 2, 3, 4, 6, 8)
        ]
        assert losses == sorted(losses, reverse=True)


def smaller_groups_help(method: Method) -> None:
    """On a layer with an outlier, fewer inputs per grid leave less error."""
    weight = cases.weights()["outlier"]
    given = cases.evidence(method.evidence, weight)
    losses = [
        _loss(_quantize(method, weight, group=group).dequantize(), given) for group in (256, 64, 16)
    ]
    # What is learned anew for each size need not get better with every one of them.
    told = losses if method.learns is None else [losses[0], losses[-1]]
    assert told == sorted(told, reverse=True)


def rows_of_zeros_stay_zero(method: Method) -> None:
    """An output that was pruned away is still exactly zero."""
    weight = cases.weights()["dead row and column"]
    for bits in _widths(method, *BITS):
        restored = _quantize(method, weight, bits=bits).dequantize()
        assert bool((restored[7] == 0).all())


def pruned_weights_stay_zero(method: Method) -> None:
    """Any weight that was exactly zero is exactly zero again."""
    weight = cases.weights()["plain"]
    pruned = weight.where(weight.abs() > 0.5, 0.0)
    for symmetric in (False, True):
        bits = cases.width(method, 3)
        restored = _quantize(method, pruned, bits=bits, symmetric=symmetric).dequantize()
        assert bool((restored[pruned == 0] == 0).all())


def powers_of_two_pass_through(method: Method) -> None:
    """Four times the weight is four times the result, to the bit."""
    for name, weight in cases.weights().items():
        once, fourfold = (_quantize(method, factor * weight) for factor in (1, 4))
        assert (4 * once.dequantize()).equal(fourfold.dequantize()), name


def refuses_nonsense(method: Method) -> None:
    """Impossible options and broken weights are the user's to put right, not a wrong result."""
    weight = cases.weights()["plain"]
    absent = [{"bits": bits} for bits in range(18) if bits not in method.widths]
    # Where a group of 0 is what the method has by itself, it is the whole row.
    rows = [{"group": 0}] if method.options["group"].default else []
    for options in ({"group": -1}, *rows, *absent):
        assert _refuses(method, weight, **options), options
    for value in (math.nan, math.inf, -math.inf):
        spoilt = weight.clone()
        spoilt[5, 200] = value
        assert _refuses(method, spoilt), value


def _quantize(method: Method, weight: Tensor, **options: Any) -> Any:
    # Evidence that a wrong weight would spoil is made from a sound one.
    given = dict(cases.evidence(method.evidence, weight.nan_to_num(0, 0, 0)))
    ordinary = {"bits": cases.width(method, 4), **cases.steps(method)}
    return method.run(**{**given, "weight": weight}, **ordinary | options)


def _widths(method: Method, *asked: int) -> list[int]:
    """Those of some widths that the method has; its narrowest, if it has none of them."""
    return [bits for bits in asked if bits in method.widths] or [method.widths[0]]


def _loss(approximation: Tensor, given: Mapping[str, Any]) -> float:
    """Error of the layer's output where the method knows its inputs, else of the weight."""
    error = (approximation - given["weight"].float()).double()
    if "gram" in given:
        return float((error @ given["gram"].double() * error).sum())
    if "inputs" in given:
        return float((error @ given["inputs"].double().T).square().sum())
    return float(error.square().sum())


def _refuses(method: Method, weight: Tensor, **options: Any) -> bool:
    try:
        _quantize(method, weight, **options)
    except UserError:
        return True
    return False
