"""The KL that each layer was foreseen to bring, against the one it brings."""

from collections.abc import Sequence
from dataclasses import replace

from layerwise.core.errors import UserError
from layerwise.core.keeping.candidates import Candidates
from layerwise.core.progress import Progress
from layerwise.core.running.carried import Shelf
from layerwise.core.telling.outcome import Comparison, LayerRow, Prediction
from layerwise.flow.agreeing import rank_correlation
from layerwise.flow.planning import Planned
from layerwise.flow.preparing import Prepared
from layerwise.flow.probing import Probe
from layerwise.flow.sensitivity import IN_NATS


def predicted(
    prepared: Prepared,
    planned: Planned,
    rows: Sequence[LayerRow],
    comparison: Comparison,
    candidates: Candidates,
    windows: int,
    progress: Progress,
    shelf: Shelf,
) -> tuple[list[LayerRow], Prediction | None]:
    """Rows with what each layer was foreseen to bring and brings alone, and the two compared.

    Args:
        prepared: The model.
        planned: The plan, and what it was chosen from.
        rows: One per layer.
        comparison: The whole model's.
        candidates: Has the layers as the plan has them.
        windows: So many of the proof's text are used.
        progress: Is told of each block.
        shelf: Where activations lie between blocks.

    Returns:
        No comparison where a layer is not in the cache any more.
    """
    assert prepared.heldout is not None
    plan = planned.plan
    ids = prepared.heldout.ids[:windows]
    probe = Probe(prepared, plan.format, plan.options, candidates, ids, shelf)
    try:
        measured = probe.apart(plan.layers, progress)
    except UserError:
        return list(rows), None
    costs = {
        name: next(one.error for one in curve if one.chosen)
        for name, curve in planned.curves.items()
    }
    in_nats = planned.sensitivity in IN_NATS
    told = [
        replace(
            row,
            curve=tuple(planned.curves[row.layer]),
            predicted_kl=costs[row.layer] if in_nats else None,
            measured_kl=measured[row.layer],
        )
        for row in rows
    ]
    names = [name for name, layer in plan.layers.items() if layer.steps]
    pairs = [(costs[name], measured[name]) for name in names]
    return told, Prediction(
        sensitivity=planned.sensitivity,
        predicted=sum(costs.values()) if in_nats else None,
        measured=comparison.kl or 0.0,
        rank_correlation=rank_correlation(*zip(*pairs, strict=True)),
        layers=len(names),
    )
