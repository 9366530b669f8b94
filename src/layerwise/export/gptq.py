"""The GPTQ format, version 1: what GPTQModel, transformers and vLLM load.

The matrix lies transposed.  Codes are packed densely into int32 words along the inputs (qweight),
zero points minus one along the outputs (qzeros); a 3-bit code may straddle two words.  Scales are
float16.  g_idx names the group of each input, here always in order (desc_act false).

Widths are 2, 3, 4 and 8; other grids than the commonest, and layers that are left, are regular
expressions over names under `dynamic`.  GPTQModel and vLLM read that; transformers knows one grid
for all layers, and takes which layers have it from `modules_in_block_to_quantize`.

Grids are symmetric.  The layout has no place for a zero point of 0, which asymmetric grids may
have, and GPTQModel refuses asymmetric files that it has not written itself.

A loader that computes in float16 rounds code times scale to its 11 bits, as any loader rounds to
the type it computes in.  `restored` is the value before that, which a loader that computes in
float32 holds.  A 16-bit scale of ours passes into float16 unchanged from 2^-17 to 65504; a smaller
one is rounded, and the result in memory with it; a larger one is refused.

https://github.com/ModelCloud/GPTQModel (7.7) is what the tests read it back with, by way of
transformers and optimum (2.3) if all layers have one grid.  It holds scales, biases and, where it
loads the whole model, all other tensors in float16; `load` reads those again in full, so that the
comparison is in float32, with GPTQModel's own unpacking.
"""

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.format import Format
from layerwise.core.keeping.staging import Arrangement
from layerwise.core.packing import WORD, pack, words
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.reading.checkpoint import Checkpoint, TensorInfo
from layerwise.core.reading.structure import Layer, Structure
from layerwise.core.results import Quantized, spread
from layerwise.core.running.apply import Transformed
from layerwise.export._adapter import (
    adapter_files,
    adapter_problem,
    adapter_tensors,
    arrange_beside,
    corrected,
    encode_adapter,
)

WIDTHS = (2, 3, 4, 8)
GROUPS = (0, 16, 32, 64, 128, 256, 512, 1024)
_SCALE_DTYPE = torch.float16
_KERNEL = "gptq_torch"
_ARCHITECTURES = ("ForCausalLM", "LMHeadModel")
# vLLM asks for a rule by the name of the matrix that it makes of some layers.
_FUSED_NAMES: Mapping[str, str] = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}


class Gptq(Format):
    """Packed integer codes on symmetric grids, mixed per layer; other layers in their own dtype."""

    packages = ("gptqmodel", "optimum")
    directory = True
    adapts = True

    def check(self, plan: Plan, found: Structure) -> None:
        """Refuse what the format has no place for, and models that its loaders do not know."""
        architecture = (self.source.config.get("architectures") or [""])[0]
        if not architecture.endswith(_ARCHITECTURES):
            raise UserError(
                f"gptq holds models that write text, and {self.source.label} is a "
                f"{architecture or 'model of unknown class'}.",
                "Write --format layerwise or dense.",
            )
        for name, layer_plan in plan.layers.items():
            if problem := _problem(found.layers[name], layer_plan):
                raise UserError(
                    f"gptq cannot hold {name}: {problem}.",
                    "Change that layer's plan, or write --format compressed-tensors or layerwise.",
                )

    def whole(self, plan: LayerPlan) -> bool:
        """Its tensors lie transposed: rows of a layer are columns of theirs."""
        return plan.coded

    def tensors(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> list[TensorInfo]:
        """Codes, zero points, scales and groups; the adapter's tensors of a correction."""
        adapter = adapter_tensors(layer, plan, info)
        if not plan.coded or plan.bits is None:
            return [info, *adapter]
        groups = _groups(layer, plan)
        made = {
            "qweight": (torch.int32, (words(layer.width, plan.bits), layer.rows)),
            "qzeros": (torch.int32, (groups, words(layer.rows, plan.bits))),
            "scales": (_SCALE_DTYPE, (groups, layer.rows)),
            "g_idx": (torch.int32, (layer.width,)),
        }
        own = [TensorInfo(f"{layer.name}.{part}", *described) for part, described in made.items()]
        return [*own, *adapter]

    def encode(self, done: Transformed, info: TensorInfo) -> dict[str, Tensor]:
        """A layer as those tensors; what no code has a part in is of `constants`.

        Raises:
            UserError: A scale is larger than float16 holds.
        """
        made = encode_adapter(done, info.dtype)
        if (quantized := done.grid) is None:
            stored = done.layer.store(done.stored.to(info.dtype), (-1, *info.shape[1:]))
            return {info.name: stored, **made}
        codes = pack(quantized.codes, quantized.bits)
        made[f"{done.layer.name}.qweight"] = codes.T.contiguous()
        made[f"{done.layer.name}.scales"] = _scales(done.layer, quantized).T.contiguous()
        return made

    def constants(self, layer: Layer, plan: LayerPlan) -> dict[str, Tensor]:
        """The zero points, all alike, and the group of each input."""
        if not plan.coded or plan.bits is None:
            return {}
        zeros = torch.full((_groups(layer, plan), layer.rows), 2 ** (plan.bits - 1) - 1)
        inputs = torch.arange(layer.width, dtype=torch.int32)
        return {
            f"{layer.name}.qzeros": pack(zeros, plan.bits),
            f"{layer.name}.g_idx": inputs // (plan.group or layer.width),
        }

    def restored(self, done: Transformed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The codes' values on grids of float16 scales, not rounded any further."""
        if (quantized := done.grid) is None:
            return corrected(done, done.stored.to(dtype).float(), dtype)
        centred = quantized.codes.float() - 2 ** (quantized.bits - 1)
        scale = _scales(done.layer, quantized).float()
        values = centred * spread(scale, quantized.group, centred.shape[1])
        return corrected(done, values, dtype)

    @classmethod
    def grid(cls, bits: int) -> tuple[int | None, bool | None]:
        """Symmetric: see above."""
        return None, True

    def arrange(self, tensors: Iterable[TensorInfo]) -> Arrangement:
        """Files with room for all tensors, the adapter's in one of their own."""
        return arrange_beside(tensors, self.stem)

    def files(self, plan: Plan, found: Structure) -> Mapping[str, bytes]:
        """What says how the adapter is to be read."""
        return adapter_files(plan)

    def config(self, plan: Plan, found: Structure) -> Mapping[str, Any]:
        """`quantization_config`: the commonest grid, and rules for the layers without it."""
        grids = {name: (p.bits, p.group) for name, p in plan.layers.items() if p.coded}
        if not grids:
            return {}
        common = Counter(grids.values()).most_common(1)[0][0]
        dynamic: dict[str, dict[str, int]] = {}
        for name in plan.layers:
            given = grids.get(name)
            for pattern in _patterns(found.layers[name]) if given != common else ():
                if given is None:
                    dynamic[f"-:{pattern}"] = {}
                else:
                    dynamic[f"+:{pattern}"] = {"bits": given[0] or 0, "group_size": given[1] or -1}
        bits, group = common
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "format": "gptq",
            "bits": bits,
            "group_size": group or -1,
            "sym": True,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "modules_in_block_to_quantize": [list(grids)],
        }
        return {"quantization_config": config | ({"dynamic": dynamic} if dynamic else {})}

    @property
    def loader(self) -> str:
        """Transformers if all layers have one grid, else GPTQModel."""
        rules = self.source.config["quantization_config"].get("dynamic") or {}
        mixed = any(not rule.startswith("-:") for rule in rules)
        return "GPTQModel" if mixed else "transformers"

    def load(self, dtype: torch.dtype) -> tuple[Any, Sequence[str]]:
        """The model by its loader, whatever that narrowed to float16 in full."""
        source = cast("Checkpoint", self.source)
        if self.loader == "transformers":
            model, missing = _by_transformers(source, dtype)
        else:
            model, missing = _by_gptqmodel(source), ()
        return _in_full(model, source, dtype), missing


def _by_transformers(source: Checkpoint, dtype: torch.dtype) -> tuple[Any, Sequence[str]]:
    transformers = need("transformers", "loading a model")
    bits = source.config["quantization_config"]["bits"]
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        str(source.folder),
        dtype=dtype,
        # Of the kernels there are, the one that computes in float32 and takes any group.
        quantization_config=transformers.GPTQConfig(bits=bits, backend=_KERNEL),
        output_loading_info=True,
    )
    return model, sorted(told["missing_keys"])


def _by_gptqmodel(source: Checkpoint) -> Any:
    """What GPTQModel makes of the files, in float16, which is all it loads in here."""
    gptqmodel = need("gptqmodel", "loading layers on several grids")
    options = {"backend": _KERNEL, "device": "cpu", "dtype": torch.float16}
    if (source.folder / "tokenizer_config.json").exists():
        return gptqmodel.GPTQModel.load(str(source.folder), **options).model
    # It takes no model without a tokenizer, and a model of bytes has none.
    with tempfile.TemporaryDirectory() as made:
        for file in source.folder.iterdir():
            (Path(made) / file.name).symlink_to(file.resolve())
        _stand_in_tokenizer(int(source.config["vocab_size"])).save_pretrained(made)
        return gptqmodel.GPTQModel.load(made, **options).model


def _stand_in_tokenizer(words: int) -> Any:
    tokenizers = need("tokenizers", "loading layers on several grids")
    transformers = need("transformers", "loading a model")
    vocabulary = {str(word): word for word in range(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="0")


def _in_full(model: Any, source: Checkpoint, dtype: torch.dtype) -> Any:
    """The model with what its loader narrowed to float16 in the type that was asked for."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in source.tensors and source.tensors[name].dtype.is_floating_point:
            tensor.data = source.read(name).to(dtype)
    return model


def _problem(layer: Layer, plan: LayerPlan) -> str:
    """Why the format has no place for a layer; "" if it has."""
    if problem := adapter_problem(layer, plan):
        return problem
    if not plan.coded or plan.bits is None:
        return ""
    filled = layer.rows * plan.bits % WORD == layer.width * plan.bits % WORD == 0
    shape = f"{layer.rows} x {layer.width}"
    rules = (
        (plan.codes != "integer", f"the codes of {plan.method}"),
        (plan.bits not in WIDTHS, f"{plan.bits} bits; it has {_listed(WIDTHS)}"),
        (plan.group not in GROUPS, f"a group of {plan.group}; it has {_listed(GROUPS)} (0: a row)"),
        (not plan.symmetric, "its loaders refuse asymmetric grids; use --symmetric"),
        (layer.layout != "linear", f"it is stored as a {layer.layout}, not as a Linear"),
        ("experts." in layer.name or layer.expert is not None, "no loader was found for experts"),
        (not filled, f"{plan.bits}-bit codes of {shape} do not fill 32-bit words both ways"),
    )
    return next((problem for applies, problem in rules if applies), "")


def _listed(allowed: Sequence[int]) -> str:
    return ", ".join(map(str, allowed))


def _groups(layer: Layer, plan: LayerPlan) -> int:
    return -(-layer.width // (plan.group or layer.width))


def _scales(layer: Layer, quantized: Quantized) -> Float[Tensor, "out groups"]:
    """Scales as the format has them.

    Raises:
        UserError: One is larger than float16 holds.
    """
    scales = quantized.scale.to(_SCALE_DTYPE)
    if not scales.isfinite().all():
        raise UserError(
            f"gptq cannot hold {layer.name}: a scale of {float(quantized.scale.max()):.4g} is more "
            f"than {torch.finfo(_SCALE_DTYPE).max:.0f}, the most that float16 holds.",
            "Leave that layer as it is, or write --format compressed-tensors or layerwise.",
        )
    return scales


def _patterns(layer: Layer) -> list[str]:
    """What matches a layer's name, and that of the matrix a server makes of it and others.

    Names in files may lack the model's own prefix.
    """
    parent, _, last = layer.name.rpartition(".")
    names = {layer.name: None, f"{parent}.{_FUSED_NAMES.get(last, last)}": None}
    return [rf"(?:.*\.)?{re.escape(name)}$" for name in names]
