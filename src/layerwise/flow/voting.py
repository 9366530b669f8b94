"""Language models that read the same bytes: what each and all together say of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.progress import Progress
from layerwise.core.reading.checkpoint import open_checkpoint
from layerwise.core.reading.families import POSITIONS, configured
from layerwise.core.reading.text import documents
from layerwise.core.reading.vocabulary import vocabulary_of
from layerwise.core.telling.outcome import ByteVote
from layerwise.ensemble.byte_level import Answer, ByteLevel, Vote, continued
from layerwise.flow.loading import answers, load

_NEVER = 1e-300  # what is less likely costs as much


def vote(
    names: Sequence[str | Path],
    *,
    text: str | Path | Sequence[str] | None,
    samples: int,
    length: int,
    weights: Sequence[float] | None,
    prompt: str,
    count: int,
    temperature: float,
    seed: int,
    trust_remote_code: bool,
    progress: Progress,
) -> ByteVote:
    """Read a text and continue a prompt; see `layerwise.api.ensemble`.

    Raises:
        UserError: A model cannot be read, or cannot write the text.
    """
    if samples < 1 or length < 2 or count < 1 or not 0 <= temperature < float("inf"):
        raise UserError(
            f"{samples} windows of {length} bytes and {count} bytes more at temperature "
            f"{temperature} show nothing.",
            "Give a window of two bytes, a byte to go on with, and a temperature of 0 or more.",
        )
    windows = [] if text is None else _windows(documents(text, "heldout"), samples, length)
    together = Vote.of([_opened(name, trust_remote_code) for name in names], weights)
    scored = _scored(together, windows, progress)
    found: dict[str, Any] = {}
    if scored is not None:
        mean = scored.mean(dim=0)  # (models + 1,)
        gained = scored[:, :-1].mean(dim=0).argmin()
        ahead = scored[:, gained] - scored[:, -1]
        errors = _errors(scored)
        found = {
            "text": text
            if isinstance(text, str)
            else str(text)
            if isinstance(text, Path)
            else "a list",
            "bytes": sum(map(len, windows)),
            "bits": mean[:-1].tolist(),
            "bits_together": float(mean[-1]),
            "bits_error": errors[:-1],
            "gained": float(ahead.mean()),
            "gained_error": _errors(ahead[:, None])[0],
        }
    if prompt:

        def goes_on(state: ByteLevel | Vote) -> str:
            drawn = torch.Generator().manual_seed(seed)
            how: Any = {"temperature": temperature, "generator": drawn}
            return continued(state, prompt.encode(), count, **how).decode(errors="replace")

        alone = [goes_on(model) for model in together.models]
        found |= {"prompt": prompt, "continuations": alone, "continuation": goes_on(together)}
    return ByteVote([str(name) for name in names], together.weights, **found)


def _windows(texts: Sequence[str], samples: int, length: int) -> list[bytes]:
    """Windows of so many bytes at most, each a whole text of its document."""
    found: list[bytes] = []
    for text in texts:
        content = text.encode()
        start = 0
        while start < len(content) and len(found) < samples:
            stop = min(start + length, len(content))
            while stop < len(content) and 0x80 <= content[stop] < 0xC0:
                stop -= 1  # inside a character
            found.append(content[start:stop])
            start = max(stop, start + 1)
    found = [window for window in found if len(window) > 1]
    if not found:
        raise UserError("the text has not two bytes.", "Give a longer text.")
    return found


def _opened(name: str | Path, trust_remote_code: bool) -> ByteLevel:
    source = open_checkpoint(name)
    vocabulary = vocabulary_of(source)
    model = load(source, trust_remote_code=trust_remote_code)
    most = configured(source.config, POSITIONS) or 0
    return ByteLevel.of(answer_of(model, len(vocabulary.pieces), most), vocabulary)


def answer_of(model: Any, tokens: int, positions: int = 0) -> Answer:
    """What a loaded model says of the next token; where nothing is read, all are alike.

    Args:
        model: The model.
        tokens: Those that its tokenizer has.
        positions: Tokens that it can read at once, the last ones; 0 for no limit.
    """

    def answer(read: tuple[int, ...]) -> Tensor:
        if not read:
            return torch.zeros(tokens)
        (logits,) = answers(model, torch.tensor([read[-positions:]]))
        return logits[0, -1, :tokens].float()

    return answer


def _scored(
    together: Vote, windows: Sequence[bytes], progress: Progress
) -> Float64[Tensor, "windows models"] | None:
    """Bits per byte of each model and, last, of all together; None without a text."""
    progress.stage("bytes", len(windows))
    rows: list[Tensor] = []
    for window in windows:
        state, costs = together, torch.zeros(len(together.models) + 1, dtype=torch.float64)
        for byte in window:
            told = [model.next() for model in state.models]
            chances = torch.stack([*told, state.mixed(told)])[:, byte]
            costs -= chances.clamp(min=_NEVER).log2()
            state = state.append(byte)
        rows.append(costs / len(window))
        progress.step(f"{float(rows[-1][-1]):.3f}")
    return torch.stack(rows) if rows else None


def _errors(measured: Float64[Tensor, "windows columns"]) -> list[float | None]:
    """Standard errors of the columns' means."""
    if len(measured) == 1:
        return [None] * measured.shape[1]
    errors: list[float | None] = (measured.std(dim=0) / len(measured) ** 0.5).tolist()
    return errors
