"""Text to token windows, for calibration and for proof."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.reading.checkpoint import Source
from layerwise.core.reading.families import POSITIONS, configured
from layerwise.core.written import parse_json

_DOCUMENTS_AT_ONCE = 256

Text = str | Path | Sequence[str] | Tensor


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of equal length cut one after the other from a text.

    Attributes:
        ids: Token ids, (windows, length); for a module in memory, whatever it takes a batch of.
        label: Where they came from, for reports.
        special: Which tokens stand in them beside those of the text.
    """

    ids: Shaped[Tensor, "windows ..."]
    label: str
    special: str = "given as tensors"

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.ids.numel()

    @property
    def digest(self) -> str:
        """SHA-256 of the ids: two reports with the same one read the same tokens."""
        shape = f"{self.ids.dtype} {tuple(self.ids.shape)}".encode()
        content = self.ids.contiguous().reshape(-1).view(torch.uint8).numpy().data
        return hashlib.sha256(shape + bytes(content)).hexdigest()


def windows(
    source: Source, text: Text, *, samples: int, length: int, role: str = "calibration"
) -> Windows:
    """Cut the first `samples` windows of `length` tokens from a text.

    Each document is encoded by itself, with whatever special tokens the tokenizer adds, and they
    follow each other.

    Args:
        source: The model; its directory holds the tokenizer.
        text: A text file, a JSON list of strings, `builtin`, a hub data set, strings, or token
            ids of shape (windows, length) or (tokens,).
        samples: Windows wanted; a shorter text gives fewer.
        length: Tokens per window; at most what the model's positions allow.
        role: Which built-in text `builtin` means: "calibration" or "heldout".

    Raises:
        UserError: The text is missing, unreadable, empty or shorter than one window, the model
            has no tokenizer, or nothing was asked for.
    """
    if samples < 1 or length < 2:
        raise UserError(
            f"{samples} windows of {length} tokens show nothing.",
            "Give at least one window of two tokens.",
        )
    positions = configured(source.config, POSITIONS)
    if positions and length > positions:
        raise UserError(
            f"windows of {length} tokens do not fit {source.label}, whose positions end at "
            f"{positions}.",
            f"Give --length {positions} or less.",
        )
    label = str(text) if isinstance(text, str | Path) else type(text).__name__
    if isinstance(text, Tensor):
        ids, special = text.flatten(), "given as token ids"
    else:
        ids, special = _tokens(source, documents(text, role), samples * length)
    whole = min(samples, len(ids) // length)
    if not whole:
        raise UserError(
            f"the text {label} has {len(ids)} tokens, less than one window of {length}.",
            "Give a longer text, or a smaller --length.",
        )
    return Windows(ids[: whole * length].reshape(whole, length), label, special)


def documents(text: str | Path | Sequence[str], role: str = "calibration") -> Sequence[str]:
    """The strings of a text; `role` says which built-in one is meant: see `windows`.

    Raises:
        UserError: It is missing or cannot be read.
    """
    if not isinstance(text, str | Path):
        return text
    if str(text) == "builtin":
        from layerwise import builtin

        return [builtin.text_path("heldout" if role == "heldout" else "calibration").read_text()]
    path = Path(text).expanduser()
    if not path.exists():
        return _hub_documents(str(text))
    try:
        content = path.read_text(encoding="utf-8")
        found: Any = parse_json(content) if path.suffix == ".json" else [content]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: {error}", "Give a UTF-8 text file or a JSON list of strings."
        ) from error
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UserError(f"{path} is not a JSON list of strings.", 'Write ["text", "text", …].')
    return found


def _hub_documents(name: str) -> Sequence[str]:
    missing = UserError(
        f"there is no text {name}.",
        "Give a text file, a JSON list of strings, a hub data set (owner/name), or `builtin`.",
    )
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise missing
    hub = need("datasets", f"{name} is not a file, and reading a hub data set")
    try:
        rows = hub.load_dataset(name, split="train")
        column = "text" if "text" in rows.column_names else rows.column_names[0]
        return [str(document) for document in rows[column]]
    except Exception as error:
        raise UserError(f"{missing.problem} The hub says: {error}", missing.remedy) from error


def _tokens(
    source: Source, documents: Sequence[str], wanted: int
) -> tuple[Int[Tensor, " tokens"], str]:
    """Tokens of the first documents, as many of these as `wanted` tokens take; the special ones."""
    encode, special = encoder(source)
    ids: list[int] = []
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        if len(ids) >= wanted:
            break
        for one in encode(documents[start : start + _DOCUMENTS_AT_ONCE]):
            ids += one
    return torch.tensor(ids, dtype=torch.long), special


def encoder(source: Source) -> tuple[Callable[[Sequence[str]], list[list[int]]], str]:
    """What gives the tokens of each of some documents, and says which special ones it adds.

    Args:
        source: The model; its directory holds the tokenizer.

    Raises:
        UserError: It has none, or one that cannot be read.
    """
    folder = next((f.parent for f in source.companions if f.name == "tokenizer.json"), None)
    if folder is None:
        if source.config.get("vocab_size") == 256:  # a model of bytes needs no tokenizer
            return lambda texts: [list(text.encode()) for text in texts], "none: a token is a byte"
        raise UserError(
            f"{source.label} has no tokenizer.json, so text cannot become its tokens.",
            "Copy the tokenizer into the model's directory, or pass token ids from Python.",
        )
    package = need("tokenizers", "reading text")
    try:
        tokenizer = package.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the package raises no narrower one
        raise UserError(
            f"{folder / 'tokenizer.json'} cannot be read: {error}", "Download it again."
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    added = " ".join(tokenizer.encode("").tokens)
    special = f"{added} with each document, as the tokenizer adds it" if added else "none"
    return lambda texts: [one.ids for one in tokenizer.encode_batch(list(texts))], special
