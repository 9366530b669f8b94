"""What the tokens of a checkpoint stand for, in bytes, and which may follow each other."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.reading.checkpoint import Source
from layerwise.core.written import parse_json

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"  # how SentencePiece writes a space


class PlainBytes:
    """The vocabulary of a model whose tokens are bytes."""

    def __init__(self) -> None:
        self.pieces: Sequence[bytes] = [bytes([byte]) for byte in range(256)]
        self.opening: tuple[int, ...] = ()
        self.forced = b""

    def follows(self, tokens: tuple[int, ...]) -> Bool[Tensor, " vocabulary"]:
        """Any byte may follow any other."""
        return torch.ones(256, dtype=torch.bool)

    def encode(self, data: bytes) -> tuple[int, ...] | None:
        """The bytes themselves."""
        return tuple(data)


class Tokens:
    """The vocabulary of a byte-pair tokenizer, of bytes or of characters.

    Two tokens may follow each other if the tokenizer makes just them of their text: a sequence of
    merged pairs is what a text is encoded as if and only if each two neighbours are (Berglund and
    van der Merwe, "Formalizing BPE Tokenization", 2023, arXiv 2309.08715).  What splits a text
    before that is looked at in the same two; what it does further away is not.

    Args:
        file: The tokenizer.json.

    Raises:
        UserError: It is of another kind.
    """

    def __init__(self, file: Path) -> None:
        package = need("tokenizers", "reading a tokenizer")
        try:
            told: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
            whole = package.Tokenizer.from_file(str(file))
        except Exception as error:  # the package has no class of its own
            raise UserError(f"{file} cannot be read: {error}", "Download it again.") from error
        kind = told["model"].get("type")
        splits = _kinds(told.get("pre_tokenizer"))
        if kind != "BPE" or splits - {"ByteLevel"} or told["model"].get("ignore_merges"):
            raise UserError(
                f"{file} is a tokenizer of {kind} after {', '.join(sorted(splits)) or 'nothing'}, "
                "whose tokens do not show which bytes they may stand for.",
                "Byte by byte, models vote with byte-pair tokenizers, of bytes or characters.",
            )
        spaced = _SPACE in json.dumps(told.get("normalizer"), ensure_ascii=False)
        self._of_bytes = "ByteLevel" in splits
        self.opening = tuple(whole.encode("").ids)
        prefixed = "Prepend" in _kinds(told.get("normalizer"))
        self.forced = b" " if prefixed else b""
        for part in ("normalizer", "post_processor", "truncation", "padding"):
            told[part] = None
        special = {entry["id"] for entry in told["added_tokens"]}
        told["added_tokens"] = []  # in a text their names are text
        self._inner = package.Tokenizer.from_str(json.dumps(told))
        told["pre_tokenizer"] = None
        self._merging = package.Tokenizer.from_str(json.dumps(told))
        names = {token: name for name, token in told["model"]["vocab"].items()}
        size = 1 + max([*names, *special])
        self._names = [names.get(token, "") for token in range(size)]
        self._special = special
        self._spaced = spaced
        self.pieces: Sequence[bytes] = [self._piece(token) for token in range(size)]
        self._known = {name for name in self._names if len(name) == 1}
        self._pairs: dict[int, Tensor] = {}

    def _piece(self, token: int) -> bytes:
        name = self._names[token]
        if token in self._special or not name:
            return b""
        if self._of_bytes:
            return bytes(_ALPHABET[character] for character in name)
        if found := _BYTE_TOKEN.fullmatch(name):
            return bytes([int(found[1], 16)])
        return (name.replace(_SPACE, " ") if self._spaced else name).encode()

    def follows(self, tokens: tuple[int, ...]) -> Bool[Tensor, " vocabulary"]:
        """Which tokens may follow the last of some."""
        last = tokens[-1] if tokens and self.pieces[tokens[-1]] else -1
        if last not in self._pairs:
            self._pairs[last] = self._after(last)
        return self._pairs[last]

    def _after(self, last: int) -> Bool[Tensor, " vocabulary"]:
        """Which tokens may follow one; -1 for the beginning of a text."""
        before = [] if last < 0 else [last]
        found = torch.zeros(len(self.pieces), dtype=torch.bool)
        plain = [token for token, piece in enumerate(self.pieces) if piece]
        if not self._of_bytes:
            fallen = [token for token in plain if _BYTE_TOKEN.fullmatch(self._names[token])]
            for token in fallen:
                found[token] = self._falls(last, self.pieces[token][0])
            apart = set(fallen)
            if last in apart:
                open_character = self.pieces[last][0] >= 0xC0
                before = []
                plain = [] if open_character else plain
            plain = [token for token in plain if token not in apart]
        texts: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
        for token in plain:
            whole, text = self._text([*before, token])
            texts[whole].append((token, text))
        for whole, asked in texts.items():
            inner = self._inner if whole else self._merging
            encoded = inner.encode_batch([text for _, text in asked], add_special_tokens=False)
            for (token, _), made in zip(asked, encoded, strict=True):
                found[token] = made.ids == [*before, token]
        return found

    def _text(self, tokens: Sequence[int]) -> tuple[bool, str]:
        """What is encoded to see whether it is these tokens; and whether it is a text to split.

        Bytes that are no whole text are merged in the letters that stand for them.
        """
        if self._of_bytes:
            try:
                return True, b"".join(self.pieces[token] for token in tokens).decode()
            except UnicodeDecodeError:
                pass
        return False, "".join(self._names[token] for token in tokens)

    def _falls(self, last: int, byte: int) -> bool:
        """Whether a byte that stands for itself may follow: of a character without a token."""
        before = self._names[last] if last >= 0 else ""
        inside = bool(_BYTE_TOKEN.fullmatch(before)) and self.pieces[last][0] >= 0x80
        if 0x80 <= byte < 0xC0:
            both = bytes([*self.pieces[last], byte]) if inside else b""
            return inside and both.decode(errors="ignore") not in self._known
        begun = inside and self.pieces[last][0] >= 0xC0
        return not begun and (byte >= 0xC2 or self._written(chr(byte)) not in self._known)

    def _written(self, text: str) -> str:
        return text.replace(" ", _SPACE) if self._spaced else text

    def encode(self, data: bytes) -> tuple[int, ...] | None:
        """The tokens of some bytes, what opens every text first; None where they are no text."""
        try:
            text = self._written(data.decode())
        except UnicodeDecodeError:
            return None
        ids = self._inner.encode(text, add_special_tokens=False).ids
        if b"".join(self.pieces[token] for token in ids) != data:
            return None
        return (*self.opening, *ids)


def vocabulary_of(source: Source) -> PlainBytes | Tokens:
    """The vocabulary of a checkpoint.

    Raises:
        UserError: It has none, or one of another kind.
    """
    file = next((f for f in source.companions if f.name == "tokenizer.json"), None)
    if file is not None:
        return Tokens(file)
    if source.config.get("vocab_size") == 256:
        return PlainBytes()
    raise UserError(
        f"{source.label} has no tokenizer.json, so its tokens stand for no bytes.",
        "Copy the tokenizer into the model's directory.",
    )


def _kinds(part: Any) -> set[str]:
    """The types of a tokenizer's part and of the parts in it."""
    if not part:
        return set()
    inner = part.get("normalizers") or part.get("pretokenizers")
    return {part["type"]} if inner is None else set().union(*(_kinds(one) for one in inner))


def _byte_letters() -> dict[str, int]:
    """The letters that byte-level tokenizers write bytes as: printable ones as they are."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(256 + place): byte for place, byte in enumerate(others)}


_ALPHABET = _byte_letters()
