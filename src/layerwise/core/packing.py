"""Codes of any width in 32-bit words, and masks in bytes: entry i lies at bit i times its width."""

import torch
from jaxtyping import Bool, Integer
from torch import Tensor
from torch.nn import functional

WORD, BYTE = 32, 8  # bits


def words(width: int, bits: int) -> int:
    """Words that `width` codes fill."""
    return -(-width * bits // WORD)


def pack(codes: Integer[Tensor, "rows width"], bits: int) -> Integer[Tensor, "rows words"]:
    """Pack `bits`-wide codes into int32 words, the first code in the lowest bits.

    Args:
        codes: Entries in [0, 2^bits).
        bits: From 1 to 16.
    """
    rows, width = codes.shape
    needed = words(width, bits)
    padded = functional.pad(codes, (0, -width % WORD))
    if 8 % bits == 0:
        per_byte = 8 // bits
        lanes = padded.to(torch.uint8).reshape(rows, -1, per_byte)
        packed = lanes[..., 0].clone()
        for lane in range(1, per_byte):
            packed |= lanes[..., lane] << (bits * lane)
        return packed.contiguous().view(torch.int32)[:, :needed].contiguous()
    lanes = padded.long().reshape(rows, -1, WORD)  # 32 codes fill `bits` words
    packed = torch.zeros(*lanes.shape[:2], bits + 1, dtype=torch.long)
    for lane in range(WORD):
        word, shift = divmod(lane * bits, WORD)
        packed[..., word] |= lanes[..., lane] << shift
        packed[..., word + 1] |= lanes[..., lane] >> (WORD - shift) if shift else 0
    # The low 32 bits of each word, as the signed integer that has them.
    flat = packed[..., :bits].reshape(rows, -1)[:, :needed] & 0xFFFFFFFF
    return flat.where(flat < 2**31, flat - 2**32).int()


def unpack(
    packed: Integer[Tensor, "rows words"], bits: int, width: int
) -> Integer[Tensor, "rows width"]:
    """What `pack` packed.

    Args:
        packed: Words, the first code in the lowest bits of the first.
        bits: From 1 to 16.
        width: Codes in a row.

    Returns:
        Codes in [0, 2^bits), int32.
    """
    rows = len(packed)
    filled = functional.pad(packed.long() & 0xFFFFFFFF, (0, -packed.shape[1] % bits))
    blocks = filled.reshape(rows, -1, bits)  # 32 codes in `bits` words
    lanes: list[Tensor] = []
    for lane in range(WORD):
        word, shift = divmod(lane * bits, WORD)
        code = blocks[..., word] >> shift
        if shift + bits > WORD:
            code = code | blocks[..., word + 1] << (WORD - shift)
        lanes.append(code & (2**bits - 1))
    return torch.stack(lanes, dim=-1).reshape(rows, -1)[:, :width].int()


def pack_bits(mask: Bool[Tensor, "rows width"]) -> Tensor:
    """Eight entries to a byte, the first in its lowest bit; (rows, ceil(width / 8)), uint8."""
    padded = functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % BYTE))
    lanes = padded.reshape(len(mask), -1, BYTE)
    weights = 2 ** torch.arange(BYTE, dtype=torch.uint8)
    return (lanes * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, width: int) -> Bool[Tensor, "rows width"]:
    """What `pack_bits` packed."""
    bits = packed[..., None] >> torch.arange(BYTE, dtype=torch.uint8) & 1
    return bits.reshape(len(packed), -1)[:, :width].bool()


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's entries as they lie in memory."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
