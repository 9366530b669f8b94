"""A broken quantizer for each law of quantizers."""

from dataclasses import replace

from testing.broken import broken

from layerwise.quantize.rtn import rtn


def one_code_too_many(weight, *, bits):
    quantized = rtn(weight, bits=bits)
    return replace(quantized, codes=quantized.codes.int() + 1)


def keeps_wide_scales(weight, *, bits, group):
    quantized = rtn(weight, bits=bits, group=group)
    return replace(quantized, scale=quantized.scale.float())


def forgets_symmetry(weight, *, bits, group, symmetric):
    return rtn(weight, bits=bits, group=group)


def eight_bits_at_most(weight, *, bits, symmetric):
    return rtn(weight, bits=min(bits, 8), symmetric=symmetric)


def always_four_bits_but_for_three(weight, *, bits, symmetric):
    return rtn(weight, bits={3: 2}.get(bits, 4 - bits // 8), symmetric=symmetric)


def pays_for_scales_with_bits(weight, *, bits, group):
    return rtn(weight, bits=bits - 2 * (group < 64), group=group)


def rounds_up(weight, *, bits):
    return rtn(weight + 1e-2, bits=bits)


def fills_holes(weight, *, bits, symmetric):
    return rtn(weight.where(weight != 0, 1.0), bits=bits, symmetric=symmetric)


def clips_at_three(weight, *, bits):
    return rtn(weight.clamp(-3, 3), bits=bits)


def repairs_in_silence(weight, *, bits, group=128):
    return rtn(weight.nan_to_num(0, 0, 0), bits=min(max(bits, 1), 16), group=max(group, 1))


BROKEN = {
    "codes_fit_their_width": broken("quantize", one_code_too_many),
    "scales_are_storable": broken("quantize", keeps_wide_scales),
    "reports_what_was_asked": broken("quantize", forgets_symmetry),
    "each_bit_quarters_the_loss": broken("quantize", eight_bits_at_most),
    "more_bits_never_hurt": broken("quantize", always_four_bits_but_for_three),
    "smaller_groups_help": broken("quantize", pays_for_scales_with_bits),
    "rows_of_zeros_stay_zero": broken("quantize", rounds_up),
    "pruned_weights_stay_zero": broken("quantize", fills_holes),
    "powers_of_two_pass_through": broken("quantize", clips_at_three),
    "refuses_nonsense": broken("quantize", repairs_in_silence),
}
