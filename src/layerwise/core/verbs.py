"""The verbs.  Each one fixes what its methods return and which options they all take."""

from collections.abc import Mapping

from jaxtyping import Float, Int
from torch import Tensor

from layerwise.core.catalogue import Verb
from layerwise.core.results import Coded, LowRank, Pruned

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

# One tensor made of the same tensor of several models, in float32; of a method that ties layers
# together, and reads `states`, all tensors by name.
merger: Verb[Float[Tensor, "..."] | Mapping[str, Tensor]] = Verb("merge")
