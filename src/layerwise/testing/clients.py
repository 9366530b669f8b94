"""Ten clients that share handwritten digits unevenly: seconds, any machine."""

from collections.abc import Mapping
from typing import Any

from layerwise.core import catalogue
from layerwise.core.progress import Silent
from layerwise.flow.federating import Clients, federate
from layerwise.flow.locally import Local
from layerwise.flow.studies import study_of

SEEDS = 3


def clients_loss(method: str, options: Mapping[str, Any]) -> float:
    """Error rate after 15 rounds, over their last three and over three seeds.

    Args:
        method: How clients are joined.
        options: `alpha` of the Dirichlet distribution (0.5), `epochs` of a round (3), and the
            `fault` of the first client; what else there is are options of the method, where it
            has them.
    """
    told = dict(options)
    alpha, epochs = told.pop("alpha", 0.5), told.pop("epochs", 3)
    fault, network = told.pop("fault", ""), told.pop("network", "mlp")
    found = catalogue.get(f"federate/{method}")
    total = 0.0
    for seed in range(SEEDS):
        setting = Clients(
            alpha=alpha,
            network=network,
            local=Local(epochs=epochs),
            faults={0: fault} if fault else None,
            seed=seed,
        )
        study = study_of("digits", seed)
        total += federate(study, found, found.accepts(told), setting, Silent()).accuracy
    return 1 - total / SEEDS
