"""The inputs of layers, rounded while a model runs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

# How inputs are rounded: to whole numbers of so many bits, or to 8-bit floats (E4M3); with a scale
# for each token, found as it comes, or with one for all, found on a calibration text.
Scheme = Literal["int8", "int8-static", "int4", "int4-static", "fp8", "fp8-static"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

_FLOAT8 = torch.float8_e4m3fn
# The largest code of each.
_TOP: Mapping[str, float] = MappingProxyType(
    {"int8": 127.0, "int4": 7.0, "fp8": torch.finfo(_FLOAT8).max}
)
_LEAST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Activation:
    """How a layer's input is rounded.

    Attributes:
        scheme: To what.
        scale: Step of all inputs, (1,), float32; None for one of each token.
    """

    scheme: Scheme
    scale: Float[Tensor, "1"] | None = None

    @classmethod
    def of(cls, scheme: Scheme, peak: Float[Tensor, " in"] | None) -> "Activation":
        """A scheme, with its scale where it has one for all tokens: max |x| / the largest code.

        Args:
            scheme: To what.
            peak: Largest magnitude of each input over calibration tokens, where the scheme is
                static.
        """
        if not static(scheme):
            return cls(scheme)
        assert peak is not None
        largest = peak.max() if len(peak) else peak.new_zeros(())
        return cls(scheme, (largest / _TOP[kind(scheme)]).clamp(min=_LEAST).float().reshape(1))

    @property
    def whole(self) -> bool:
        """The codes are whole numbers."""
        return kind(self.scheme) != "fp8"

    @property
    def reach(self) -> float:
        """The largest magnitude that a step of 1 stands for."""
        return _TOP[kind(self.scheme)]

    def codes(
        self, inputs: Float[Tensor, "tokens in"]
    ) -> tuple[Float[Tensor, "tokens in"], Float[Tensor, "#tokens 1"]]:
        """What inputs become, float32, and the step that it is in units of.

        With one step a token it is max |x| / reach; whole numbers go from -top - 1 to top, and what
        lies beyond a static scale's range becomes its end.
        """
        top = _TOP[kind(self.scheme)]
        if self.scale is None:
            step = (inputs.abs().amax(dim=-1, keepdim=True) / self.reach).clamp(min=_LEAST)
        else:
            step = self.scale.to(inputs.device)[None]
        scaled = inputs / step
        if self.whole:
            return scaled.round().clamp(-top - 1, top), step
        return scaled.clamp(-top, top).to(_FLOAT8).float(), step

    def rounded(self, inputs: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
        """The inputs that those codes stand for."""
        codes, step = self.codes(inputs)
        return codes * step


def needing(schemes: Iterable[str]) -> list[str]:
    """What rounding cannot do without a calibration text, in words."""
    return ["one scale for the inputs of all tokens"] if any(map(static, schemes)) else []


def static(scheme: str) -> bool:
    """Whether a scheme has one scale for all tokens."""
    return scheme.endswith("-static")


def kind(scheme: str) -> str:
    """What a scheme rounds to, whatever its scales."""
    return scheme.removesuffix("-static")
