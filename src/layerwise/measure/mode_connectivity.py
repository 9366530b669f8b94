"""Mode connectivity: whether a bent way leads from a network to another without a barrier."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from layerwise.core.catalogue import Paper
from layerwise.core.errors import UserError
from layerwise.core.verbs import measure
from layerwise.measure._path import over_the_curve
from layerwise.measure._relative import relative


def _across(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The connectivity of the networks, which all layers tell alike."""
    return {"connectivity": records[0]["connectivity"]}


@measure(
    Paper("A Model Zoo on Phase Transitions in Neural Networks", 2025, "2504.18072"),
    across=_across,
)
def mode_connectivity(
    weight: Float[Tensor, "out in"],
    base: Float[Tensor, "out in"],
    bend: Float[Tensor, "out in"],
    curve: Float[Tensor, " points"],
) -> dict[str, float]:
    """Score a layer by how far a way of low loss to another network goes round in it.

    Between the networks A and C a curve with one bend M is trained on the calibration text, all
    layers at once:

        w(t) = (1 - t)^2 A + 2 t (1 - t) M + t^2 C

    Its loss L at t = 0, 1/4, 1/2, 3/4, 1 says how well the networks are connected:

        t*           = argmax over t of |L(t) - (L(0) + L(1)) / 2|
        connectivity = (L(0) + L(1)) / 2 - L(t*)

    Below 0 there is a barrier that no such curve goes round, above 0 the ends were not trained to
    the end, about 0 they are well connected.  It is one number for both networks, and stands in
    each layer's record as across the model.  What a layer has of its own is how far it must go
    round, which the paper does not look at:

        bent = ||M - (A + C) / 2||_F / ||A - C||_F

    The curve is trained as by the official code: ten times over the text, by SGD at a rate of 0.1.
    Unlike there, it is on 2048 tokens (or pictures) of the calibration text, in sixteen parts;
    models with batch norms, whose statistics would have to be estimated anew at every point, are
    refused; and where the model foretells no token, what both networks together find the likeliest
    is taken for the truth.  With the classes at hand, `layerwise.training.phases` does it with
    them, and tells the phase.  The whole model and its graph are in memory, and M is as large as
    the model.

    Args:
        weight: The layer, of A.
        base: The same layer of C.
        bend: The same of M.
        curve: Mean loss at evenly spaced points of the curve.

    Returns:
        `bent`, the score, 0 or more, higher is more important; and `connectivity`, in nats per
        prediction.

    Raises:
        UserError: There is no point between the ends.
    """
    if len(curve) < 3:
        raise UserError(
            f"a curve of {len(curve)} points has none between its ends.", "Give 3 points or more."
        )
    first, last = weight.double(), base.double()
    round_about = float((bend.double() - (first + last) / 2).norm())
    return {
        "bent": relative(round_about, float((first - last).norm())),
        "connectivity": over_the_curve(curve.tolist()),
    }
