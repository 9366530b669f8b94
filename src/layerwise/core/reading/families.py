"""Architecture facts, as data: one short literal per family, and nothing else knows a name.

Inside a block, a `Reads` lists layers that read the same input, the layer or norm whose output
that input is (so that a scale can be folded into it), and how many of those layers servers fuse
into one matrix, which must then have one bit width.  `{}` stands for the number of an expert.
A checkpoint of no family here falls back to `GENERIC`, which assumes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What configurations call the number of positions and the width of a block.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
WIDTHS = ("hidden_size", "n_embd", "d_model")
# What blocks call the cache of keys and values that they are given.
CACHES = ("past_key_values", "layer_past")
# Classes whose answer to token ids is a distribution over the vocabulary for every token.
CAUSAL_MODELS = ("ForCausalLM", "LMHeadModel")
LANGUAGE_MODELS = (*CAUSAL_MODELS, "ForMaskedLM")
# Classes whose answer to pictures is a distribution over classes.
IMAGE_CLASSIFIERS = ("ForImageClassification",)


def configured(config: Mapping[str, Any], names: Sequence[str]) -> int:
    """The first of these entries that a configuration has; 0 if none."""
    return next((int(config[name]) for name in names if config.get(name)), 0)


@dataclass(frozen=True, slots=True)
class Reads:
    """Layers of one block that read the same input.

    Attributes:
        layers: Their names inside the block.
        feeder: Norm or layer whose output they alone read, entry by entry; "" if there is none.
        fused: So many of them, from the first on, are one matrix in servers.
    """

    layers: tuple[str, ...]
    feeder: str = ""
    fused: int = 0


@dataclass(frozen=True, slots=True)
class Stream:
    """A residual stream that only linear layers and norms without a mean touch.

    Such a model can be rewritten into another that is the same function: see core/rewriting.
    Whatever is not named here neither reads the stream nor adds to it.

    Attributes:
        reads: Norms inside a block, each with all layers that read what it gives.
        writes: Layers whose outputs are added to the stream.
        values: A layer whose outputs are weighted and summed over tokens, head by head, and the
            layer that reads the sums; empty if they have no layers of their own.
        queries: The layer that makes queries, and the one that makes keys; empty likewise.
        query_norms: Norms of each head's queries and keys, which only some of the models have.
        beside: Other tensors that a block may hold.
        gated: The layers of a gated MLP: those that make its insides, and last what reads these;
            empty where it has another form.
        embedding: What begins the stream.
        norm: The norm that ends it.
        head: What reads that; its tensor is the embedding's where there is none of its own.
    """

    reads: tuple[tuple[str, tuple[str, ...]], ...]
    writes: tuple[str, ...]
    values: tuple[str, ...] = ("self_attn.v_proj", "self_attn.o_proj")
    queries: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj")
    query_norms: tuple[str, ...] = ("self_attn.q_norm", "self_attn.k_norm")
    beside: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)
    gated: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True, slots=True)
class Seam:
    """Channels that some layers of a block make and one reads: they can go, a unit at a time.

    The rows of each maker, and the columns of the reader, are as many equal runs as there are
    units.  What a unit that is gone gave on average can stay as a bias of the reader.

    Attributes:
        makers: Layers whose rows are the channels.
        reader: The layer whose columns they are.
        units: Settings that count the units; the first that a model has says how many there are,
            the others keep their ratio to it.  Empty where no setting does: each channel is one.
        parts: Matrices that lie one after the other in the rows of a maker.
        biases: A setting that gives the makers and the reader biases; "" if there is none.
        divides: A setting that all of `units` must divide, or transformers does not load it.
        norm: A batch norm of the channels, between makers and reader.
        settled: The shape of the channels is written down nowhere, so that they can only be zeroed.
    """

    makers: tuple[str, ...]
    reader: str
    units: tuple[str, ...] = ()
    parts: int = 1
    biases: str = ""
    divides: str = ""
    norm: str = ""
    settled: bool = False

    @property
    def heads(self) -> bool:
        """Whether the units are heads of attention, whose size stays."""
        return "num_attention_heads" in self.units


@dataclass(frozen=True, slots=True)
class Family:
    """What the weights alone do not say about an architecture.

    Attributes:
        types: `model_type` values of `config.json`.
        only: A setting of `config.json`, and the value for which these facts hold.
        reads: Which layers share an input.
        transposed: Endings of layers stored (in, out), as GPT-2's Conv1D does.
        norm_offset: What a norm adds to its stored weight before it multiplies.
        stream: Its residual stream; None where that cannot be turned.
        seams: Where units can be taken out of its blocks.
        depth: The setting that counts its blocks; "" where none can be taken out.
        placed: Settings that make a block what it is by its number, and the value at which they
            make all alike.
    """

    types: tuple[str, ...]
    reads: tuple[Reads, ...] = ()
    transposed: tuple[str, ...] = ()
    norm_offset: float = 0.0
    only: tuple[str, Any] | None = None
    stream: Stream | None = None
    seams: tuple[Seam, ...] = ()
    depth: str = "num_hidden_layers"
    placed: tuple[tuple[str, Any], ...] = ()


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = (
    Reads(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm", fused=2),
    Reads(("mlp.down_proj",), "mlp.up_proj"),
)
_LLAMA = (Reads(_QKV, "input_layernorm", fused=3), Reads(("self_attn.o_proj",)), *_GATED)
_LLAMA_STREAM = Stream(
    (
        ("input_layernorm", _QKV),
        ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ),
    ("self_attn.o_proj", "mlp.down_proj"),
)


def _heads(biases: str = "", divides: str = "") -> Seam:
    """Heads of keys and values, each with the heads of queries that read it."""
    counted = ("num_key_value_heads", "num_attention_heads")
    return Seam(_QKV, "self_attn.o_proj", counted, biases=biases, divides=divides)


def _gated(biases: str = "", inside: str = "mlp", width: str = "intermediate_size") -> Seam:
    """Channels between the gated pair and the layer that reads their product."""
    makers = (f"{inside}.gate_proj", f"{inside}.up_proj")
    return Seam(makers, f"{inside}.down_proj", (width,), biases=biases)


def _plain(maker: str, reader: str, width: str = "intermediate_size") -> Seam:
    """Channels between two layers that have biases."""
    return Seam((maker,), reader, (width,))


FAMILIES: tuple[Family, ...] = (
    Family(
        ("llama",),
        _LLAMA,
        stream=_LLAMA_STREAM,
        seams=(_heads("attention_bias", divides="hidden_size"), _gated("mlp_bias")),
    ),
    Family(
        ("smollm3",),
        _LLAMA,
        stream=_LLAMA_STREAM,
        seams=(_heads("attention_bias"), _gated("mlp_bias")),
    ),
    Family(("qwen3",), _LLAMA, stream=_LLAMA_STREAM, seams=(_heads("attention_bias"), _gated())),
    Family(("mistral", "qwen2"), _LLAMA, stream=_LLAMA_STREAM, seams=(_heads(), _gated())),
    Family(
        ("gemma",),
        _LLAMA,
        norm_offset=1.0,
        stream=_LLAMA_STREAM,
        seams=(_heads("attention_bias"), _gated()),
    ),
    Family(
        ("gemma2", "gemma3", "gemma3_text"),
        (
            Reads(_QKV, "input_layernorm", fused=3),
            Reads(("self_attn.o_proj",)),
            Reads(("mlp.gate_proj", "mlp.up_proj"), "pre_feedforward_layernorm", fused=2),
            Reads(("mlp.down_proj",), "mlp.up_proj"),
        ),
        norm_offset=1.0,
        seams=(_heads("attention_bias", divides="hidden_size"), _gated()),
    ),
    Family(
        ("phi3",),
        (
            Reads(("self_attn.qkv_proj",), "input_layernorm"),
            Reads(("self_attn.o_proj",)),
            Reads(("mlp.gate_up_proj",), "post_attention_layernorm"),
            Reads(("mlp.down_proj",)),
        ),
        stream=Stream(
            (
                ("input_layernorm", ("self_attn.qkv_proj",)),
                ("post_attention_layernorm", ("mlp.gate_up_proj",)),
            ),
            ("self_attn.o_proj", "mlp.down_proj"),
            values=(),
            queries=(),
        ),
        seams=(Seam(("mlp.gate_up_proj",), "mlp.down_proj", ("intermediate_size",), parts=2),),
    ),
    Family(
        # Attention and MLP read the same norm, side by side.
        ("phi",),
        (
            Reads((*_QKV, "mlp.fc1"), "input_layernorm", fused=3),
            Reads(("self_attn.dense",)),
            Reads(("mlp.fc2",)),
        ),
        seams=(_plain("mlp.fc1", "mlp.fc2"),),
    ),
    Family(
        ("gpt2",),
        (
            Reads(("attn.c_attn",), "ln_1"),
            Reads(("attn.c_proj",)),
            Reads(("mlp.c_fc",), "ln_2"),
            Reads(("mlp.c_proj",)),
        ),
        transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
        seams=(_plain("mlp.c_fc", "mlp.c_proj", "n_inner"),),
        depth="n_layer",
    ),
    Family(
        ("gpt_neox",),
        (
            Reads(("attention.query_key_value",), "input_layernorm"),
            Reads(("attention.dense",)),
            Reads(("mlp.dense_h_to_4h",), "post_attention_layernorm"),
            Reads(("mlp.dense_4h_to_h",)),
        ),
        seams=(_plain("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),),
    ),
    Family(
        # The norms come after the residual sum, which reads them too.
        ("opt",),
        (
            Reads(_QKV, fused=3),
            Reads(("self_attn.out_proj",), "self_attn.v_proj"),
            Reads(("fc1",)),
            Reads(("fc2",)),
        ),
        only=("do_layer_norm_before", False),
        seams=(_plain("fc1", "fc2", "ffn_dim"),),
    ),
    Family(
        ("opt",),
        (
            Reads(_QKV, "self_attn_layer_norm", fused=3),
            Reads(("self_attn.out_proj",), "self_attn.v_proj"),
            Reads(("fc1",), "final_layer_norm"),
            Reads(("fc2",)),
        ),
        seams=(_plain("fc1", "fc2", "ffn_dim"),),
    ),
    Family(
        # The residual stream reads the same norms, so nothing can be folded into them.
        ("bert", "roberta"),
        (
            Reads(("attention.self.query", "attention.self.key", "attention.self.value")),
            Reads(("attention.output.dense",)),
            Reads(("intermediate.dense",)),
            Reads(("output.dense",)),
        ),
        seams=(_plain("intermediate.dense", "output.dense"),),
    ),
    Family(
        ("vit",),
        (
            Reads(
                (
                    "attention.attention.query",
                    "attention.attention.key",
                    "attention.attention.value",
                ),
                "layernorm_before",
            ),
            Reads(("attention.output.dense",)),
            Reads(("intermediate.dense",), "layernorm_after"),
            Reads(("output.dense",)),
            # As transformers 5 names them in memory; on disk they are as above.
            Reads(("attention.q_proj", "attention.k_proj", "attention.v_proj"), "layernorm_before"),
            Reads(("attention.o_proj",)),
            Reads(("mlp.fc1",), "layernorm_after"),
            Reads(("mlp.fc2",)),
        ),
        seams=(_plain("intermediate.dense", "output.dense"), _plain("mlp.fc1", "mlp.fc2")),
    ),
    Family(
        ("mixtral",),
        (
            Reads(_QKV, "input_layernorm", fused=3),
            Reads(("self_attn.o_proj",)),
            Reads(("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"), fused=2),
            Reads(("block_sparse_moe.experts.{}.w2",), "block_sparse_moe.experts.{}.w3"),
        ),
        stream=Stream(
            (
                ("input_layernorm", _QKV),
                (
                    "post_attention_layernorm",
                    (
                        "block_sparse_moe.gate",
                        "block_sparse_moe.experts.{}.w1",
                        "block_sparse_moe.experts.{}.w3",
                    ),
                ),
            ),
            ("self_attn.o_proj", "block_sparse_moe.experts.{}.w2"),
        ),
        seams=(
            _heads(),
            Seam(
                ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
                "block_sparse_moe.experts.{}.w2",
                ("intermediate_size",),
            ),
        ),
    ),
    Family(
        ("qwen2_moe", "qwen3_moe"),
        (
            *_LLAMA,
            Reads(("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"), fused=2),
            Reads(("mlp.experts.{}.down_proj",), "mlp.experts.{}.up_proj"),
            Reads(("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"), fused=2),
            Reads(("mlp.shared_expert.down_proj",), "mlp.shared_expert.up_proj"),
        ),
        stream=Stream(
            (
                ("input_layernorm", _QKV),
                (
                    "post_attention_layernorm",
                    (
                        *("mlp.gate_proj", "mlp.up_proj", "mlp.gate", "mlp.shared_expert_gate"),
                        *("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"),
                        *("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
                    ),
                ),
            ),
            (
                *("self_attn.o_proj", "mlp.down_proj"),
                *("mlp.experts.{}.down_proj", "mlp.shared_expert.down_proj"),
            ),
        ),
        seams=(
            _gated(),
            _gated(inside="mlp.experts.{}", width="moe_intermediate_size"),
            _gated(inside="mlp.shared_expert", width="shared_expert_intermediate_size"),
        ),
        placed=(("mlp_only_layers", []), ("decoder_sparse_step", 1)),
    ),
)

# A classifier of pictures is known by its names alone: these are torchvision's.
GENERIC = Family(
    (),
    seams=(
        Seam(("conv1",), "conv2", norm="bn1", settled=True),
        Seam(("conv2",), "conv3", norm="bn2", settled=True),
    ),
    depth="",
)

# The job of a layer, by the end of its name; the first that fits.
ROLES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "query": "query",
    "key": "key",
    "value": "value",
    "qkv_proj": "query, key, value",
    "c_attn": "query, key, value",
    "query_key_value": "query, key, value",
    "o_proj": "attention output",
    "out_proj": "attention output",
    "self_attn.dense": "attention output",
    "attention.dense": "attention output",
    "attention.output.dense": "attention output",
    "attn.c_proj": "attention output",
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "gate_up_proj": "gate, up",
    "fc1": "up",
    "c_fc": "up",
    "intermediate.dense": "up",
    "dense_h_to_4h": "up",
    "down_proj": "down",
    "w2": "down",
    "fc2": "down",
    "mlp.c_proj": "down",
    "output.dense": "down",
    "dense_4h_to_h": "down",
}

# Words in the name of a tensor that is looked up rather than multiplied, or that ends the model.
EMBEDDINGS = ("relative_attention_bias", "wte", "wpe", "position")
HEADS = ("lm_head", "embed_out", "classifier", "score", "cls", "pooler")
# Endings of layers that choose experts.
ROUTERS = ("block_sparse_moe.gate", "mlp.gate", "mlp.shared_expert_gate", ".router")


def family(config: Mapping[str, Any]) -> Family:
    """The family that a `config.json` describes; `GENERIC` if there is none."""
    known = (f for f in FAMILIES if config.get("model_type") in f.types)
    return next((f for f in known if f.only is None or f.only[1] == config.get(f.only[0])), GENERIC)
