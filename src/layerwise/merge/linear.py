"""Linear averaging: the baseline every other merge is measured against."""

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Claim, Paper
from layerwise.core.verbs import merger
from layerwise.merge._differences import share_of_all


@merger(
    Paper(
        "Model soups: averaging weights of multiple fine-tuned models improves accuracy without "
        "increasing inference time",
        2022,
        "2203.05482",
    ),
    rows="entry",
    claims=(
        Claim("ingredients", "digits-soup/merge", {}, 0.039,
              "card 920: 0.3 points above the mean of three networks of other rates"),
        Claim("ingredients", "digits-specialists/merge", {}, 0.18,
              "card 920: 7 points above the mean of two specialists on the pictures of both"),
    ),
)  # fmt: skip
def linear(
    models: Float[Tensor, "models ..."],
    shares: Float[Tensor, " models"],
    *,
    normalize: bool = True,
) -> Float[Tensor, "..."]:
    """Average the models.

    With s_k the shares, as fractions of their sum,

        W = sum_k s_k W_k = W_1 + sum_k s_k (W_k - W_1)

    The second form is what is computed: copies of one model then give that model bit for bit, and
    so does a share of 1 beside shares of 0.  W_1 is the first model with a share.

    Args:
        models: The same tensor of every model.
        shares: How much each model counts.
        normalize: Take shares as fractions of their sum; otherwise sum_k s_k W_k as it is.

    Raises:
        UserError: The shares add up to nothing, and are to be fractions of that.
    """
    fractions = share_of_all(shares, normalize).tolist()
    if not normalize:
        total = models[0] * fractions[0]
        for model, share in zip(models[1:], fractions[1:], strict=True):
            total += model * share
        return total
    counted = [place for place, share in enumerate(fractions) if share]
    first = models[counted[0]]
    merged = first.clone()
    for place in counted[1:]:
        merged += (models[place] - first).mul_(fractions[place])
    return merged
