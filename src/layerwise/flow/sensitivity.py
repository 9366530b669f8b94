"""What each level of each layer costs the whole model: errors of layers, weighed.

A layer's own error says nothing of how much the model's answer cares about it.  Five weights are
to choose from, from cheap to dear:

    error   the share of the layer's output energy that is lost: all layers alike
    energy  the energy that is lost: layers with large outputs count more
    fisher  1/2 sum_o f_o lost_o, with the Fisher information f of the layer's outputs: the KL of
            the model's answer to second order, in nats per token, from one pass back through it
    kl      the KL of the model's answer, measured with that layer alone at one level in the
            middle of its own, and scaled to the others by their error
    hessian the KL of the model's answer to second order, with what layers do to each other: a
            layer's level costs its share of what all layers cost together at that level, the
            last that a layer has where it has fewer; see core/running/hessian.py.  The whole model
            is in memory for it, and the rounding of inputs is not seen

`fisher`, `kl` and `hessian` predict the KL of the whole model by adding up over layers.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.keeping.candidates import Candidates, Options
from layerwise.core.plan import LayerPlan
from layerwise.core.progress import Progress
from layerwise.core.running.apply import lost_share
from layerwise.core.running.carried import Shelf
from layerwise.core.running.fisher import output_fisher
from layerwise.core.running.hessian import Change, divergence_shares
from layerwise.flow.preparing import Prepared
from layerwise.flow.probing import Probe
from layerwise.flow.survey import Survey
from layerwise.flow.wish import Sensitivity, Wish

IN_NATS = ("fisher", "kl", "hessian")
# Windows of the calibration text: as many as keep the mean's error well below what tells layers
# apart.
FISHER_WINDOWS, PROBE_WINDOWS, HESSIAN_WINDOWS = 16, 8, 16


def chosen(wish: Wish, prepared: Prepared) -> Sensitivity:
    """The weights a wish asks for, or the best that a model allows."""
    if wish.sensitivity:
        return wish.sensitivity
    return "fisher" if prepared.runner and prepared.calibration else "error"


def weighed(
    name: Sensitivity,
    prepared: Prepared,
    wish: Wish,
    looked: Survey,
    candidates: Candidates,
    progress: Progress,
    shelf: Shelf = Shelf(),  # noqa: B008
) -> dict[str, Float64[Tensor, " levels"]]:
    """What each level of each layer costs the model.

    Args:
        name: How: see above.
        prepared: The model.
        wish: Says which format and options the levels are for.
        looked: What the levels do to their layers.
        candidates: Where results are kept.
        progress: Is told of each block.
        shelf: Where activations lie between blocks.

    Raises:
        UserError: The model cannot be run for it.
    """
    if name in IN_NATS and (prepared.runner is None or prepared.calibration is None):
        raise UserError(
            f"the sensitivity {name} is measured on a calibration text.",
            "Add --calibration TEXT, or take --sensitivity error.",
        )
    if name == "fisher":
        return _by_fisher(prepared, looked, candidates, progress, shelf)
    if name == "kl":
        return _by_kl(prepared, wish, looked, candidates, progress, shelf)
    if name == "hessian":
        return _by_hessian(prepared, wish, looked, candidates, progress)
    return {
        layer: torch.tensor([_lost(looked, layer, level, name) for level in levels]).double()
        for layer, levels in looked.levels.items()
    }


def _lost(looked: Survey, layer: str, level: LayerPlan, name: str) -> float:
    losses = looked.losses[layer]
    lost = float(losses.lost[level.work].sum())
    return lost if name == "energy" else lost_share(lost, float(losses.energy.sum()))


def fisher_key(candidates: Candidates) -> str:
    """Where the Fisher information of a model is kept."""
    return candidates.key("fisher", FISHER_WINDOWS)


def _by_fisher(
    prepared: Prepared,
    looked: Survey,
    candidates: Candidates,
    progress: Progress,
    shelf: Shelf,
) -> dict[str, Tensor]:
    key = fisher_key(candidates)
    entry = candidates.cache.get(key)
    if entry is None:
        assert prepared.runner is not None
        assert prepared.calibration is not None
        ids = prepared.calibration.ids[:FISHER_WINDOWS]
        layers = list(prepared.found.layers.values())
        fisher: Mapping[str, Tensor] = output_fisher(prepared.runner, layers, ids, progress, shelf)
        candidates.cache.put(key, fisher, {})
    else:
        fisher = entry.tensors
    return {
        layer: torch.stack(
            [
                fisher[layer].double().dot(looked.losses[layer].lost[level.work].double()) / 2
                for level in levels
            ]
        )
        for layer, levels in looked.levels.items()
    }


def middle_of(levels: Mapping[str, Sequence[LayerPlan]]) -> dict[str, LayerPlan]:
    """The levels that the KL is measured at."""
    return {layer: plans[len(plans) // 2] for layer, plans in levels.items()}


def kl_key(candidates: Candidates, middle: Mapping[str, LayerPlan], options: Options) -> str:
    """Where the KL of layers at their middle levels is kept."""
    told = {name: str(plan.work) for name, plan in middle.items()}
    return candidates.key("kl", PROBE_WINDOWS, told, options)


def _by_kl(
    prepared: Prepared,
    wish: Wish,
    looked: Survey,
    candidates: Candidates,
    progress: Progress,
    shelf: Shelf,
) -> dict[str, Tensor]:
    middle = middle_of(looked.levels)
    key = kl_key(candidates, middle, wish.options)
    entry = candidates.cache.get(key)
    if entry is None:
        assert prepared.calibration is not None
        ids = prepared.calibration.ids[:PROBE_WINDOWS]
        probe = Probe(prepared, wish.format, wish.options, candidates, ids, shelf)
        measured: Mapping[str, float] = probe.apart(middle, progress)
        candidates.cache.put(key, {}, {"kl": measured})
    else:
        measured = entry.facts["kl"]
    return {
        layer: measured[layer] * _ratios(looked, layer, levels, middle[layer])
        for layer, levels in looked.levels.items()
    }


def _ratios(
    looked: Survey, layer: str, levels: Sequence[LayerPlan], middle: LayerPlan
) -> Float64[Tensor, " levels"]:
    """Errors of levels as multiples of the middle one's; a layer that loses nothing there has 0."""
    reference = _lost(looked, layer, middle, "error")
    errors = [_lost(looked, layer, level, "error") for level in levels]
    return torch.tensor([lost_share(error, reference) for error in errors]).double()


def hessian_key(
    candidates: Candidates, levels: Mapping[str, Sequence[LayerPlan]], options: Options
) -> str:
    """Where the shares of layers at their levels are kept."""
    told = {name: [str(plan.work) for plan in plans] for name, plans in levels.items()}
    return candidates.key("hessian", HESSIAN_WINDOWS, told, options)


def _by_hessian(
    prepared: Prepared, wish: Wish, looked: Survey, candidates: Candidates, progress: Progress
) -> dict[str, Tensor]:
    key = hessian_key(candidates, looked.levels, wish.options)
    entry = candidates.cache.get(key)
    if entry is not None:
        return dict(entry.tensors)
    assert prepared.runner is not None
    assert prepared.calibration is not None
    ids = prepared.calibration.ids[:HESSIAN_WINDOWS]
    probe = Probe(prepared, wish.format, wish.options, candidates, ids)
    costs = {name: torch.zeros(len(plans)).double() for name, plans in looked.levels.items()}
    highest = max(map(len, looked.levels.values()), default=0)
    progress.stage("hessian", highest * len(ids))
    for place in range(highest):
        at = {name: min(place, len(plans) - 1) for name, plans in looked.levels.items()}
        changes = [
            _change(prepared, probe, name, plans[at[name]])
            for name, plans in looked.levels.items()
            if plans[at[name]].steps
        ]
        if not changes:
            continue
        found = divergence_shares(prepared.runner, changes, ids, progress)
        for change, share in zip(changes, found, strict=True):
            name = change.layer.name
            if at[name] == place:
                costs[name][place] = share
    candidates.cache.put(key, costs, {})
    return costs


def _change(prepared: Prepared, probe: Probe, name: str, plan: LayerPlan) -> Change:
    layer = prepared.found.layers[name]
    weight = layer.read(prepared.source).float()
    return Change(layer, weight, probe.made(name, plan).weight - weight)
