"""Several models of quantiles as one: weights that are learned, quantiles that never cross."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from layerwise.core.errors import UserError

Kind = Literal["coarse", "medium", "fine"]
KINDS: tuple[Kind, ...] = ("coarse", "medium", "fine")
_HIDDEN = 64
_LOOK, _PATIENCE = 100, 500  # steps
_HELD = 0.2  # of the rows, to see when to stop


@dataclass(frozen=True, slots=True)
class Aggregate:
    """How the quantiles of several models become those of one.

        coarse  Q_j = sum_i w_i Z_ij
        medium  Q_j = sum_i w_ij Z_ij
        fine    Q_j = sum_ik w_ikj Z_ik

    where Z_ij is what model i says of level j, and w, for each j, a softmax: of numbers that are
    the same for all rows, or that a network makes of a row's features (local).  What comes out is
    sorted, which never raises the loss of any row.

    Attributes:
        levels: Of the quantiles, ascending.
        kind: What the weights are shared over.
        logits: What makes them of features: (rows, inputs) to (rows, models or so, levels).
        local: Whether features count.
        shifts: How far each level is moved outwards, (levels,): see `conformal`.
        steps: Steps that were taken.
    """

    levels: Float[Tensor, " levels"]
    kind: Kind
    logits: Callable[[Tensor], Tensor]
    local: bool
    shifts: Float[Tensor, " levels"]
    steps: int

    def predict(
        self,
        predictions: Float[Tensor, "rows models levels"],
        features: Float[Tensor, "rows inputs"] | None = None,
    ) -> Float[Tensor, "rows levels"]:
        """Quantiles, ascending in every row.

        Args:
            predictions: What each model says.
            features: Of the rows, for local weights.

        Raises:
            UserError: The weights are local and no features were given.
        """
        if self.local and features is None:
            raise UserError("local weights read features, and none were given.", "Give them.")
        given = torch.zeros(1, 1) if features is None else features.float()
        with torch.no_grad():
            joined = combined(predictions.float(), self.logits(given), self.kind)
        return (joined + self.shifts).sort(dim=1).values


def combined(
    predictions: Float[Tensor, "rows models levels"],
    logits: Float[Tensor, "few weighed columns"],
    kind: Kind,
) -> Float[Tensor, "rows levels"]:
    """The weighted sums, as they are."""
    weights = logits.softmax(dim=1)
    if kind == "fine":
        every = weights.expand(len(predictions), -1, -1)
        return torch.einsum("nw,nwj->nj", predictions.flatten(1), every)
    return (predictions * weights).sum(dim=1)


def pinball(
    targets: Float[Tensor, " rows"],
    quantiles: Float[Tensor, "rows levels"],
    levels: Float[Tensor, " levels"],
) -> Float[Tensor, "rows levels"]:
    """max(tau e, (tau - 1) e) with e = y - Q."""
    error = targets[:, None] - quantiles
    return torch.maximum(levels * error, (levels - 1) * error)


def interval_score(
    targets: Float[Tensor, " rows"],
    quantiles: Float[Tensor, "rows levels"],
    levels: Float[Tensor, " levels"],
) -> Float[Tensor, " rows"]:
    """The weighted interval score of each row, of levels that lie evenly about a half.

    With K intervals of levels alpha_k / 2 and 1 - alpha_k / 2, and the median m:

        WIS = 1 / (K + 1/2) ( |y - m| / 2 + sum_k alpha_k / 2 IS_k )
        IS  = (u - l) + 2 / alpha max(l - y, 0) + 2 / alpha max(y - u, 0)

    Raises:
        UserError: The levels do not.
    """
    check_levels(levels, even=True)
    half = len(levels) // 2
    low, high = quantiles[:, :half], quantiles.flip(1)[:, :half]
    alpha = 2 * levels[:half]
    outside = (low - targets[:, None]).clamp(min=0) + (targets[:, None] - high).clamp(min=0)
    scores = (alpha / 2 * (high - low) + outside).sum(dim=1)
    middle = len(levels) % 2
    if middle:
        scores = scores + (targets - quantiles[:, half]).abs() / 2
    return scores / (half + middle / 2)


def aggregate(
    predictions: Float[Tensor, "rows models levels"],
    targets: Float[Tensor, " rows"],
    levels: Float[Tensor, " levels"],
    *,
    kind: Kind = "fine",
    features: Float[Tensor, "rows inputs"] | None = None,
    crossing: float = 1.0,
    margin: float = 1e-3,
    steps: int = 4000,
    rate: float = 0.01,
    seed: int = 0,
) -> Aggregate:
    """Learn how much each model counts, at each level, from what they say of rows they never saw.

    The loss is that of the quantiles, and one for quantiles that cross:

        L = mean pinball + c / (n m (m - 1) / 2) sum over rows and j < k of max(Q_j - Q_k + d, 0)

    lowered by Adam (amsgrad, weight decay 1e-7) in batches of 2^(3 + floor(log10 n)) rows.  One
    row in five is held out; what has the least loss there, looked at every 100 steps, is kept,
    and 500 steps without progress end it.  All weights begin alike.

    Unlike the paper, no settings are searched, and the rate is ten times its 1e-3, for weights
    begin far from where they end.  Predictions on rows that the models were fitted to would
    choose the one that overfits: give those of other folds.

    Source: Kim et al., "Flexible Model Aggregation for Quantile Regression", JMLR 2023,
    arXiv 2103.00083.

    Args:
        predictions: What each model says of each row.
        targets: What was there.
        levels: Of the quantiles, ascending, between 0 and 1.
        kind: `coarse`, `medium` or `fine`: see `Aggregate`.
        features: Of the rows: weights are then local, made by a network of two layers of 64.
        crossing: c.
        margin: d, in the unit of the targets.
        steps: Most of them; 0 leaves all weights alike.
        rate: Of Adam.
        seed: Of the rows that are held out, of batches and of the network.

    Raises:
        UserError: Something does not fit, is no number, or is out of its range.
    """
    _check(predictions, targets, levels, kind, features)
    if steps < 0 or not rate > 0 or not crossing >= 0:
        raise UserError(
            f"{steps} steps at a rate of {rate}, crossing counting {crossing}, learn nothing.",
            "Give 0 steps or more, a rate above 0, and a weight of 0 or more.",
        )
    rows, models, width = predictions.shape
    weighed = models * width if kind == "fine" else models
    columns = 1 if kind == "coarse" else width
    draw = torch.Generator().manual_seed(seed)
    module = _logits(features, weighed, columns, seed)
    order = torch.randperm(rows, generator=draw)
    held, seen = order[: int(_HELD * rows)], order[int(_HELD * rows) :]
    said, answers = predictions.float(), targets.float()
    given = torch.zeros(rows, 1) if features is None else features.float()

    def loss(where: Tensor, penalty: float) -> Tensor:
        of_rows = given[:1] if features is None else given[where]
        joined = combined(said[where], module(of_rows), kind)
        found = pinball(answers[where], joined, levels).mean()
        return found + penalty * crossings(joined, margin) if penalty else found

    descent = torch.optim.Adam(module.parameters(), lr=rate, weight_decay=1e-7, amsgrad=True)
    best, taken, kept = math.inf, 0, copy.deepcopy(module.state_dict())
    batch = 2 ** (3 + int(math.log10(max(len(seen), 1))))
    for step in range(steps + 1):
        if step % _LOOK == 0 and len(held):
            with torch.no_grad():
                now = float(loss(held, crossing))
            if now < best:
                best, taken, kept = now, step, copy.deepcopy(module.state_dict())
            if step - taken >= _PATIENCE:
                break
        if step < steps:
            some = seen[torch.randint(len(seen), (batch,), generator=draw)]
            descent.zero_grad()
            loss(some, crossing).backward()
            descent.step()
    module.load_state_dict(kept)
    return Aggregate(levels, kind, module, features is not None, torch.zeros(width), taken)


def crossings(quantiles: Float[Tensor, "rows levels"], margin: float) -> Tensor:
    """Mean over rows and pairs j < k of max(Q_j - Q_k + margin, 0)."""
    width = quantiles.shape[1]
    if width < 2:
        return quantiles.sum() * 0
    upper = torch.triu_indices(width, width, 1)
    return (quantiles[:, upper[0]] - quantiles[:, upper[1]] + margin).clamp(min=0).mean()


def conformal(
    found: Aggregate,
    predictions: Float[Tensor, "rows models levels"],
    targets: Float[Tensor, " rows"],
    features: Float[Tensor, "rows inputs"] | None = None,
) -> Aggregate:
    """Move each pair of levels until it holds as often as it says, on rows that nothing saw.

    For the pair of levels a / 2 and 1 - a / 2, on n rows (conformalized quantile regression):

        E_i = max(Q_lo - y, y - Q_hi) ,   shift = the ceil((n + 1)(1 - a))-th smallest E

    Q_lo goes down by the shift, and Q_hi up; below 0 they come nearer.  New rows like these then
    lie between them with a probability of 1 - a or more.

    Args:
        found: Weights that never saw these rows.
        predictions: What models say that never saw these rows.
        targets: What was there.
        features: Of the rows, for local weights.

    Raises:
        UserError: The levels do not lie evenly about a half.
    """
    check_levels(found.levels, even=True)
    quantiles = found.predict(predictions, features)
    rows, shifts = len(targets), torch.zeros(len(found.levels))
    for low in range(len(found.levels) // 2):
        high = len(found.levels) - 1 - low
        apart = torch.maximum(
            quantiles[:, low] - targets.float(), targets.float() - quantiles[:, high]
        )
        place = math.ceil((rows + 1) * (1 - 2 * float(found.levels[low])) - 1e-9)
        shift = apart.sort().values[min(max(place, 1), rows) - 1]
        shifts[low], shifts[high] = -shift, shift
    return replace(found, shifts=found.shifts + shifts)


class QuantileEnsemble:
    """Regressors of quantiles as one, with `fit` and `predict` as scikit-learn has them.

    Args:
        bases: Each either what makes a fresh regressor of one level, `base(level)`, whose
            `predict` gives (rows,); or a regressor of all levels, whose `predict` gives
            (rows, levels) and of which copies are fitted.
        levels: Of the quantiles, ascending.
        kind: `coarse`, `medium` or `fine`.
        local: Let the weights depend on the features.
        folds: Parts of the rows: weights are learned from what models say of a part that were
            fitted to the others.
        calibrated: Fraction of the rows that conformal calibration holds back; 0 for none.
        seed: Of everything that is drawn.
        options: Of `aggregate`: steps, rate, crossing, margin.
    """

    def __init__(
        self,
        bases: Sequence[Any],
        levels: Sequence[float],
        *,
        kind: Kind = "fine",
        local: bool = False,
        folds: int = 5,
        calibrated: float = 0.0,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.bases = list(bases)
        self.levels = torch.tensor(list(levels), dtype=torch.float32)
        self.kind: Kind = kind
        self.local = local
        self.folds = folds
        self.calibrated = calibrated
        self.seed = seed
        self.options = dict(options or {})
        self.found: Aggregate | None = None
        self._fitted: list[Any] = []
        self._mean, self._spread = torch.zeros(1), torch.ones(1)

    def fit(self, features: Any, targets: Any) -> "QuantileEnsemble":
        """Fit the bases in folds, the weights to what they say, and the bases again to all rows.

        Args:
            features: (rows, inputs).
            targets: (rows,).

        Raises:
            UserError: There are too few rows, or what a base says has another shape.
        """
        check_levels(self.levels)
        rows, answers = np.asarray(features, dtype=float), np.asarray(targets, dtype=float)
        if len(rows) != len(answers) or not 2 <= self.folds <= len(rows):
            raise UserError(
                f"{len(rows)} rows of features with {len(answers)} targets cannot be cut into "
                f"{self.folds} folds.",
                "Give one target for each row, and at least as many rows as folds.",
            )
        if not self.bases or not 0 <= self.calibrated < 1:
            raise UserError(
                f"{len(self.bases)} bases with {self.calibrated} of the rows held back are none.",
                "Give a base, and a fraction from 0 up to 1.",
            )
        order = np.random.default_rng(self.seed).permutation(len(rows))
        count = int(self.calibrated * len(rows))
        held, learned = order[:count], order[count:]
        outside = np.zeros((len(learned), len(self.bases), len(self.levels)))
        for part in np.array_split(np.arange(len(learned)), self.folds):
            others = np.setdiff1d(np.arange(len(learned)), part)
            fitted = self._fit(rows[learned[others]], answers[learned[others]])
            outside[part] = self._say(fitted, rows[learned[part]])
        shown = torch.tensor(rows[learned]).float()
        self._mean, self._spread = shown.mean(dim=0), shown.std(dim=0).clamp(min=1e-6)
        found = aggregate(
            torch.tensor(outside).float(),
            torch.tensor(answers[learned]).float(),
            self.levels,
            kind=self.kind,
            features=self._features(rows[learned]),
            seed=self.seed,
            **self.options,
        )
        self._fitted = self._fit(rows[learned], answers[learned])
        if count:
            told = torch.tensor(self._say(self._fitted, rows[held])).float()
            truth = torch.tensor(answers[held]).float()
            found = conformal(found, told, truth, self._features(rows[held]))
        self.found = found
        return self

    def predict(self, features: Any) -> np.ndarray:
        """Quantiles of each row, ascending: (rows, levels).

        Raises:
            UserError: It was not fitted.
        """
        if self.found is None:
            raise UserError("the ensemble was not fitted.", "Call fit first.")
        rows = np.asarray(features, dtype=float)
        told = torch.tensor(self._say(self._fitted, rows)).float()
        return self.found.predict(told, self._features(rows)).numpy()

    def _features(self, rows: np.ndarray) -> Tensor | None:
        if not self.local:
            return None
        return (torch.tensor(rows).float() - self._mean) / self._spread

    def _fit(self, rows: np.ndarray, answers: np.ndarray) -> list[Any]:
        fitted: list[Any] = []
        for base in self.bases:
            made = (
                [copy.deepcopy(base)]
                if hasattr(base, "fit")
                else [base(float(level)) for level in self.levels]
            )
            for one in made:
                one.fit(rows, answers)
            fitted.append(made)
        return fitted

    def _say(self, fitted: Sequence[Any], rows: np.ndarray) -> np.ndarray:
        """What fitted bases say: (rows, bases, levels)."""
        said: list[np.ndarray] = []
        for made in fitted:
            told = [np.asarray(one.predict(rows), dtype=float) for one in made]
            together = told[0] if told[0].ndim == 2 else np.stack(told, axis=1)
            if together.shape != (len(rows), len(self.levels)):
                raise UserError(
                    f"a base says {together.shape} of {len(rows)} rows at {len(self.levels)} "
                    "levels.",
                    "Its predict must give (rows, levels), or it must be made for one level.",
                )
            said.append(together)
        return np.stack(said, axis=1)


def check_levels(levels: Float[Tensor, " levels"], *, even: bool = False) -> None:
    """Refuse levels that are none.

    Raises:
        UserError: They are not ascending between 0 and 1, or not evenly about a half.
    """
    inside = bool(((levels > 0) & (levels < 1)).all())
    if not len(levels) or not inside or bool((levels.diff() <= 0).any()):
        raise UserError(
            f"the levels {levels.tolist()} are none.", "Give ascending numbers between 0 and 1."
        )
    if even and not torch.allclose(levels + levels.flip(0), torch.ones(len(levels)), atol=1e-5):
        raise UserError(
            f"the levels {levels.tolist()} do not lie evenly about 0.5.",
            "Give 1 - tau for each tau.",
        )


def _check(
    predictions: Tensor, targets: Tensor, levels: Tensor, kind: str, features: Tensor | None
) -> None:
    check_levels(levels)
    if kind not in KINDS:
        raise UserError(f"there are no weights {kind!r}.", f"Weights: {', '.join(KINDS)}.")
    given = [targets, *([] if features is None else [features])]
    fits = predictions.shape[2] == len(levels) and all(
        len(one) == len(predictions) for one in given
    )
    if not fits or not predictions.numel():
        raise UserError(
            f"predictions of {tuple(predictions.shape)} do not fit {len(targets)} targets and "
            f"{len(levels)} levels.",
            "Give (rows, models, levels), and a target and features for each row.",
        )
    if not all(bool(one.isfinite().all()) for one in (predictions, *given)):
        raise UserError(
            "predictions, targets or features hold NaN or infinity.", "Leave those rows out."
        )


def _logits(features: Tensor | None, weighed: int, columns: int, seed: int) -> nn.Module:
    """What makes logits, all zero at first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if features is None:
            return _Same(weighed, columns)
        last = nn.Linear(_HIDDEN, weighed * columns)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        return nn.Sequential(
            nn.Linear(features.shape[1], _HIDDEN),
            nn.ELU(),
            nn.Linear(_HIDDEN, _HIDDEN),
            nn.ELU(),
            last,
            nn.Unflatten(1, (weighed, columns)),
        )


class _Same(nn.Module):
    """The same logits for every row."""

    def __init__(self, weighed: int, columns: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(1, weighed, columns))

    def forward(self, features: Tensor) -> Tensor:
        """The logits, whatever the features."""
        return self.logits
