"""GGUF: one file with weights, settings and tokenizer, which llama.cpp runs.

`docs/gguf.md` says what is stored how.  transformers is what the tests read the files with; `make
interop` runs them with https://github.com/ggml-org/llama.cpp, as llama-cpp-python 0.3.36 has it.
"""

import functools
import io
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
from layerwise.core.keeping.staging import Arrangement, Slot
from layerwise.core.plan import LayerPlan, Plan
from layerwise.core.reading.checkpoint import GGUF, Checkpoint, TensorInfo
from layerwise.core.reading.structure import Layer, Structure
from layerwise.core.running.apply import Transformed
from layerwise.export._gguf_blocks import KINDS, Kind, blocks
from layerwise.export._gguf_model import (
    PURPOSE,
    ROPE_FACTORS,
    Model,
    add_settings,
    check_tensors,
    described,
    left_out,
)
from layerwise.export._gguf_tokenizer import add_tokenizer

_ALIGNMENT = 32
_NUMBERS = {torch.float16: "F16", torch.float32: "F32"}


class Gguf(Format):
    """Codes in blocks of 32 or 256 weights, mixed per layer; float16 for the rest."""

    packages = ("gguf", "accelerate")

    @functools.cached_property
    def model(self) -> Model:
        """The model in GGUF's words."""
        return described(self.source)

    def check(self, plan: Plan, found: Structure) -> None:
        """Refuse models and plans that llama.cpp has no place for."""
        check_tensors(self.model, self.source)
        for name, layer_plan in plan.layers.items():
            if problem := _problem(found.layers[name], layer_plan):
                raise UserError(
                    f"gguf cannot hold {name}: {problem}.",
                    "Change that layer's plan, or write --format layerwise.",
                )

    def tensors(self, layer: Layer, plan: LayerPlan, info: TensorInfo) -> list[TensorInfo]:
        """Rows of blocks, or of float16."""
        name = self.model.names[info.name]
        if not plan.coded:
            return [TensorInfo(name, torch.float16, info.shape)]
        size = _kind(plan).bytes_of(layer.width)
        return [TensorInfo(name, torch.uint8, (layer.rows, size))]

    def encode(self, done: Transformed, info: TensorInfo) -> dict[str, Tensor]:
        """The blocks of a layer's rows."""
        if done.grid is None:
            rows = _half(info.name, done.stored)
        else:
            made = blocks(done.grid)
            if not made.finite():
                raise _overflow(done.layer.name)
            rows = made.packed()
        return {self.model.names[info.name]: self._ordered(info.name, rows)}

    def restored(self, done: Transformed, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """What the blocks hold: their scales and minima are float16."""
        if done.grid is None:
            return done.stored.half().float()
        return blocks(done.grid).values()

    @classmethod
    def grid(cls, bits: int) -> tuple[int | None, bool | None]:
        """Groups of a block; 6 and 8 bits have no minima."""
        kinds = [kind for kind in KINDS.values() if kind.bits == bits]
        symmetric = True if len(kinds) == 1 else None
        return (kinds[0].group if kinds else 32), symmetric

    def together(self, info: TensorInfo) -> int:
        """A head, where its rows change places."""
        return self.model.head if self.model.permuted(info.name) else 1

    def rest(self, info: TensorInfo) -> TensorInfo | None:
        """Matrices in float16, vectors in float32."""
        if left_out(self.model, info.name):
            return None
        dtype = torch.float16 if len(info.shape) > 1 else torch.float32
        return TensorInfo(self.model.names[info.name], dtype, info.shape)

    def encode_rest(self, info: TensorInfo, rows: Tensor) -> Tensor:
        """The rows in that dtype, a norm with its offset, a head's rows in their new places."""
        if len(info.shape) > 1:
            return self._ordered(info.name, _half(info.name, rows))
        return self._ordered(info.name, rows.float() + self.model.offset(info.name))

    def restored_rest(self, info: TensorInfo, rows: Tensor) -> Tensor:
        """The same read back."""
        if len(info.shape) > 1:
            return rows.half().float()
        offset = self.model.offset(info.name)
        return rows.float() + offset - offset

    def arrange(self, tensors: Iterable[TensorInfo]) -> Arrangement:
        """One file: settings, tokenizer and places of all tensors first, then the tensors."""
        infos = list(tensors)
        factors = self.model.rope_factors
        constant = b"" if factors is None else factors.float().numpy().tobytes()
        constant += bytes(-len(constant) % _ALIGNMENT)
        head = self._head(infos)
        header = head + bytes(-len(head) % _ALIGNMENT) + constant
        slots: dict[str, Slot] = {}
        end = len(header)
        for info in infos:
            slots[info.name] = Slot(GGUF, end, info)
            end += info.size + -info.size % _ALIGNMENT
        return Arrangement(self.stem, slots, {GGUF: header}, {GGUF: end})

    def config(self, plan: Plan, found: Structure) -> Mapping[str, Any]:
        """What tells loaders that the weights are not in safetensors files."""
        return {"quantization_config": {"quant_method": "gguf", "gguf_file": GGUF}}

    def load(self, dtype: torch.dtype) -> tuple[Any, Sequence[str]] | None:
        """The model from the file and the configuration, which says more than the file's settings.

        transformers reads the files of these architectures but Gemma's first; see `read`.
        """
        if self.source.config.get("model_type") == "gemma":
            return None
        transformers = need("transformers", "loading a model")
        model, told = transformers.AutoModelForCausalLM.from_pretrained(
            str(cast("Checkpoint", self.source).folder),
            gguf_file=GGUF,
            config=self.model.config,
            dtype=dtype,
            output_loading_info=True,
        )
        return model, sorted(told["missing_keys"])

    def read(self) -> Mapping[str, Tensor]:
        """Every tensor under the original's name, in float32."""
        gguf = need("gguf", PURPOSE)
        assert isinstance(self.source, Checkpoint)
        state: dict[str, Tensor] = {}
        for stored in gguf.GGUFReader(self.source.files[GGUF]).tensors:
            if stored.name == ROPE_FACTORS:
                continue
            name = self.model.tensors[stored.name]
            values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
            if self.model.permuted(name):
                heads = values.unflatten(0, (-1, self.model.head // 2, 2))
                values = heads.transpose(1, 2).flatten(0, 2).contiguous()
            state[name] = values - self.model.offset(name)
        return state

    def _ordered(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a tensor in GGUF's order: in a head, those of both halves take turns."""
        if not self.model.permuted(name):
            return rows
        heads = rows.unflatten(0, (-1, 2, self.model.head // 2))
        return heads.transpose(1, 2).flatten(0, 2).contiguous()

    def _head(self, infos: Iterable[TensorInfo]) -> bytes:
        gguf, model = need("gguf", PURPOSE), self.model
        kinds = {info.name: self._type(info) for info in infos}
        writer = gguf.GGUFWriter(None, model.facts.name)
        add_settings(writer, model, Path(self.source.label).name or self.source.label)
        # What most of the matrices are; F16 if none is quantized.
        quantized = Counter(kind for kind in kinds.values() if kind not in _NUMBERS.values())
        most = quantized.most_common(1)[0][0] if quantized else "F16"
        writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
        add_tokenizer(writer, self.source, int(model.config.vocab_size))
        if model.rope_factors is not None:
            shape, size = tuple(model.rope_factors.shape), 4 * len(model.rope_factors)
            kind = gguf.GGMLQuantizationType.F32
            writer.add_tensor_info(ROPE_FACTORS, shape, None, size, raw_dtype=kind)
        for info in infos:
            shape = self.source.tensors[model.tensors[info.name]].shape
            kind = gguf.GGMLQuantizationType[kinds[info.name]]
            writer.add_tensor_info(info.name, shape, None, info.size, raw_dtype=kind)
        # The writer is given memory for a file: sizes and places are known before any weight is.
        memory = io.BytesIO()
        writer.fout, writer.state = [memory], gguf.WriterState.EMPTY
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        return memory.getvalue()

    def _type(self, info: TensorInfo) -> str:
        """What GGUF calls the type of a stored tensor: no two kinds give a row the same bytes."""
        if info.dtype in _NUMBERS:
            return _NUMBERS[info.dtype]
        width = self.source.tensors[self.model.tensors[info.name]].shape[1]
        fitting = (k for k in KINDS.values() if not width % k.weights)
        return next(k.name for k in fitting if k.bytes_of(width) == info.shape[1])


def _kind(plan: LayerPlan) -> Kind:
    assert plan.bits is not None
    return KINDS[plan.bits, plan.symmetric]


def _problem(layer: Layer, plan: LayerPlan) -> str:
    """Why the format has no place for a layer; "" if it has."""
    if plan.rank:
        return "it has no place for a low-rank correction"
    if not plan.coded or plan.bits is None:
        return ""
    if plan.codes != "integer":
        return f"the codes of {plan.method}"
    kind = KINDS.get((plan.bits, plan.symmetric))
    if kind is None:
        widths = sorted({bits for bits, symmetric in KINDS if symmetric == plan.symmetric})
        zeros = "without zero points" if plan.symmetric else "with zero points"
        return f"{plan.bits} bits {zeros}; {zeros} it has {', '.join(map(str, widths))} bits"
    group = plan.group or layer.width
    rules = (
        (
            group != kind.group,
            f"groups of {group}; {kind.name}, which has {plan.bits} bits, has groups of "
            f"{kind.group}",
        ),
        (
            layer.width % kind.weights != 0,
            f"its width of {layer.width} is no multiple of {kind.weights}, the block of "
            f"{kind.name}",
        ),
        (
            plan.density < 1 and not kind.symmetric,
            "pruned weights with zero points, which would not be 0 any more; add --symmetric",
        ),
    )
    return next((problem for applies, problem in rules if applies), "")


def _half(name: str, rows: Tensor) -> Tensor:
    rounded = rows.half()
    if not bool(rounded.isfinite().all()):
        raise _overflow(name)
    return rounded


def _overflow(name: str) -> UserError:
    return UserError(
        f"{name} holds numbers beyond {torch.finfo(torch.float16).max:g}, the largest of float16.",
        "GGUF's blocks have no place for them: write --format dense or layerwise.",
    )
