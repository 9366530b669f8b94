"""A broken method for each law of every verb."""

from dataclasses import replace

import torch
from testing.broken import broken

from layerwise.quantize.rtn import rtn


def tidies_in_place(weight, *, bits):
    weight[weight.abs() < 1] = 0.0
    return rtn(weight, bits=bits)


def rounds_at_random(weight, *, bits):
    return rtn(weight + torch.rand(weight.shape) / 10, bits=bits)


def divides_by_the_spread(weight, *, bits):
    quantized = rtn(weight, bits=bits)
    spread = weight.float().std(dim=1, keepdim=True)
    return replace(quantized, scale=quantized.scale * spread / spread)


def weighs_by_energy(weight, gram, *, bits):
    energy = gram.diagonal()
    quantized = rtn(weight, bits=bits)
    return replace(quantized, scale=quantized.scale * (energy / energy.mean()).mean())


def shares_one_grid(weight, *, bits):
    return rtn(weight + weight.abs().amax(), bits=bits)


BROKEN = {
    "leaves_its_inputs_alone": broken("quantize", tidies_in_place),
    "repeats_itself": broken("quantize", rounds_at_random),
    "is_finite": broken("quantize", divides_by_the_spread),
    "works_without_a_token": broken("quantize", weighs_by_energy),
    "rows_keep_their_word": broken("quantize", shares_one_grid, rows="independent"),
}
