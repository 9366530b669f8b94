"""What a run computes and what it leaves out: floating-point operations, and bytes of a cache."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


class Tally:
    """Adds up over runs.

    A multiplication and an addition count 2; only products of matrices and attention count, and
    attention in full, whether a token may look ahead or not.

    Attributes:
        flops: What was computed.
        skipped: What of that multiplied zeros, which a sparse kernel would leave out.
        offered: Entries that masks were made for.
        kept: Entries that they kept.
        cache: Bytes that caches held.
    """

    def __init__(self) -> None:
        self.flops = 0
        self.skipped = 0
        self.offered = 0
        self.kept = 0
        self.cache = 0

    @property
    def needed(self) -> int:
        """Operations that are left."""
        return self.flops - self.skipped

    def masked(self, kept: Tensor, flops: int = 0) -> None:
        """Take in a mask; each entry that is not kept leaves out so many operations."""
        entries, held = kept.numel(), int(kept.sum())
        self.offered += entries
        self.kept += held
        self.skipped += flops * (entries - held)

    @contextmanager
    def counting(self) -> Generator[None]:
        """Count what is computed inside."""
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            yield
        self.flops += counter.get_total_flops()


def _attention(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Operations of attention on a processor, of which torch keeps no count: by shapes."""
    batch, heads, asking, size = query
    return 4 * batch * heads * asking * key[2] * size


_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
