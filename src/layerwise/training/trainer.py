"""The same for transformers' Trainer.

from layerwise.training.trainer import WatchCallback

    trainer = Trainer(..., callbacks=[WatchCallback(["rotation"], out="layers.jsonl", every=100)])
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from layerwise.training.watch import Watch


class WatchCallback(TrainerCallback):
    """Has a `Watch` look at the model while a Trainer trains it.

    The first record is of the model as training begins, the last of it as it ends.  Beside the
    scores stands the last loss that the Trainer logged.

    Args:
        measures: Names of measures.
        picture: SVG file to draw when training ends; None for none.
        how: What else `Watch` takes: out, every, against, text, options, probes.

    Attributes:
        watch: Has the records; None before training begins.
    """

    def __init__(
        self, measures: str | list[str], *, picture: str | Path | None = None, **how: Any
    ) -> None:
        self.watch: Watch | None = None
        self._measures = measures
        self._picture = picture
        self._how = how

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        """Take the start."""
        self.watch = Watch(given["model"], self._measures, **self._how)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        """Record a step that is due."""
        assert self.watch is not None
        self.watch.step(state.global_step, **_loss(state))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **given: Any,
    ) -> None:
        """Record the end, and draw."""
        assert self.watch is not None
        self.watch.record(state.global_step, **_loss(state))
        if self._picture is not None:
            self.watch.plot(self._picture)


def _loss(state: TrainerState) -> dict[str, float]:
    logged = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return {"loss": float(logged[-1])} if logged else {}
