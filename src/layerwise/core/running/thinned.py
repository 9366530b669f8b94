"""A cache of keys and values that keeps some channels of the keys of old tokens.

Keys are stored without the channels that a method drops, so that what a cache holds between two
tokens is really smaller.  While one block attends, its keys lie in full, with zeros in the place of
what was dropped, for the attention of transformers to read: one block's at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from layerwise.core.catalogue import Method
from layerwise.core.errors import UserError
from layerwise.core.running.products import Asked, Question
from layerwise.core.running.skipping import Sparse

Choose = Callable[[Tensor, Tensor], Tensor]


class ThinLayer(DynamicLayer):
    """What one block keeps: the keys of old tokens without some channels, those of new ones whole.

    Attributes:
        keys: Of recent and new tokens, (batch, heads, tokens, size); at first of all.
        values: Of all tokens.
        thin: Keys of old tokens, (batch, heads, tokens, channels); None before there are any.
        kept: True for the channels they have, (batch, heads, size).
    """

    # Tokens cannot be taken back: old ones have lost channels.
    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.thin: Tensor | None = None
        self.kept: Tensor | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in keys and values of new tokens, and give those of all."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.thin is None:
            return keys, values
        return torch.cat([self.whole(), keys], dim=2), values

    def whole(self) -> Float[Tensor, "batch heads tokens size"]:
        """Keys of old tokens, with zeros for the channels that they lost."""
        assert self.thin is not None
        assert self.kept is not None
        batch, heads, tokens, _ = self.thin.shape
        index = _places(self.kept)[:, :, None].expand(self.thin.shape)
        zeros = self.thin.new_zeros(batch, heads, tokens, self.kept.shape[2])
        return zeros.scatter(3, index, self.thin)

    def thinned(self, kept: Bool[Tensor, "batch heads size"], recent: int) -> None:
        """Drop channels of all tokens but the last `recent`."""
        keys, _ = self.filled()
        old, new = keys[:, :, :-recent], keys[:, :, -recent:]
        index = _places(kept)[:, :, None].expand(*old.shape[:3], -1)
        # A copy of what stays: a view would hold all of it.
        self.thin, self.keys, self.kept = old.gather(3, index), new.clone(), kept

    def filled(self) -> tuple[Tensor, Tensor]:
        """Keys and values, where there are any."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens that it holds."""
        if not self.is_initialized:
            return 0
        _, values = self.filled()
        return values.shape[2] if values.numel() else 0

    def reset(self) -> None:
        """Hold nothing."""
        self.thin = self.kept = None
        super().reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the texts of a batch in another order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take some of the texts of a batch."""
        if self.get_seq_length():
            self._each(lambda part: part[indices.to(part.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take each text of a batch so many times."""
        if self.get_seq_length():
            self._each(lambda part: part.repeat_interleave(repeats, dim=0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = (change(part) for part in self.filled())
        if self.thin is not None and self.kept is not None:
            self.thin, self.kept = change(self.thin), change(self.kept)


def _places(kept: Bool[Tensor, "batch heads size"]) -> Tensor:
    """Numbers of the channels that are kept, as many for each head."""
    return kept.nonzero()[:, 2].reshape(*kept.shape[:2], -1)


class ThinCache(DynamicCache):
    """A cache for one run of `generate`, or of a model called with `past_key_values`.

    Keys are thinned block by block as soon as the prompt was attended to; a prompt of no more than
    `recent` tokens is left whole, and so are blocks with a sliding window.  Tokens that come later
    are kept whole.

    Args:
        config: The model's configuration.
        choose: What is kept of queries and keys, (batch, heads, size).
        recent: So many tokens at the end of the prompt stay whole.
    """

    def __init__(self, config: Any, choose: Choose, recent: int) -> None:
        super().__init__(config=config)
        self.choose = choose
        self.recent = recent
        self.layers = [ThinLayer() if type(one) is DynamicLayer else one for one in self.layers]
        self._latest = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Take in keys and values of new tokens of a block, and give those of all."""
        self._latest = layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def waiting(self) -> bool:
        """Whether a block is still to be thinned."""
        return any(isinstance(one, ThinLayer) and one.thin is None for one in self.layers)

    def asked(self, question: Question) -> None:
        """Thin the block that asks, if that is due."""
        layer = self.layers[self._latest]
        queries = question.query
        if not isinstance(layer, ThinLayer) or layer.thin is not None:
            return
        if queries.shape[2] < 2 or layer.get_seq_length() <= self.recent:
            return
        keys, _ = layer.filled()
        if question.mask is not None:
            real = _real(question.mask)[..., None]  # (batch or 1, 1, tokens, 1)
            keys, queries = keys * real, queries * real[:, :, -queries.shape[2] :]
        layer.thinned(self.choose(queries, keys), self.recent)

    def held(self) -> int:
        """Bytes of its tensors."""
        return sum(
            part.untyped_storage().nbytes()
            for one in self.layers
            for part in vars(one).values()
            if isinstance(part, Tensor)
        )


def _real(mask: Tensor) -> Bool[Tensor, "batch 1 tokens"]:
    """True for the tokens that the last one sees: the others are padding, or out of reach."""
    last = mask[:, :1, -1]
    return last if last.dtype == torch.bool else last == 0


class Thinned(Sparse):
    """A model whose caches, made by `cache`, keep some channels of old keys."""

    def __init__(self, model: Any, method: Method, given: Mapping[str, Any], recent: int) -> None:
        super().__init__(model, method)
        self.given = given
        self.recent = recent

    def cache(self) -> ThinCache:
        """A cache for one run of `generate`, as `past_key_values`."""
        return ThinCache(self.model.config, self._chosen, self.recent)

    def _chosen(self, queries: Tensor, keys: Tensor) -> Tensor:
        words = {"queries": queries, "keys": keys}
        kept = self.method.run(**{word: words[word] for word in self.method.evidence}, **self.given)
        self.tally.masked(kept)
        return kept


def thin_keys(
    model: Any, method: Method, density: float, options: Mapping[str, Any], *, recent: int
) -> Thinned:
    """Have a causal language model of transformers thin the keys of caches that `cache` makes.

    Args:
        model: The model.
        method: What chooses channels, by `queries` and `keys`.
        density: Fraction of the channels of each head to keep.
        options: The method's own.
        recent: So many tokens at the end of a prompt stay whole.

    Returns:
        The model, changed in how it runs.

    Raises:
        UserError: No token is recent, or attention is computed in a way that cannot be seen.
    """
    if recent < 1:
        raise UserError(f"{recent} recent tokens cannot stay whole.", "Give one at least.")
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if attention != "sdpa" or not hasattr(model, "generate"):
        raise UserError(
            f"{type(model).__name__} computes attention by {attention}, of which queries cannot "
            "be seen.",
            "Load a causal language model with attn_implementation='sdpa'.",
        )
    thinned = Thinned(model, method, {**options, "density": density}, recent)

    def making(answer: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            if not isinstance(cache, ThinCache) or not thinned.on or not cache.waiting:
                return answer(*args, **kwargs)
            with Asked(cache.asked):
                return answer(*args, **kwargs)

        return forward

    thinned.replace(model, making)
    return thinned
