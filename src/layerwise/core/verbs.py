"""The verbs.  Each one fixes what its methods return and which options they all take."""

from jaxtyping import Int
from torch import Tensor

from layerwise.core.catalogue import Verb
from layerwise.core.learning import Learnable
from layerwise.core.results import Coded, LowRank, Narrowed, Pruned

# How important or how damaged a layer (or a block) is: one number, higher is more.
measure: Verb[float] = Verb("measure")

# The index of one level per item.  The costs of the chosen levels never exceed `budget`,
# which is in the unit of `costs` (bytes for bits, weights kept for sparsity) and for the
# whole model.  The first level of every item together is what the least plan costs.
allocator: Verb[Int[Tensor, " items"]] = Verb("allocate", requires=frozenset({"budget"}))

quantizer: Verb[Coded] = Verb("quantize", requires=frozenset({"bits", "group", "symmetric"}))

# `density` is the fraction of weights kept.
pruner: Verb[Pruned] = Verb("prune", requires=frozenset({"density"}))

# What is left over when an approximation replaces a weight, as two thin matrices.
compensator: Verb[LowRank] = Verb("compensate", requires=frozenset({"rank"}))

# `density` is the fraction kept of the units in which the channels lie that a layer reads: `units`
# equal runs, one after the other.  The weight is that of this layer.
narrower: Verb[Narrowed] = Verb("narrow", requires=frozenset({"density", "units"}))

# What a pruned weight is while it is learned anew.  It begins as the weight where that is kept, and
# stays 0.0 elsewhere; `steps` and `rate` are also those of what is learned beside it.
recoverer: Verb[Learnable] = Verb("recover", requires=frozenset({"steps", "rate"}))
