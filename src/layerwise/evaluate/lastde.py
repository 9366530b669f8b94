"""Lastde and Lastde++: was a text written by a model?  From how its tokens' likelihoods move.

Both score texts and not layers, so they are no measure of the catalogue: `layerwise evaluate
MODEL --detect FILE` scores texts by the model, and says how well the scores tell labelled ones
apart.

Source: Xu, Wang, Bi and others, "Training-free LLM-generated Text Detection by Mining Token
Probability Sequences", ICLR 2025 (arXiv:2410.06072).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from layerwise.core.errors import UserError

# Series whose entropy is the same at all scales differ by this much at least.
_LEAST = 1e-6
# More tokens than windows and scales take, so that an entropy has something to count.
_SPARE = 10


def diversity_entropy(
    series: Float[Tensor, "*many tokens"], *, window: int, bins: int
) -> Float64[Tensor, "*many"]:
    """How evenly the cosines of neighbouring windows of a series spread.

    With w_i the `window` values from the i-th on, c_i = cos(w_i, w_(i+1)), and P_k the share of
    these in the k-th of `bins` equal parts of [-1, 1],

        DE = - sum_k P_k ln P_k / ln bins ,    from 0 (all alike) to 1

    Two windows of which one is all zeros count as parallel.

    Args:
        series: Values.
        window: Values in a window.
        bins: Parts of the range of a cosine.

    Raises:
        UserError: There is one bin, no window, or fewer values than two windows take.
    """
    if bins < 2 or window < 1 or series.shape[-1] < window + 1:
        raise UserError(
            f"{bins} bins and windows of {window} of {series.shape[-1]} values have no entropy.",
            "Give two bins or more, and a series longer than a window.",
        )
    windows = series.double().unfold(-1, window, 1)  # (..., places, window)
    one, other = windows[..., :-1, :], windows[..., 1:, :]
    sizes = one.norm(dim=-1) * other.norm(dim=-1)
    cosines = torch.where(sizes > 0, (one * other).sum(dim=-1) / sizes, 1.0).clamp(-1, 1)
    places = ((cosines + 1) / 2 * bins).long().clamp(max=bins - 1)  # (..., places)
    counts = torch.zeros(*places.shape[:-1], bins, dtype=torch.float64)
    counts.scatter_add_(-1, places, torch.ones_like(cosines))
    shares = counts / places.shape[-1]
    return torch.special.entr(shares).sum(dim=-1) / torch.tensor(bins).double().log()


def lastde(
    series: Float[Tensor, "*many tokens"], *, window: int = 3, bins: int = 10, scales: int = 5
) -> Float64[Tensor, "*many"]:
    """Mean log-likelihood of a text by how much its entropy differs from scale to scale.

    With x_t the log-likelihood of token t, y^(tau) the means of tau neighbouring x, and n tokens,

        Agg    = deviation over tau = 1 .. scales of DE(y^(tau)), by n - 1
        Lastde = mean_t x_t / Agg

    Texts of people move more and less regularly: their score is lower.  Scores are below 0, and
    depend on n by the bins: compare texts of one length.  An Agg below 1e-6 counts as that, so that
    a series that never moves scores very low.

    Args:
        series: Log-likelihoods of the tokens of each text, in nats.
        window: Tokens in a window.
        bins: Bins of the entropy for each token.
        scales: The longest mean.

    Returns:
        A score of each text; higher is more likely a model's.

    Raises:
        UserError: A text is too short, or one scale has no deviation.
    """
    tokens = series.shape[-1]
    if scales < 2 or tokens < fewest(window, scales):
        raise UserError(
            f"a text of {tokens} tokens is too short for {scales} scales of windows of {window}.",
            f"Give texts of {fewest(window, max(2, scales))} tokens or more, and two scales or "
            "more.",
        )
    entropies = [
        diversity_entropy(
            series.double().unfold(-1, scale, 1).mean(dim=-1), window=window, bins=bins * tokens
        )
        for scale in range(1, scales + 1)
    ]
    spread = torch.stack(entropies).std(dim=0).clamp(min=_LEAST)
    return series.double().mean(dim=-1) / spread


def lastde_plus(
    answers: Float[Tensor, "tokens vocabulary"],
    ids: Int64[Tensor, " tokens"],
    *,
    samples: int = 100,
    window: int = 4,
    bins: int = 8,
    scales: int = 15,
    seed: int = 0,
) -> float:
    """Lastde of a text beside that of texts which the model could have written in its place.

    At each place `samples` tokens are drawn from the model's own distribution, given the text
    before it as it is:

        Lastde++ = (Lastde(x) - mean_k Lastde(x_k)) / deviation_k Lastde(x_k)

    The shipped scripts have 15 scales and the authors' README 10; here it is 15.

    Args:
        answers: Log-probabilities of each token of the text, given those before it.
        ids: The tokens.
        samples: Series that are drawn.
        window: Tokens in a window.
        bins: Bins of the entropy for each token.
        scales: The longest mean.
        seed: Of the draws.

    Returns:
        The score; higher is more likely a model's, and about 0 with deviation 1 of what the model
        itself writes.

    Raises:
        UserError: The text is too short, or fewer than two samples are asked for.
    """
    if samples < 2:
        raise UserError(f"{samples} samples have no deviation.", "Give two samples or more.")
    drawn = (
        answers.double()
        .exp()
        .multinomial(samples, replacement=True, generator=torch.Generator().manual_seed(seed))
    )  # (tokens, samples)
    series = torch.cat([answers.gather(1, ids[:, None]), answers.gather(1, drawn)], dim=1).T
    own, *others = lastde(series, window=window, bins=bins, scales=scales).tolist()
    found = torch.tensor(others).double()
    return float((own - found.mean()) / found.std().clamp(min=_LEAST))


def fewest(window: int, scales: int) -> int:
    """The fewest tokens that are scored."""
    return window + scales + _SPARE


def scores(
    answers: Float[Tensor, "tokens vocabulary"], ids: Int64[Tensor, " tokens"]
) -> Mapping[str, float]:
    """All scores of a text: its mean log-likelihood, Lastde and Lastde++."""
    series = answers.gather(1, ids[:, None])[:, 0]
    return {
        "likelihood": float(series.double().mean()),
        "lastde": float(lastde(series)),
        "lastde++": lastde_plus(answers, ids),
    }


def auroc(found: Float[Tensor, " texts"], machine: Tensor) -> float:
    """Chance that a machine's text scores above a person's; ties count half."""
    above = found[machine][:, None] - found[~machine][None, :]  # (machine, people)
    return float(((above > 0).double() + (above == 0).double() / 2).mean())
