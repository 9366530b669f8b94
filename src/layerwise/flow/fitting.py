"""Weights for each group of layers, found by trying models on a text."""

import contextlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from scipy import optimize  # type: ignore[import-untyped]

from layerwise.core.errors import UserError
from layerwise.core.merging.blend import Blend, Setting
from layerwise.core.merging.mix import Mixer
from layerwise.core.progress import Progress
from layerwise.core.reading.structure import block_of
from layerwise.core.telling.merged import Fit
from layerwise.flow.judging import Judge

Weights = npt.NDArray[np.float64]

# Weights stay between these.
_LEAST, _MOST = 0.0, 1.5
OUTSIDE = "outside the blocks"


class _Enough(Exception):  # noqa: N818
    """As many models as allowed were tried."""


def fit(
    mixer: Mixer, judge: Judge, unseen: Judge, evaluations: int, progress: Progress
) -> tuple[Blend, Fit]:
    """Find how much each model counts in each block, by Powell's method from scipy.

    First the best weights that are the same everywhere are looked for with a quarter of the
    trials; from these on each block gets its own.  What is no better on the text is not taken.

    Args:
        mixer: Merges tensors as its blend says; weights there are where the search begins.
        judge: What a model loses on the text to fit.
        unseen: The same on the part that is kept aside.
        evaluations: Most models to try.
        progress: Is told of each trial.

    Returns:
        The blend with the weights that were found, and what came of it.

    Raises:
        UserError: The method reads no weights of models.
    """
    if "shares" not in mixer.blend.merger.evidence or "networks" in mixer.blend.merger.evidence:
        raise UserError(
            f"{mixer.blend.merger.id} reads no weights of models that could be found.",
            "Use linear, task_arithmetic, ties, dare, fisher or regmean, or leave out --fit.",
        )
    groups: dict[str, list[str]] = {}
    for name, info in mixer.found.tensors.items():
        if info.dtype.is_floating_point and info.count:
            groups.setdefault(block_of(name) or OUTSIDE, []).append(name)
    search = _Search(mixer, judge, groups, evaluations, progress)
    progress.stage("fit", evaluations)
    first = next(iter(mixer.blend.settings.values())).shares
    models = len(first)
    start = np.clip(np.array(first, dtype=float), _LEAST, _MOST)
    uniform, uniform_loss = search.powell(
        lambda x: np.tile(x, len(groups)), start, max(models + 2, evaluations // 4)
    )
    layered, loss = search.powell(lambda x: x, np.tile(uniform, len(groups)), evaluations)
    if loss >= uniform_loss:
        layered, loss = np.tile(uniform, len(groups)), uniform_loss
    apart = _Search(mixer, unseen, groups, 2, progress)
    unseen_uniform = apart.loss(np.tile(uniform, len(groups)))
    unseen_loss = apart.loss(layered)
    table = dict(zip(groups, layered.reshape(len(groups), models).tolist(), strict=True))
    settings = dict(mixer.blend.settings)
    for group, names in groups.items():
        for name in names:
            settings[name] = Setting(table[group], settings[name].options)
    text = ", ".join(judge.labels)
    found = Fit(
        text,
        search.tried,
        uniform.tolist(),
        uniform_loss,
        loss,
        unseen_uniform,
        unseen_loss,
        table,
    )
    return Blend(mixer.blend.method, settings), found


class _Search:
    """Tries weights, group after group; a group whose weights are as before is not merged anew."""

    def __init__(
        self,
        mixer: Mixer,
        judge: Judge,
        groups: Mapping[str, Sequence[str]],
        evaluations: int,
        progress: Progress,
    ) -> None:
        self.mixer = mixer
        self.judge = judge
        self.groups = groups
        self.evaluations = evaluations
        self.progress = progress
        self.tried = 0
        self._held: dict[str, tuple[float, ...]] = {}

    def loss(self, weights: Weights) -> float:
        """What the model with these weights loses; (groups times models,)."""
        rows = np.asarray(weights, dtype=float).reshape(len(self.groups), -1).tolist()
        for (group, names), row in zip(self.groups.items(), rows, strict=True):
            if self._held.get(group) == tuple(row):
                continue
            for name in names:
                options = self.mixer.blend.settings[name].options
                self.judge.put({name: self.mixer.tensor(name, Setting(row, options))})
            self._held[group] = tuple(row)
        self.tried += 1
        losses = self.judge.losses()
        self.progress.step(f"trial {self.tried}")
        return sum(losses) / len(losses)

    def powell(
        self,
        spread: Callable[[Weights], Weights],
        start: Weights,
        until: int,
    ) -> tuple[Weights, float]:
        """The best weights found from a start on, until so many models were tried in all."""
        best, least = start, float("inf")

        def tell(weights: Weights) -> float:
            nonlocal best, least
            if self.tried >= min(until, self.evaluations) and least < float("inf"):
                raise _Enough
            try:
                found = self.loss(spread(weights))
            except UserError:  # weights that add up to nothing
                found = float("inf")
            if found < least:
                best, least = np.array(weights, dtype=float), found
            return found

        bounds = [(_LEAST, _MOST)] * len(start)
        with contextlib.suppress(_Enough):
            optimize.minimize(
                tell, start, method="Powell", bounds=bounds, options={"xtol": 0.02, "ftol": 1e-4}
            )
        return best, least
