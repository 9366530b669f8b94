"""An error as a fraction of what it is an error of."""


def relative(error: float, whole: float) -> float:
    """`error / whole`; where the whole is nothing, 0 without an error and 1 with any."""
    if whole > 0:
        return error / whole
    return float(error > 0)
