"""Measures of layers while a network trains: see `Watch`, and `trainer` for transformers.

What a network learns from its input, and when: see `in_context`.

from layerwise.training import Watch

    watch = Watch(model, ["rotation", "displacement"], out="layers.jsonl", every=100)
    for batch in batches:
        ...
        optimizer.step()
        watch.step(loss=float(loss))
    watch.plot("layers.svg")
"""

from layerwise.training.watch import Watch

__all__ = ["Watch"]
