"""Exact byte-level probabilities of a model of tokens, so that models vote byte by byte."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from layerwise.core.errors import UserError

BYTES = 256

# Logits of the token that follows some tokens: (tokens,) ids to (vocabulary,).
Answer = Callable[[tuple[int, ...]], Float[Tensor, " vocabulary"]]


@runtime_checkable
class Vocabulary(Protocol):
    """What tokens stand for, and which may follow each other.

    Attributes:
        pieces: The bytes of each token; empty for one that stands for none, as the end of a text.
        opening: Tokens that stand before every text; the last one tells what may come first.
        forced: Bytes that begin every text of the model and are not the user's.
    """

    pieces: Sequence[bytes]
    opening: tuple[int, ...]
    forced: bytes

    def follows(self, tokens: tuple[int, ...]) -> Bool[Tensor, " vocabulary"]:
        """Which tokens may come next in what the tokenizer makes of any text."""
        ...

    def encode(self, data: bytes) -> tuple[int, ...] | None:
        """The tokens of some bytes, `opening` first; None where they are no whole text."""
        ...


@dataclass(frozen=True, slots=True)
class Cover:
    """Tokens that reach the end of what was read, or past it.

    Attributes:
        tokens: All of them; only the last one reaches past it.
        ahead: What the last one stands for beyond the end.
        log: Log-probability of the tokens, in nats.
    """

    tokens: tuple[int, ...]
    ahead: bytes
    log: float


@dataclass(frozen=True)
class ByteLevel:
    """A model of tokens as the model of bytes that it is.

    A prompt that is encoded and continued asks what follows where a token happens to end, which
    the text does not say: after `Once upon a ti` the tokens of `ti` never come before `me`.  The
    probability of the bytes x is the sum over all that the tokenizer may have made of a text that
    begins with them (lemma 1 of the paper, `cover(x)`):

        P(x) = sum over covers of P(t_1 .. t_k) ,   P(b | x) = P(x b) / P(x)

    where t is the beginning of some text's encoding, x begins the bytes of t_1 .. t_k, and
    t_1 .. t_(k-1) stand for less than x.  What no text is encoded as has no probability: it is
    left out, and the rest of the model's answer brought to a sum of 1, token by token.  A byte
    more takes one answer of the model, for the cover that ends where x does.

    Unlike the paper, tokens that stand for no byte are left out too: a text does not end.

    Source: Phan et al., "Exact Byte-Level Probabilities from Tokenized Language Models for
    FIM-Tasks and Model Ensembles", 2024, arXiv 2410.09303.

    Attributes:
        answer: The model.
        vocabulary: Its tokens.
        covers: Those of the bytes that were read.
        read: The bytes that were read.
        before: Log-probability of what begins every text, which is given and not foretold.
    """

    answer: Answer
    vocabulary: Vocabulary
    covers: tuple[Cover, ...] = ()
    read: bytes = b""
    before: float = 0.0
    _seen: dict[tuple[int, ...], Tensor] = field(default_factory=dict[tuple[int, ...], Tensor])

    @classmethod
    def of(cls, answer: Answer, vocabulary: Vocabulary) -> "ByteLevel":
        """A model that has read nothing."""
        state = cls(answer, vocabulary, (Cover(vocabulary.opening, b"", 0.0),))
        for byte in vocabulary.forced:
            state = state.append(byte)
        return cls(answer, vocabulary, state.covers, b"", _total(state.covers), state._seen)

    @property
    def log(self) -> float:
        """Log-probability of the bytes that were read, in nats."""
        return _total(self.covers) - self.before

    def append(self, byte: int) -> "ByteLevel":
        """The model after one byte more.

        Raises:
            UserError: No text of the tokenizer goes on with it.
        """
        covers: list[Cover] = []
        for cover in self.covers:
            if cover.ahead:
                if cover.ahead[0] == byte:
                    covers.append(Cover(cover.tokens, cover.ahead[1:], cover.log))
                continue
            logs = self._logs(cover.tokens)
            for token in _starting(self.vocabulary, byte):
                log = float(logs[token])
                if log > -math.inf:
                    tokens = (*cover.tokens, token)
                    ahead = self.vocabulary.pieces[token][1:]
                    covers.append(Cover(tokens, ahead, cover.log + log))
        read = self.read + bytes([byte])
        covers += self._missed(read, covers)
        if not covers:
            raise UserError(
                f"no text of a model's tokenizer goes on with the byte {bytes([byte])!r} after "
                f"{self.read[-20:]!r}.",
                "Use a text of the characters that all the tokenizers know.",
            )
        wanted = {cover.tokens for cover in covers if not cover.ahead}
        kept = {tokens: logs for tokens, logs in self._seen.items() if tokens in wanted}
        return ByteLevel(self.answer, self.vocabulary, tuple(covers), read, self.before, kept)

    def next(self) -> Float64[Tensor, "256"]:
        """Probability of each byte to come next."""
        total = _total(self.covers)
        chances = torch.zeros(BYTES, dtype=torch.float64)
        firsts, real = _firsts(self.vocabulary)
        for cover in self.covers:
            share = math.exp(cover.log - total)
            if cover.ahead:
                chances[cover.ahead[0]] += share
            else:
                logs = self._logs(cover.tokens)
                chances.index_add_(0, firsts, share * logs[real].exp())
        whole = float(chances.sum())
        assert whole > 0, "a cover that nothing follows"
        return chances / whole

    def _logs(self, tokens: tuple[int, ...]) -> Float64[Tensor, " vocabulary"]:
        """Log-probability of each token to come next, of those that may."""
        if tokens not in self._seen:
            logits = self.answer(tokens).double()
            allowed = logits.where(self.vocabulary.follows(tokens), -math.inf)
            self._seen[tokens] = allowed.log_softmax(dim=0)
        return self._seen[tokens]

    def _missed(self, read: bytes, covers: Sequence[Cover]) -> list[Cover]:
        """The encoding of what was read, where its neighbours alone did not show that it is one.

        What splits a text before it is merged may look further than two tokens.
        """
        if any(not cover.ahead for cover in covers):
            return []
        tokens = self.vocabulary.encode(self.vocabulary.forced + read)
        if tokens is None:
            return []
        begun, log = len(self.vocabulary.opening), 0.0
        for end in range(begun, len(tokens)):
            log += float(self.answer(tokens[:end]).double().log_softmax(dim=0)[tokens[end]])
        return [Cover(tokens, b"", log)]


@dataclass(frozen=True)
class Vote:
    """Models that read the same bytes and foretell the next one together.

        p(b) = sum_m w_m p_m(b) ,   on the bytes that every model can write, brought to a sum of 1

    Attributes:
        models: One for each.
        weights: Theirs, summing to 1.
    """

    models: tuple[ByteLevel, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, models: Sequence[ByteLevel], weights: Sequence[float] | None = None) -> "Vote":
        """Models that vote alike, or by weights.

        Raises:
            UserError: There is no model, or there are other weights than models.
        """
        given = [1.0] * len(models) if weights is None else list(weights)
        if not models or len(given) != len(models) or min(given) < 0 or not sum(given) > 0:
            raise UserError(
                f"{len(models)} models cannot vote with the weights {given}.",
                "Give at least one model, and a weight of 0 or more for each, not all 0.",
            )
        return cls(tuple(models), tuple(one / sum(given) for one in given))

    def next(self) -> Float64[Tensor, "256"]:
        """Probability of each byte to come next."""
        return self.mixed([model.next() for model in self.models])

    def mixed(self, told: Sequence[Float64[Tensor, "256"]]) -> Float64[Tensor, "256"]:
        """What the models say together, where what each says is known."""
        shared = torch.ones(BYTES, dtype=torch.bool)
        for model in self.models:
            shared &= alphabet(model.vocabulary)
        weights = torch.tensor(self.weights, dtype=torch.float64)
        chances = (weights @ torch.stack(list(told))).where(shared, 0.0)
        return chances / chances.sum()

    def append(self, byte: int) -> "Vote":
        """The models after one byte more.

        Raises:
            UserError: A model's tokenizer cannot go on with it.
        """
        return Vote(tuple(model.append(byte) for model in self.models), self.weights)


def alphabet(vocabulary: Vocabulary) -> Bool[Tensor, "256"]:
    """Bytes that some token has."""
    found = torch.zeros(BYTES, dtype=torch.bool)
    found[torch.tensor(sorted({byte for piece in vocabulary.pieces for byte in piece}))] = True
    return found


def bits(state: ByteLevel | Vote, text: bytes) -> Float64[Tensor, " bytes"]:
    """What each byte of a text costs, in bits: -log2 P(b | what comes before).

    Raises:
        UserError: A tokenizer cannot write it.
    """
    cost: list[float] = []
    for byte in text:
        cost.append(-math.log2(max(float(state.next()[byte]), 1e-300)))  # below is none
        state = state.append(byte)
    return torch.tensor(cost, dtype=torch.float64)


def continued(
    state: ByteLevel | Vote,
    prompt: bytes,
    count: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> bytes:
    """The bytes that follow a prompt, which may end anywhere.

    Args:
        state: What foretells them.
        prompt: What is read first.
        count: How many follow.
        temperature: Of the bytes' probabilities, p^(1/t); 0 takes the likeliest.
        generator: Draws them.

    Raises:
        UserError: A tokenizer cannot write the prompt.
    """
    for byte in prompt:
        state = state.append(byte)
    made = bytearray()
    for _ in range(count):
        chances = state.next()
        if temperature > 0:
            heated = (chances.log() / temperature).softmax(dim=0)
            byte = int(heated.multinomial(1, generator=generator))
        else:
            byte = int(chances.argmax())
        made.append(byte)
        state = state.append(byte)
    return bytes(made)


def naive_next(answer: Answer, vocabulary: Vocabulary, text: bytes) -> Float64[Tensor, "256"]:
    """The next byte by the usual way: encode, and take the first byte of the token that follows.

    Raises:
        UserError: The text is no whole one to the tokenizer.
    """
    tokens = vocabulary.encode(vocabulary.forced + text)
    if tokens is None:
        raise UserError(f"{text!r} is no whole text.", "Cut it where a character ends.")
    firsts, real = _firsts(vocabulary)
    chances = torch.zeros(BYTES, dtype=torch.float64)
    chances.index_add_(0, firsts, answer(tokens).double()[real].softmax(dim=0))
    return chances


def _firsts(vocabulary: Vocabulary) -> tuple[Int64[Tensor, " real"], Int64[Tensor, " real"]]:
    """The first byte of each token that has any, and those tokens."""
    real = [token for token, piece in enumerate(vocabulary.pieces) if piece]
    firsts = [vocabulary.pieces[token][0] for token in real]
    return torch.tensor(firsts), torch.tensor(real)


def _starting(vocabulary: Vocabulary, byte: int) -> list[int]:
    return [token for token, piece in enumerate(vocabulary.pieces) if piece[:1] == bytes([byte])]


def _total(covers: Sequence[Cover]) -> float:
    """Log of the sum of their probabilities."""
    return float(torch.tensor([cover.log for cover in covers], dtype=torch.float64).logsumexp(0))
