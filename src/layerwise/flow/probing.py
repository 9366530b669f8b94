"""The KL of a model under a plan, found without writing it: from the candidates of its layers."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from layerwise import export
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.core.keeping.candidates import Candidates, Options
from layerwise.core.plan import LayerPlan
from layerwise.core.progress import Progress
from layerwise.core.reading.text import Windows
from layerwise.core.running.apply import Transformed, transform
from layerwise.core.running.carried import Activations, Shelf
from layerwise.core.running.products import Answer
from layerwise.core.running.runner import Runner
from layerwise.core.telling.outcome import Comparison
from layerwise.evaluate.text import compare
from layerwise.flow.apart import Apart
from layerwise.flow.preparing import Prepared


class Probe:
    """The original's answers on some windows, and what plans make of them.

    Args:
        prepared: The model, with what runs it.
        format: The format whose loss of precision plans are seen with.
        options: Options of methods, by id.
        candidates: Has every layer under every plan that is asked for.
        ids: Token ids, (windows, length), or whatever the model takes a batch of.
        shelf: Where activations lie between blocks.
    """

    def __init__(
        self,
        prepared: Prepared,
        format: str,
        options: Options,
        candidates: Candidates,
        ids: Tensor,
        shelf: Shelf = Shelf(),  # noqa: B008
    ) -> None:
        assert prepared.runner is not None
        self.runner = prepared.runner
        self.found = prepared.found
        self.source = prepared.source
        self.format = export.get(format, prepared.source, options)
        self.options = options
        self.candidates = candidates
        self.ids = ids
        self.shelf = shelf

    def compared(self, plans: Mapping[str, LayerPlan], windows: Windows) -> Comparison:
        """The model under a plan against the original; `windows` are those of `ids`."""
        before, after = self._carried(plans)
        answered = self.runner.logits(after, self.ids, {})
        original = self.runner.original.logits(before, self.ids, {})
        return compare(windows, [answered], original)[0]

    def together(self, plans: Mapping[str, LayerPlan]) -> float:
        """KL from the original's answers to those of the model under a plan, in nats per token."""
        return self._divergence(self.runner.original, *self._carried(plans))

    def _carried(self, plans: Mapping[str, LayerPlan]) -> tuple[Activations, Activations]:
        """The windows after the last block of the original, and of the model under a plan."""
        count, original = len(self.ids), self.runner.original
        before, after = (
            self.shelf.keep(name, runner.starting(self.ids), count)
            for name, runner in (("before", original), ("after", self.runner))
        )
        for block in self.runner.blocks:
            changed: dict[str, Tensor] = {}
            answers: dict[str, Answer] = {}
            for name in self._inside(block):
                if plans[name].steps:
                    self._change(changed, answers, name, plans[name])
            for earlier in self.runner.originals(block):
                parts = original.carry(earlier, before, {})
                before = self.shelf.keep("before", parts, count, before)
            parts = self.runner.carry(block, after, changed, answers=answers)
            after = self.shelf.keep("after", parts, count, after)
        return before, after

    def apart(self, plans: Mapping[str, LayerPlan], progress: Progress) -> dict[str, float]:
        """The same with one layer at a time under its plan, for every layer."""

        def begun(block: str, hidden: Activations) -> dict[str, Iterator[Tensor]]:
            fresh = [name for name in self._inside(block) if plans[name].steps]
            return {name: self._with(name, plans[name], block, hidden) for name in fresh}

        carried = Apart(self.runner, self.ids, begun, self.shelf, progress)
        outer, measured = self.runner.outer(), dict.fromkeys(plans, 0.0)
        for name in carried.names:
            after = carried.of(name)
            measured[name] = self._divergence(self.runner, carried.original, after, outer)
        return measured

    def made(self, name: str, plan: LayerPlan) -> Transformed:
        """A layer under a plan.

        Raises:
            UserError: It is not in the cache any more, and calibration would be needed.
        """
        layer = self.found.layers[name]
        done = self.candidates.find(layer, plan, self.options)
        if done is None and all(catalogue.get(id).needs == "nothing" for id, _ in plan.steps):
            weight = layer.matrix(self.source.read(layer.tensor)).float().contiguous()
            done = transform([layer], [weight], {}, [plan], self.options)[0]
        if done is None:
            raise UserError(
                f"{name} was made for this plan and is not in the cache any more: it holds "
                f"{self.candidates.cache.limit / 1e9:.1f} GB at most.",
                "Give it more room with --cache-size.",
            )
        return done

    def _with(
        self, name: str, plan: LayerPlan, block: str, hidden: Activations
    ) -> Iterator[Tensor]:
        """The original's windows through a block with one of its layers under a plan."""
        changed: dict[str, Tensor] = {}
        answers: dict[str, Answer] = {}
        self._change(changed, answers, name, plan)
        yield from self.runner.carry(block, hidden, changed, answers=answers)

    def _inside(self, block: str) -> list[str]:
        whole = self.runner.whole
        return [name for name, one in self.found.layers.items() if whole or one.block == block]

    def _change(
        self, changed: dict[str, Tensor], answers: dict[str, Answer], name: str, plan: LayerPlan
    ) -> None:
        """Put a layer under a plan into the tensors and answers that a block is to use."""
        layer, done = self.found.layers[name], self.made(name, plan)
        info = self.source.tensors[layer.tensor]
        # Scales that a feeder is to take do not change what a layer answers: none are moved here.
        scaled = done.input_scale is not None
        if (answer := self._answer(done, info.dtype)) is not None:
            answers[name] = answer
        matrix = done.weight if scaled else self.format.restored(done, info.dtype)
        if layer.expert is None:
            changed[info.name] = layer.store(matrix, info.shape)
        else:
            whole = changed.setdefault(info.name, self.source.read(info.name).float())
            whole[layer.expert] = matrix

    def _answer(self, done: Transformed, dtype: torch.dtype) -> Answer | None:
        """What a layer answers whose inputs are rounded, from inputs that no scale was moved to."""
        answer, scale = self.format.answer(done, dtype), done.input_scale
        if answer is None or scale is None:
            return answer
        return lambda inputs: answer(inputs / scale.to(inputs.device))

    def _divergence(
        self,
        original: Runner,
        before: Activations,
        after: Activations,
        outer: dict[str, Tensor] | None = None,
    ) -> float:
        total, count = 0.0, 0
        logits = (
            original.logits(before, self.ids, {}, outer),
            self.runner.logits(after, self.ids, {}, outer),
        )
        for answered, changed in zip(*logits, strict=True):
            p, q = (_scored(answer) for answer in (answered, changed))
            divergence = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True)
            total += float(divergence.sum(dtype=torch.float64))
            count += p.numel() // p.shape[-1]
        return max(0.0, total / count)


def _scored(logits: Any) -> Tensor:
    """Log-probabilities; the last position of a window predicts a token outside of it."""
    kept: Tensor = logits[:, :-1] if logits.dim() > 2 else logits
    return kept.float().log_softmax(dim=-1)
