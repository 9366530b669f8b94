"""Every method in the catalogue obeys every law of its verb."""

import pytest

from layerwise.core.catalogue import VERBS, methods
from layerwise.testing import laws_of

METHODS = [method for verb in VERBS for method in methods(verb)]
CASES = [(method, law) for method in METHODS for law in laws_of(method.verb)]


@pytest.mark.parametrize(
    ("method", "law"), CASES, ids=[f"{m.id}-{law.__name__}" for m, law in CASES]
)
def test_law(method, law, request):
    if reason := method.exempt.get(law.__name__):
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    law(method)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.id)
def test_exemptions_name_laws_and_say_why(method):
    assert method.exempt.keys() <= {law.__name__ for law in laws_of(method.verb)}
    assert all(method.exempt.values())
