"""Record measures of a network's layers step by step, as JSON lines."""

import contextlib
import copy
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import layerwise as lw
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.report.training_plots import Record, training_svg
from layerwise.training.in_context import Transition, transition


class Watch:
    """Records measures of a model's layers through its training, without touching it.

    A record is a line of JSON: the step, what the loop tells, and the score of each layer:

        {"step": 100, "loss": 0.31, "scores": {"rotation": {"mlp.0": 0.02, ...}}}

    Measures that compare two models compare with the start: a copy of the model in memory, taken
    here, unless `against` says otherwise.  A record takes what `layerwise.inspect` takes of the
    model as it is, with its dropout off.

    Args:
        model: The module that trains.
        measures: Names of measures; none where probes are enough.
        out: File to make, one line per record; None to keep records here alone.
        every: Steps from one record to the next; the start is step 0 and always recorded.
        against: What measures of pairs compare with instead of the start: a module or checkpoint.
        text: What measures that see the model run are shown: a batch of what it is called with.
        options: Options of the measures, by id, such as {"measure/filters": {"clean": True}}.
        probes: What else is asked at each record: functions of the model, to numbers by name,
            which stand beside what the loop tells.  The model is in evaluation mode then.

    Raises:
        UserError: A measure is unknown or cannot be had of the model, or the file exists.
    """

    def __init__(
        self,
        model: nn.Module,
        measures: str | Sequence[str],
        *,
        out: str | Path | None = None,
        every: int = 100,
        against: nn.Module | str | Path | None = None,
        text: Tensor | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        probes: Sequence[Callable[[nn.Module], Mapping[str, float]]] = (),
    ) -> None:
        if every < 1:
            raise UserError(f"a record every {every} steps is asked for.", "Give 1 or more.")
        self.model = model
        self.measures = [measures] if isinstance(measures, str) else list(measures)
        self.every = every
        self.probes = list(probes)
        self.records: list[Record] = []
        self.out = None if out is None else Path(out)
        methods = [catalogue.get(f"measure/{name}") for name in self.measures]
        paired = any(catalogue.PAIRED.intersection(method.evidence) for method in methods)
        self._against = copy.deepcopy(model).cpu() if paired and against is None else against
        self._how: dict[str, Any] = {"options": dict(options or {}), "calibration": text}
        self._last = -1
        if self.out is not None and self.out.exists():
            raise UserError(
                f"{self.out} exists already, and nothing is ever overwritten.",
                "Give another file, or take this one away.",
            )
        self.record(0)

    def step(self, number: int | None = None, **told: float) -> None:
        """Say that a step was made; every so often it is recorded.

        Args:
            number: Of the step, from 1; the next one if it is left out.
            told: What is to stand beside the scores, such as the loss.
        """
        self._last = self._last + 1 if number is None else number
        if self._last % self.every == 0:
            self.record(self._last, **told)

    def record(self, number: int, **told: float) -> None:
        """Record a step, whatever its number; one that is recorded already is left as it is.

        Args:
            number: Of the step.
            told: What is to stand beside the scores.
        """
        self._last = number
        if self.records and self.records[-1].step == number:
            return
        scores = self._scores() if self.measures else {}
        told |= self._probed()
        self.records.append(Record(number, told, scores))
        if self.out is not None:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            line = {"step": number, **told, "scores": scores}
            with self.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _scores(self) -> dict[str, dict[str, float]]:
        found = lw.inspect(
            self.model, self.measures, against=self._against, cache=False, **self._how
        )
        return {name: dict(column) for name, column in found.shown.items()}

    def _probed(self) -> dict[str, float]:
        found: dict[str, float] = {}
        with _judged(self.model):
            for probe in self.probes:
                found |= probe(self.model)
        return found

    def transition(self, name: str, layer: str = "", *, chance: float | None = None) -> Transition:
        """When a figure rose, or fell, in the records so far.

        Args:
            name: Of a measure, or of what the loop or a probe told.
            layer: Which layer's, of a measure.
            chance: What counts as nothing learned, instead of the first record's.

        Raises:
            UserError: It is in fewer than two records.
        """
        found = [
            (record.step, (record.scores.get(name, {}) if layer else record.told).get(key))
            for record in self.records
            for key in [layer or name]
        ]
        known = [(step, value) for step, value in found if value is not None]
        steps, values = [step for step, _ in known], [value for _, value in known]
        return transition(steps, values, chance=chance)

    def plot(self, file: str | Path) -> Path:
        """Draw every measure over the steps, a line per layer, as an SVG file.

        Raises:
            UserError: The file exists.
        """
        target = Path(file)
        if target.exists():
            raise UserError(
                f"{target} exists already, and nothing is ever overwritten.", "Give another file."
            )
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(target.name + ".partial")
        staged.write_text(training_svg(self.records), encoding="utf-8")
        staged.rename(target)
        return target


@contextlib.contextmanager
def _judged(model: nn.Module) -> Generator[None]:
    """A model in evaluation mode, and then again as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def read_records(file: str | Path) -> list[Record]:
    """The records of a file that `Watch` wrote; a last line that was cut off is left out.

    Raises:
        UserError: It is no such file.
    """
    path = Path(file)
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [json.loads(line) for line in lines if line.endswith("\n")]
        return [
            Record(
                one["step"],
                {name: value for name, value in one.items() if name not in ("step", "scores")},
                one["scores"],
            )
            for one in whole
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}.", "Give a file that layerwise.training.Watch wrote."
        ) from error
