import dataclasses

import pytest

from layerwise.core.catalogue import Claim, get
from layerwise.core.progress import Silent
from layerwise.testing import claims


@pytest.mark.parametrize(
    ("loss", "baseline", "verdict"),
    [
        (0.4, 1.0, claims.HOLDS),
        (0.6, 1.0, claims.FAILS),
        (0.495, 1.0, claims.CLOSE),
        (0.505, 1.0, claims.CLOSE),
        (-1.0, 0.0, claims.NO_REGIME),
        (-1.0, -0.1, claims.NO_REGIME),
    ],
)
def test_a_claim_needs_a_baseline_that_loses_something(loss, baseline, verdict, monkeypatch):
    claim = Claim("rtn", "builtin-tiny/quantize", {"bits": 3}, 0.5, "a source")
    method = dataclasses.replace(get("quantize/gptq"), claims=(claim,))
    losses = {"gptq": loss, "rtn": baseline}
    monkeypatch.setattr(claims.catalogue, "get", lambda _: method)
    monkeypatch.setattr(claims, "bench_loss", lambda model, verb, name, options: losses[name])
    (found,) = claims.check_claims(["quantize/gptq"], Silent())
    assert (found.loss, found.baseline, found.verdict) == (loss, baseline, verdict)


def test_what_could_not_begin_in_time_is_not_checked(monkeypatch):
    claim = Claim("rtn", "builtin-tiny/quantize", {"bits": 3}, 0.5, "a source")
    method = dataclasses.replace(get("quantize/gptq"), claims=(claim,))
    monkeypatch.setattr(claims.catalogue, "get", lambda _: method)
    monkeypatch.setattr(claims, "bench_loss", lambda *run: 1.0)
    (found,) = claims.check_claims(["quantize/gptq"], Silent(), minutes=0.0)
    assert (found.loss, found.verdict) == (None, claims.NOT_REACHED)
