"""A broken merge for each law of merges."""

from testing.broken import broken

from layerwise.merge.linear import linear
from layerwise.merge.task_arithmetic import task_arithmetic


def flattens(models, shares):
    return linear(models, shares).reshape(-1)


def adds_before_it_divides(models, shares):
    total = sum(share * model for share, model in zip(shares.tolist(), models, strict=True))
    return total / shares.sum()


def forgets_whose_shares_they_are(models, shares):
    return linear(models, shares.sort().values)


def adds_a_constant(models, shares):
    return linear(models, shares) + 1e-3


def never_leaves_it_alone(models, base, shares):
    return task_arithmetic(models, base, shares) + (models[0] - base) / 10


def looks_at_its_neighbours(models, shares):
    merged = linear(models, shares)
    return merged + (models[1] - models[0]).mean()


BROKEN = {
    "answers_in_the_models_shape": broken("merge", flattens),
    "copies_give_the_copy": broken("merge", adds_before_it_divides),
    "ignores_the_order_of_models": broken("merge", forgets_whose_shares_they_are),
    "ignores_the_unit_of_the_weights": broken("merge", adds_a_constant),
    "no_share_leaves_the_base": broken("merge", never_leaves_it_alone),
    "entries_keep_their_word": broken("merge", looks_at_its_neighbours, rows="entry"),
}
