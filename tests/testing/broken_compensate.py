"""A broken compensator for each law of compensators."""

from dataclasses import replace

import torch
from testing.broken import broken

from layerwise.compensate.svd import svd


def one_rank_too_many(weight, approximation, *, rank):
    return svd(weight, approximation, rank=min(rank + 1, *weight.shape))


def wrong_sign(weight, approximation, *, rank):
    return svd(approximation, weight, rank=rank)


def half_a_correction(weight, approximation, *, rank):
    correction = svd(weight, approximation, rank=rank)
    return replace(correction, left=correction.left / 2)


def corrects_the_weight(weight, approximation, *, rank):
    return svd(weight, torch.zeros_like(weight), rank=rank)


def weakest_first(weight, approximation, *, rank):
    correction = svd(weight, approximation, rank=rank)
    return replace(correction, left=correction.left.flip(1), right=correction.right.flip(0))


def clamps_the_rank(weight, approximation, *, rank):
    return svd(weight, approximation, rank=max(1, min(rank, *weight.shape)))


BROKEN = {
    "rank_is_respected": broken("compensate", one_rank_too_many),
    "never_hurts": broken("compensate", wrong_sign),
    "more_rank_never_hurts": broken("compensate", wrong_sign),
    "full_rank_restores": broken("compensate", half_a_correction),
    "lower_ranks_are_parts_of_higher_ones": broken("compensate", weakest_first, nested=True),
    "nothing_to_repair_gives_nothing": broken("compensate", corrects_the_weight),
    "refuses_an_impossible_rank": broken("compensate", clamps_the_rank),
}
