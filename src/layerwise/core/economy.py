"""How much a run takes up at a time: what it may be told to do with less memory."""

import math
from dataclasses import dataclass

from layerwise.core.errors import UserError
from layerwise.core.written import UNITS, bytes_of

# Tokens that go through a block at once.  More would gain no speed and take memory.
MICRO_BATCH_TOKENS = 2048
# Logits that are looked at at once, where more than one window's are.
LOGITS_BYTES = 1 << 26
# Rows of a tensor that are read at once.
READ_BYTES = 1 << 24
_FLOAT = 4  # bytes


@dataclass(frozen=True, slots=True)
class Economy:
    """How a run is to hold less in memory than it could.

    Attributes:
        read_bytes: Rows of a tensor that are read at once, where no method needs all of them.  No
            result changes.
        on_disk: Activations lie in the staging folder between blocks.  No result changes.
        input_by_input: The evidence of one input at a time is gathered, with a pass through the
            block for each.  No result changes.
        tokens: Tokens that go through a block at once; one window at least.  Fewer than
            MICRO_BATCH_TOKENS add up in another order, so that results may differ in the last
            digits of a float32, and a rounded weight here and there.
    """

    read_bytes: int = READ_BYTES
    on_disk: bool = False
    input_by_input: bool = False
    tokens: int = MICRO_BATCH_TOKENS

    def notes(self) -> list[str]:
        """What is done, in words for a report."""
        said = (
            (
                self.read_bytes < READ_BYTES,
                f"tensors were read {shown(self.read_bytes)} at a time",
            ),
            (self.on_disk, "activations lay on disk between blocks"),
            (self.input_by_input, "each input's evidence was gathered by itself"),
            (
                self.tokens < MICRO_BATCH_TOKENS,
                f"{self.tokens} tokens went through a block at once, which can change the last "
                "digits of what is computed",
            ),
        )
        return [words for applies, words in said if applies]


LAVISH = Economy()


def windows_at_once(length: int, vocabulary: int = 0, tokens: int = MICRO_BATCH_TOKENS) -> int:
    """Windows of `length` tokens that are run at once, one at least.

    Args:
        length: Tokens of a window.
        vocabulary: Entries of each token's logits, where those are looked at; 0 if not.
        tokens: Tokens that may be run at once.
    """
    most = min(tokens, LOGITS_BYTES // (_FLOAT * vocabulary)) if vocabulary else tokens
    return max(1, most // length)


def memory_limit(written: str) -> int:
    """The bytes that a limit of memory allows.

    Raises:
        UserError: It is not written as one, or allows nothing.
    """
    try:
        size = bytes_of(written)
    except UserError:
        size = 0
    if not size:
        raise UserError(
            f"{written!r} is not an amount of memory.", "Write it as 4GiB, 800MiB or 1.5GB."
        )
    return size


def shown(size: int) -> str:
    """Bytes in words that `memory_limit` reads, rounded up."""
    if size >= UNITS["GiB"]:
        return f"{math.ceil(100 * size / UNITS['GiB']) / 100:.2f}GiB"
    return f"{math.ceil(size / UNITS['MiB'])}MiB"
