"""The verbs.  Each one fixes what its methods return and which options they all take."""

from collections.abc import Mapping

from jaxtyping import Bool, Float, Int
from torch import Tensor

from layerwise.core.catalogue import Verb
from layerwise.core.learning import Learnable
from layerwise.core.results import Aggregated, Coded, LowRank, Narrowed, Pruned, Score

# How important or how damaged a layer (or a block) is: one number, higher is more; or a record of
# numbers by name, whose first is that one.  The names are the same for all layers.
measure: Verb[Score] = Verb("measure")

# The index of one level per item.  The costs of the chosen levels never exceed `budget`,
# which is in the unit of `costs` (bytes for bits, weights kept for sparsity) and for the
# whole model.  The first level of every item together is what the least plan costs.
allocator: Verb[Int[Tensor, " items"]] = Verb("allocate", requires=frozenset({"budget"}))

quantizer: Verb[Coded] = Verb("quantize", requires=frozenset({"bits", "group", "symmetric"}))

# `density` is the fraction of weights kept.
pruner: Verb[Pruned] = Verb("prune", requires=frozenset({"density"}))

# What is left over when an approximation replaces a weight, as two thin matrices.
compensator: Verb[LowRank] = Verb("compensate", requires=frozenset({"rank"}))

# What is done of the work that the last axis of the evidence stands for, as a model runs: True
# where it is done.  `density` is the fraction that is.
sparsifier: Verb[Bool[Tensor, "..."]] = Verb("sparsify", requires=frozenset({"density"}))

# What several clients made of one tensor of a model, as one again.
federator: Verb[Aggregated] = Verb("federate")

# `density` is the fraction kept of the units in which the channels lie that a layer reads: `units`
# equal runs, one after the other.  The weight is that of this layer.
narrower: Verb[Narrowed] = Verb("narrow", requires=frozenset({"density", "units"}))

# One tensor made of the same tensor of several models, in float32; of a method that ties layers
# together, and reads `networks`, all tensors by name.
merger: Verb[Float[Tensor, "..."] | Mapping[str, Tensor]] = Verb("merge")

# What a pruned weight is while it is learned anew.  It begins as the weight where that is kept, and
# stays 0.0 elsewhere; `steps` and `rate` are also those of what is learned beside it.
recoverer: Verb[Learnable] = Verb("recover", requires=frozenset({"steps", "rate"}))
