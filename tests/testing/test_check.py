import dataclasses

import pytest
from testing.broken_quantize import BROKEN

from layerwise.core.catalogue import get
from layerwise.testing import check


def test_passes_a_sound_method():
    check(get("quantize/rtn"))


def test_lists_every_law_that_is_broken():
    with pytest.raises(AssertionError, match="each_bit_quarters_the_loss") as caught:
        check(BROKEN["each_bit_quarters_the_loss"])
    assert "refuses_nonsense" in str(caught.value)


@pytest.mark.parametrize("law", ["is_finite", "no_such_law"])
def test_an_exemption_must_be_needed(law):
    exempt = dataclasses.replace(get("quantize/rtn"), exempt={law: "a reason"})
    with pytest.raises(AssertionError, match=law):
        check(exempt)
