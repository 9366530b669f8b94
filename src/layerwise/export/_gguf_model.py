"""What GGUF says of a model beside its weights: the names of tensors, and llama.cpp's settings.

What an architecture of llama.cpp takes for granted is checked here, since a file cannot say it:
activations, which blocks see a window of the text only, how queries are scaled.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.reading.checkpoint import Source
from layerwise.core.reading.families import family

PURPOSE = "writing or reading GGUF files"
ROPE_FACTORS = "rope_freqs.weight"
_GELU = "gelu_pytorch_tanh"
_INSIDE = (
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
    *(f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")),
    *(f"{place}_layernorm" for place in ("input", "post_attention")),
    *(f"{place}_feedforward_layernorm" for place in ("pre", "post")),
)
_EMBEDDINGS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS = 4096  # of the head, read at once
_OUTSIDE = ("model.embed_tokens", "model.norm", "lm_head")
# Tables that old checkpoints hold and every loader computes.
_COMPUTED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True, slots=True)
class _Architecture:
    """What llama.cpp takes for granted of an architecture.

    Attributes:
        name: What GGUF calls it.
        activation: Of its MLP.
        interleaved: Rotations turn neighbours, where transformers turns halves of a head.
        biases: Its every projection may have a bias; of others, queries, keys and values.
        window: Every so many-th block sees all of the text, the others a window; 0 if all do.
        averaged: With so many blocks queries are scaled by hidden size / heads instead of the
            head's size; None if nothing but the head's size is asked for.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    biases: bool = False
    window: int = 0
    averaged: int | None = None


ARCHITECTURES: Mapping[str, _Architecture] = MappingProxyType(
    {
        "llama": _Architecture("llama", interleaved=True, biases=True),
        "qwen2": _Architecture("qwen2"),
        "qwen3": _Architecture("qwen3"),
        "gemma": _Architecture("gemma", _GELU),
        "gemma2": _Architecture("gemma2", _GELU, window=2, averaged=46),
        "gemma3_text": _Architecture("gemma3", _GELU, window=6, averaged=62),
    }
)


@dataclass(frozen=True)
class Model:
    """A model in GGUF's words.  `described` makes it.

    Attributes:
        facts: What llama.cpp takes for granted.
        config: Its configuration, complete with transformers' defaults.
        names: GGUF's name for each tensor, by the checkpoint's.
        norm_offset: What a norm adds to its stored weight; GGUF stores the sum.
        rope_factors: What rotations are slowed down by; None if they are not.
        repeats: The checkpoint's head is its embeddings, stored again.
    """

    facts: _Architecture
    config: Any
    names: Mapping[str, str]
    norm_offset: float
    rope_factors: Tensor | None
    repeats: bool

    @functools.cached_property
    def tensors(self) -> Mapping[str, str]:
        """The checkpoint's name for each tensor, by GGUF's."""
        return {stored: name for name, stored in self.names.items()}

    @property
    def head(self) -> int:
        """Width of an attention head."""
        config = self.config
        own = getattr(config, "head_dim", None)
        return int(own or config.hidden_size // config.num_attention_heads)

    def permuted(self, name: str) -> bool:
        """Whether a tensor's rows are in another order in GGUF."""
        return self.facts.interleaved and name.rpartition(".")[0].endswith(("q_proj", "k_proj"))

    def offset(self, name: str) -> float:
        """What GGUF adds to a tensor."""
        return self.norm_offset if name.endswith("norm.weight") else 0.0


def described(source: Source) -> Model:
    """Find out what GGUF says of a model.

    Raises:
        UserError: llama.cpp, or this format, has no architecture like it.
    """
    kind = source.config.get("model_type", "")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"gguf cannot hold {source.label}, a model of type {kind or 'unknown'}.",
            f"It holds {', '.join(ARCHITECTURES)}; write --format dense or layerwise.",
        )
    facts = ARCHITECTURES[kind]
    gguf, transformers = need("gguf", PURPOSE), need("transformers", PURPOSE)
    settings = {name: value for name, value in source.config.items() if name != "model_type"}
    settings.pop("quantization_config", None)
    config = transformers.AutoConfig.for_model(kind, **settings)
    if problem := _problem(facts, config):
        raise UserError(
            f"gguf cannot hold {source.label}: {problem}.",
            "Write --format dense or layerwise.",
        )
    return Model(
        facts,
        config,
        _names(gguf, facts, config),
        family(source.config).norm_offset,
        _rope_factors(config) if _rope(config)["rope_type"] == "llama3" else None,
        bool(config.tie_word_embeddings) and _repeats(source),
    )


def _repeats(source: Source) -> bool:
    embeddings, head = (source.tensors.get(name) for name in (_EMBEDDINGS, _HEAD))
    if embeddings is None or head is None or embeddings.shape != head.shape:
        return False
    starts = range(0, head.shape[0], _ROWS)
    slices = ((source.read(name, at, at + _ROWS) for name in (_EMBEDDINGS, _HEAD)) for at in starts)
    return all(torch.equal(one, other) for one, other in slices)


def check_tensors(model: Model, source: Source) -> None:
    """Refuse a tensor that llama.cpp has no place for.

    Raises:
        UserError: It names the tensor.
    """
    for info in source.tensors.values():
        if not left_out(model, info.name) and info.name not in model.names:
            raise UserError(
                f"gguf has no place for the tensor {info.name} in a model of the architecture "
                f"{model.facts.name}.",
                "Write --format dense or layerwise.",
            )


def left_out(model: Model, name: str) -> bool:
    """Whether a tensor is one that loaders compute, or a head that is the embeddings again."""
    return (model.repeats and name == _HEAD) or name.endswith(_COMPUTED)


def _names(gguf: Any, facts: _Architecture, config: Any) -> dict[str, str]:
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    blocks = int(config.num_hidden_layers)
    known = gguf.get_tensor_name_map(numbers[facts.name], blocks)
    modules = [f"model.layers.{block}.{part}" for block in range(blocks) for part in _INSIDE]
    made: dict[str, str] = {}
    for module in (*_OUTSIDE, *modules):
        if (stored := known.get_name(module)) is None:
            continue
        made[f"{module}.weight"] = f"{stored}.weight"
        first = module.endswith(("q_proj", "k_proj", "v_proj"))
        if first or (facts.biases and module.endswith("_proj")):
            made[f"{module}.bias"] = f"{stored}.bias"
    return made


def _problem(facts: _Architecture, config: Any) -> str:
    """What llama.cpp would do otherwise than the model; "" if nothing."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    wanted = _windows(facts, int(config.num_hidden_layers))
    windows = list(getattr(config, "layer_types", None) or [_EVERYTHING] * len(wanted))
    rope = _rope(config)
    rules = (
        (activation != facts.activation, f"llama.cpp runs it with {facts.activation} alone"),
        (
            bool(facts.averaged) and config.query_pre_attn_scalar != _query_scale(facts, config),
            f"llama.cpp scales its queries by {_query_scale(facts, config)}, and query_pre_"
            f"attn_scalar is {getattr(config, 'query_pre_attn_scalar', None)}",
        ),
        (windows != wanted, "other blocks than llama.cpp thinks see a window of the text only"),
        (
            bool(getattr(config, "use_bidirectional_attention", False)),
            "its attention looks ahead",
        ),
        (
            float(rope.get("partial_rotary_factor") or 1) != 1,
            "its rotations turn a part of each head only",
        ),
        (
            rope["rope_type"] not in ("default", "linear", *_SCALINGS.get(facts.name, ())),
            f"its rotary positions are of the type {rope['rope_type']}",
        ),
        (
            any(rope.get(name) is not None for name in _UNSAID),
            f"its rotary positions have one of {', '.join(_UNSAID)}",
        ),
        (
            _sliding_rope(config).get("rope_type", "default") != "default",
            "the rotary positions of its windows are scaled",
        ),
    )
    return next((problem for applies, problem in rules if applies), "")


_EVERYTHING = "full_attention"
# Settings of yarn that change the size of queries and keys, or where its bands end.
_UNSAID = ("attention_factor", "mscale", "mscale_all_dim", "truncate")
# Beyond none and linear, of which llama.cpp has all.
_SCALINGS: Mapping[str, tuple[str, ...]] = {
    "llama": ("llama3", "yarn"),
    "qwen2": ("yarn",),
    "qwen3": ("yarn",),
}


def _windows(facts: _Architecture, blocks: int) -> list[str]:
    last = facts.window - 1
    return [
        "sliding_attention" if facts.window and block % facts.window < last else _EVERYTHING
        for block in range(blocks)
    ]


def _query_scale(facts: _Architecture, config: Any) -> int:
    if config.num_hidden_layers == facts.averaged:
        return config.hidden_size // config.num_attention_heads
    return getattr(config, "head_dim", 0)


def _rope(config: Any) -> Mapping[str, Any]:
    parameters: Mapping[str, Any] = config.rope_parameters
    return parameters.get(_EVERYTHING, parameters)


def _sliding_rope(config: Any) -> Mapping[str, Any]:
    return config.rope_parameters.get("sliding_attention", {})


def _rope_factors(config: Any) -> Tensor:
    """Wavelengths of a scaled rotation over those of a plain one; (head / 2,)."""
    made = need("transformers.modeling_rope_utils", PURPOSE).ROPE_INIT_FUNCTIONS
    scaled, _ = made["llama3"](config, torch.device("cpu"))
    head = 2 * len(scaled)
    steps = torch.arange(0, head, 2, dtype=torch.int64).float() / head
    return 1.0 / (_rope(config)["rope_theta"] ** steps) / scaled


def add_settings(writer: Any, model: Model, label: str) -> None:
    """Write what llama.cpp must know of a model."""
    config, rope = model.config, _rope(model.config)
    heads = int(config.num_attention_heads)
    writer.add_type("model")
    writer.add_name(label)
    writer.add_quantization_version(need("gguf", PURPOSE).GGML_QUANT_VERSION)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(getattr(config, "num_key_value_heads", None) or heads))
    writer.add_key_length(model.head)
    writer.add_value_length(model.head)
    writer.add_rope_dimension_count(model.head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if (sliding := _sliding_rope(config)) and "rope_theta" in sliding:
        writer.add_rope_freq_base_swa(float(sliding["rope_theta"]))
    if rope["rope_type"] in ("linear", "yarn"):
        _add_scaling(writer, rope)
    if model.facts.window:
        writer.add_sliding_window(config.sliding_window)
    optional: Iterable[tuple[Callable[[float], None], str]] = (
        (writer.add_attn_logit_softcapping, "attn_logit_softcapping"),
        (writer.add_final_logit_softcapping, "final_logit_softcapping"),
    )
    for add, name in optional:
        if (value := getattr(config, name, None)) is not None:
            add(value)


def _add_scaling(writer: Any, rope: Mapping[str, Any]) -> None:
    kinds = need("gguf", PURPOSE).RopeScalingType
    writer.add_rope_scaling_type(kinds(rope["rope_type"]))
    writer.add_rope_scaling_factor(float(rope["factor"]))
    optional: Iterable[tuple[Callable[[Any], None], str]] = (
        (writer.add_rope_scaling_orig_ctx_len, "original_max_position_embeddings"),
        (writer.add_rope_scaling_yarn_beta_fast, "beta_fast"),
        (writer.add_rope_scaling_yarn_beta_slow, "beta_slow"),
    )
    for add, name in optional:
        if rope.get(name) is not None:
            add(rope[name])
