"""An error as a fraction of what it is an error of."""


def relative(error: float, whole: float) -> float:
    """`error / whole`; where the whole is nothing, 0 without an error and 1 with any.

    A layer whose inputs were never seen has neither: it counts as 0.  One that answered 0 and no
    longer does counts as 1.
    """
    if whole > 0:
        return error / whole
    return float(error > 0)
