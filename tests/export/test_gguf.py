"""GGUF files: their readers hold what was in memory, at the size that was foreseen."""

import json
import math
import os
import shutil
from pathlib import Path

import gguf
import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import layerwise as lw
from layerwise import builtin
from layerwise.core.economy import Economy
from layerwise.core.keeping.staging import Staging
from layerwise.core.plan import LayerPlan
from layerwise.core.reading.checkpoint import open_checkpoint
from layerwise.core.reading.text import windows
from layerwise.core.results import SCALE_DTYPE, Quantized
from layerwise.export._gguf_blocks import KINDS, blocks
from layerwise.export.gguf import Gguf

ASSETS = os.environ.get("LAYERWISE_ASSETS")
NAMES = {kind.name: kind for kind in KINDS.values()}
TEXT = torch.arange(8 * 32).remainder(256).reshape(8, 32)
TEXTS = {"text": TEXT, "length": 32, "text_samples": 8}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "num_hidden_layers": 3, "layer_types": None},
    "gemma3_text": {"query_pre_attn_scalar": 8, "num_hidden_layers": 7, "layer_types": None},
}
WISHES = {
    "Q8_0": {"bits": 8},
    "Q4_1": {"bits": 4},
    "Q5_0": {"bits": 5, "symmetric": True},
    "F16": {"density": 0.5},
}


def drawn(kind, rows: int = 6, *, spread: float = 0.02) -> Quantized:
    """Codes on grids of very different scales."""
    width = 2 * kind.weights
    top, groups = 2**kind.bits, width // kind.group
    scale = spread * 10 ** (4 * torch.rand(rows, groups) - 3)
    middle = torch.full((rows, groups), top // 2)
    zero = middle if kind.symmetric else torch.randint(0, top, (rows, groups))
    codes = torch.randint(0, top, (rows, width))
    scale[0, 0] = 0.0
    return Quantized(
        codes.int(), scale.to(SCALE_DTYPE), zero.int(), kind.bits, kind.group, kind.symmetric
    )


def fields(file: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("kind", NAMES.values(), ids=NAMES)
def test_the_package_unpacks_what_we_say_it_will(kind):
    made = blocks(drawn(kind))
    packed = made.packed()
    assert packed.shape[1] == kind.bytes_of(2 * kind.weights)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.name]]
    assert (block, size) == (kind.weights, kind.size)
    values = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType[kind.name])
    assert torch.from_numpy(values).equal(made.values())


@pytest.mark.parametrize("kind", [k for k in NAMES.values() if k.group == 32], ids=lambda k: k.name)
def test_codes_stay_what_they_are(kind):
    quantized = drawn(kind)
    made = blocks(quantized)
    assert made.codes.flatten(1).equal(quantized.codes.to(torch.uint8))
    # Half a step of float16 at most: in the scale, times the code; and in the minimum.
    wanted, top = quantized.grid_values(), 2**kind.bits
    largest = quantized.scale.float().abs().max() * top
    allowed = 2.0**-11 * (largest if not kind.symmetric else 0) + 2.0**-25 * 2 * top
    assert float((made.values() - wanted).abs().max()) <= allowed


def test_sub_scales_of_six_bits_are_rounded_and_codes_follow():
    kind = NAMES["Q6_K"]
    quantized = drawn(kind, rows=64)
    made = blocks(quantized)
    wanted, values = quantized.grid_values(), made.values()
    largest = quantized.scale.float().unflatten(1, (2, -1)).amax(dim=-1)
    # A step of a sub-scale is 1/127 of the largest scale; a code has at most 32 scales.
    half = (0.5 * largest / 127 * 1.01).repeat_interleave(kind.weights, dim=1)
    step = quantized.scale.float().repeat_interleave(kind.group, dim=1) + half
    assert ((values - wanted).abs() <= 32 * half + step / 2 + 1e-6).all()
    near = quantized.scale.float() > 0.5 * largest.repeat_interleave(16, dim=1)
    kept = near.repeat_interleave(kind.group, dim=1)
    assert made.codes.flatten(1)[kept].equal(quantized.codes.to(torch.uint8)[kept])


@pytest.mark.parametrize("largest", [1e-7, 1e-5, 1e-3, 1.0, 1e4])
def test_six_bits_of_tiny_and_huge_weights(largest):
    kind = NAMES["Q6_K"]
    quantized = drawn(kind, spread=largest / 10)
    values = blocks(quantized).values()
    lost = (values - quantized.grid_values()).norm() / quantized.grid_values().norm()
    assert lost < (0.02 if largest > 1e-6 else 0.5)


@pytest.mark.parametrize("wish", WISHES.values(), ids=WISHES)
@pytest.mark.parametrize("kind", FAMILIES)
def test_what_is_loaded_is_what_was_in_memory(kind, wish, tmp_path):
    models.make(kind, tmp_path / "model", intermediate_size=64, **FAMILIES[kind])
    texts = {"text": models.inputs(kind), "length": 16, "text_samples": 3, "proof": "logits"}
    report = lw.compress(tmp_path / "model", tmp_path / "out", format="gguf", **wish, **texts)
    assert report.proof is not None
    assert report.proof.largest_difference <= report.proof.allowed
    file = tmp_path / "out" / "model.gguf"
    assert file.stat().st_size == report.bytes_after
    reader = gguf.GGUFReader(file)
    assert {tensor.name for tensor in reader.tensors} >= {"token_embd.weight", "output_norm.weight"}
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    assert WISHES[stored.tensor_type.name] is wish


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gemma3_text"])
def test_transformers_reads_it_without_our_help(kind, tmp_path):
    # Of the settings in config.json, transformers takes those that GGUF files usually have.
    settings = {**FAMILIES[kind], "head_dim": 8}
    if "query_pre_attn_scalar" in settings:
        settings |= {"query_pre_attn_scalar": 256, "head_dim": 256}
    original = models.make(kind, tmp_path / "model", intermediate_size=64, **settings)
    lw.compress(tmp_path / "model", tmp_path / "out", bits=8, format="gguf", proof="none")
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    assert type(loaded) is type(original)
    with torch.no_grad():
        found, expected = (m(models.inputs(kind)).logits for m in (loaded.eval(), original))
    ours = lw.load(tmp_path / "out")
    with torch.no_grad():
        assert found.equal(ours(models.inputs(kind)).logits)
    assert 0 < float((found - expected).norm()) < 0.03 * float(expected.norm())


def test_transformers_does_not_load_noise(llama, tmp_path):
    lw.compress(llama, tmp_path / "out", bits=8, format="gguf", proof="none")
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_all_of_a_wide_model_in_six_bits(tmp_path):
    size = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    models.make("llama", tmp_path / "model", **size)
    report = lw.compress(
        tmp_path / "model",
        tmp_path / "out",
        bits=6,
        format="gguf",
        text=models.inputs("llama"),
        length=16,
        text_samples=3,
        proof="logits",
    )
    assert report.proof is not None
    assert report.average_bits == 8 * 210 / 256
    assert {layer.stored_bits for layer in report.layers} == {8 * 210 / 256}


def test_by_tensor_and_by_block_write_the_same(llama, tmp_path):
    plan = lw.plan(llama, bits=5, format="gguf")
    layers = dict(plan.layers)
    for name in layers:
        if "layers.1.self_attn" in name:
            layers[name] = LayerPlan()
    plan = type(plan)(layers, plan.format)
    by_tensor = lw.compress(llama, tmp_path / "streamed", plan=plan, proof="none")
    by_block = lw.compress(llama, tmp_path / "walked", plan=plan, **TEXTS)
    files = [tmp_path / name / "model.gguf" for name in ("streamed", "walked")]
    assert files[0].read_bytes() == files[1].read_bytes()
    sizes = [{row.layer: row.bytes_after for row in r.layers} for r in (by_tensor, by_block)]
    assert sizes[0] == sizes[1]
    assert by_block.proof is not None
    assert by_block.proof.largest_difference <= by_block.proof.allowed
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(files[0]).tensors}
    assert stored["blk.0.attn_q.weight"] == "Q5_1"
    assert stored["blk.1.attn_q.weight"] == "F16"
    assert stored["blk.1.attn_norm.weight"] == "F32"


def test_slices_of_rows_write_the_same(llama, tmp_path, monkeypatch):
    wish = {"bits": 4, "format": "gguf", "proof": "none"}
    lw.compress(llama, tmp_path / "whole", **wish)
    monkeypatch.setattr("layerwise.core.running.stream.SLICE_ENTRIES", 64)
    economy = Economy(read_bytes=64)
    monkeypatch.setattr(
        "layerwise.flow.compressing.promised", lambda seen, _: (economy, seen.forecast(economy))
    )
    lw.compress(llama, tmp_path / "sliced", **wish)
    files = [tmp_path / name / "model.gguf" for name in ("whole", "sliced")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_resumed_run_ends_with_the_same_bytes(llama, tmp_path, monkeypatch):
    wish = {"bits": 4, "format": "gguf", **TEXTS}
    lw.compress(llama, tmp_path / "whole", **wish)
    write, left = Staging.write, iter(range(15))

    def dies(*given, **named):
        next(left)
        return write(*given, **named)

    monkeypatch.setattr("layerwise.core.keeping.staging.Staging.write", dies)
    with pytest.raises(StopIteration):
        lw.compress(llama, tmp_path / "out", **wish)
    monkeypatch.undo()
    assert (tmp_path / "out.partial").exists()
    lw.compress(llama, tmp_path / "out", **wish)
    files = [tmp_path / name / "model.gguf" for name in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_scales_that_moved_into_the_norms(tmp_path, text):
    for kind in ("llama", "gemma2"):
        models.make(kind, tmp_path / kind, vocab_size=256, **FAMILIES[kind])
        report = lw.compress(
            tmp_path / kind,
            tmp_path / f"{kind}-out",
            plan=awq_plan(tmp_path / kind),
            calibration=torch.randint(0, 256, (8, 32)),
            **TEXTS,
        )
        assert report.proof is not None


def awq_plan(model):
    """Only the inputs of q, k and v are scaled, since groups of 32 do not divide the others."""
    plan = lw.plan(model, density=0.9, format="gguf")
    scaled = LayerPlan(bits=4, group=32, method="awq")
    layers = {
        name: scaled if name.endswith(("q_proj", "k_proj", "v_proj")) else LayerPlan()
        for name in plan.layers
    }
    return type(plan)(layers, "gguf")


@pytest.mark.parametrize("budget", ["5bits", "6.5bits", "60%"])
def test_a_budget_mixes_types_and_is_kept(budget, llama, tmp_path):
    report = lw.compress(
        llama,
        tmp_path / "out",
        budget=budget,
        allow={"bits": (4, 5, 8)},
        symmetric=None if budget == "60%" else True,
        format="gguf",
        **TEXTS,
    )
    size = (tmp_path / "out" / "model.gguf").stat().st_size
    if budget.endswith("bits"):
        assert report.average_bits <= float(budget.removesuffix("bits"))
        assert len({layer.bits for layer in report.layers}) > 1
    else:
        assert size <= 0.6 * (llama / "model.safetensors").stat().st_size
    assert size == report.bytes_after == report.forecast["size_bytes"]


def test_settings_that_llama_cpp_reads(llama, tmp_path):
    lw.compress(llama, tmp_path / "out", bits=4, symmetric=True, format="gguf", proof="none")
    found = fields(tmp_path / "out" / "model.gguf")
    expected = {
        "general.architecture": "llama",
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "general.quantization_version": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 32,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 256,
        "tokenizer.ggml.model": "none",
    }
    assert {name: found[name] for name in expected} == expected
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_rows_of_a_head_take_turns(llama, tmp_path):
    """As llama.cpp's converter lays queries and keys out: both halves of a head, interleaved."""
    lw.compress(llama, tmp_path / "out", density=0.999, format="gguf", proof="none")
    stored = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    original = lw.open(llama).source.read("model.layers.0.self_attn.k_proj.weight").half()
    found = torch.from_numpy(stored["blk.0.attn_k.weight"].copy())
    for row in range(16):
        head, place = divmod(row, 8)
        half, pair = divmod(place, 4)
        pruned = found[head * 8 + 2 * pair + half] == 0
        assert found[head * 8 + 2 * pair + half].equal(original[row].where(~pruned, 0))


def test_llama_3_positions_become_factors(make_llama, tmp_path):
    scaled = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = make_llama(tmp_path / "model", rope_parameters=scaled)
    report = lw.compress(model, tmp_path / "out", bits=8, format="gguf", **TEXTS)
    assert report.proof is not None
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    factors = tensors["rope_freqs.weight"].tolist()
    # Wavelengths 2 pi 10000^(i / 4): below 64 / 4 they stay, above 64 they are 8 times as long.
    smooth = (64 / (2 * math.pi * 10) - 1) / 3
    expected = [1.0, 1 / ((1 - smooth) / 8 + smooth), 8.0, 8.0]
    assert factors == pytest.approx(expected, rel=1e-5)


def test_a_head_that_is_the_embeddings_is_not_stored_twice(tmp_path):
    model = models.make("llama", tmp_path / "model", intermediate_size=64, tie_word_embeddings=True)
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    texts = {"text": models.inputs("llama"), "length": 16, "text_samples": 3, "proof": "logits"}
    report = lw.compress(tmp_path / "model", tmp_path / "out", bits=8, format="gguf", **texts)
    assert report.proof is not None
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}


def test_a_model_in_memory(tmp_path):
    module = models.built("qwen2", intermediate_size=64)
    report = lw.compress(
        module, tmp_path / "out", bits=8, format="gguf", text=models.inputs("qwen2")
    )
    assert report.proof is not None
    state = Gguf(open_checkpoint(tmp_path / "out")).read()
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in module.state_dict().items()
    }


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"bits": 3}, "3 bits with zero points; with zero points it has 4, 5 bits"),
        ({"bits": 7, "symmetric": True}, "it has 4, 5, 6, 8 bits"),
        ({"bits": 8, "symmetric": False}, "8 bits with zero points"),
        ({"bits": 4, "group": 16}, "groups of 16; Q4_1, which has 4 bits, has groups of 32"),
        ({"bits": 6}, "is no multiple of 256, the block of Q6_K"),
        ({"bits": 4, "rank": 2}, "low-rank"),
        ({"rank": 2}, "low-rank"),
        ({"bits": 4, "density": 0.5}, "--symmetric"),
    ],
)
def test_refuses_plans_it_has_no_place_for(changes, problem, llama, tmp_path):
    with pytest.raises(lw.UserError, match=problem):
        lw.compress(llama, tmp_path / "out", format="gguf", proof="none", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("phi3", {}, "a model of type phi3"),
        ("gpt2", {}, "It holds llama, qwen2"),
        ("llama", {"hidden_act": "gelu"}, "silu alone"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "scales its queries by 8"),
        ("gemma3_text", {"query_pre_attn_scalar": 8}, "window of the text"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "win"),
        ("qwen3", {"attention_bias": True}, "o_proj.bias"),
        ("gemma2", {"tie_word_embeddings": False, "query_pre_attn_scalar": 8}, "lm_head.weight"),
        (
            "qwen3",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 2.0,
                    "original_max_position_embeddings": 32,
                    "attention_factor": 1.5,
                }
            },
            "attention_factor",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "type dynamic",
        ),
    ],
)
def test_refuses_models_that_llama_cpp_would_run_otherwise(kind, changes, problem, tmp_path):
    models.make(kind, tmp_path / "model", intermediate_size=64, **changes)
    with pytest.raises(lw.UserError) as refused:
        lw.compress(tmp_path / "model", tmp_path / "out", bits=8, format="gguf", proof="none")
    assert problem in refused.value.problem + refused.value.remedy
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("place", ["embed_tokens", "mlp.up_proj"])
def test_refuses_numbers_beyond_float16(place, make_llama, tmp_path):
    file = make_llama(tmp_path / "model") / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if place in name)
    tensors[name][0, 0] = 1e8
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(lw.UserError, match="float16"):
        lw.compress(tmp_path / "model", tmp_path / "out", bits=4, format="gguf", proof="none")


def test_gguf_files_are_no_checkpoints_to_compress(llama, tmp_path):
    out = tmp_path / "out"
    lw.compress(llama, out, bits=4, format="gguf", proof="none")
    with pytest.raises(lw.UserError, match="a GGUF file"):
        lw.compress(out / "model.gguf", tmp_path / "again", bits=4)
    with pytest.raises(lw.UserError, match="quantized already"):
        lw.compress(out, tmp_path / "again", bits=4)
    (out / "config.json").write_text(json.dumps(lw.open(llama).source.config | {}))
    with pytest.raises(lw.UserError, match="a GGUF file"):
        lw.evaluate(out, text=TEXT)


# Tokenizers.


def tokenizer_of(model: Path | str, out: Path) -> dict[str, object]:
    lw.compress(model, out, density=0.99, format="gguf", proof="none")
    return fields(out / "model.gguf")


def test_the_built_in_model_s_tokenizer(tmp_path):
    found = tokenizer_of("builtin:tiny", tmp_path / "out")
    told = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert found["tokenizer.ggml.model"] == "gpt2"
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert {token: id for id, token in enumerate(found["tokenizer.ggml.tokens"])} == told["model"][
        "vocab"
    ]
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in told["model"]["merges"]]
    assert found["tokenizer.ggml.token_type"][0] == gguf.TokenType.CONTROL
    assert set(found["tokenizer.ggml.token_type"][1:]) == {gguf.TokenType.NORMAL}
    ids = {f"tokenizer.ggml.{kind}_token_id": 0 for kind in ("bos", "eos", "padding")}
    assert ids.items() <= found.items()
    assert found["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.trained
@pytest.mark.parametrize(("name", "bytes"), [("stories260k", True), ("stories-char-940k", False)])
def test_tokenizers_that_come_of_sentencepiece(name, bytes, tmp_path):
    found = tokenizer_of(Path(ASSETS) / "models" / name, tmp_path / "out")
    told = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.tokens"] == [
        told.id_to_token(id) for id in range(told.get_vocab_size())
    ]
    types = found["tokenizer.ggml.token_type"]
    kinds = gguf.TokenType
    assert types[:3] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
    assert types.count(kinds.BYTE) == (256 if bytes else 0)
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.ggml.add_eos_token"] is False
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.bos_token_id"] == 1
    text = "Once upon a time there was a little girl who had a red ball."
    expected = told.encode(text, add_special_tokens=False).ids
    assert merged("\u2581" + text.replace(" ", "\u2581"), found) == expected


def merged(text: str, found: dict[str, object]) -> list[int]:
    """What llama.cpp does with scores: the pair with the best one first, the leftmost of equals."""
    ids = {token: id for id, token in enumerate(found["tokenizer.ggml.tokens"])}
    scores, parts = found["tokenizer.ggml.scores"], list(text)
    while True:
        pairs = [(i, parts[i] + parts[i + 1]) for i in range(len(parts) - 1)]
        known = [(-scores[ids[pair]], i) for i, pair in pairs if pair in ids]
        if not known:
            return [ids[part] for part in parts]
        _, place = min(known)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def split_by(pattern: str, digits: bool = False) -> list[dict[str, object]]:
    levels = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": digits}
    levels["trim_offsets"] = True
    if digits:
        return [{"type": "Digits", "individual_digits": True}, levels]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return [{**split, "invert": False}, levels]


GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (split_by(GPT4 % "{1,3}"), "llama-bpe"),
        (split_by(GPT4 % ""), "qwen2"),
        (split_by("", digits=True), "smollm"),
        (split_by(r"\p{L}+"), None),
    ],
)
def test_rules_that_split_words_have_names(steps, name, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(builtin.model_path(), model)
    told = json.loads((model / "tokenizer.json").read_text())
    vocabulary = {t: i for t, i in told["model"]["vocab"].items() if i < 2040}
    merges = [pair for pair in told["model"]["merges"] if "".join(pair) in vocabulary]
    told["model"] |= {"vocab": vocabulary, "merges": merges}
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    (model / "tokenizer.json").write_text(json.dumps(told))
    if name is None:
        with pytest.raises(lw.UserError, match="rule of its own"):
            tokenizer_of(model, tmp_path / "out")
        return
    found = tokenizer_of(model, tmp_path / "out")
    assert found["tokenizer.ggml.pre"] == name
    assert found["tokenizer.ggml.tokens"][2040:] == [f"[PAD{id}]" for id in range(2040, 2048)]
    assert found["tokenizer.ggml.token_type"][2047] == gguf.TokenType.UNUSED


def test_refuses_tokenizers_it_cannot_read(llama, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(llama, model)
    (model / "tokenizer.model").write_bytes(b"")
    with pytest.raises(lw.UserError, match="and no tokenizer") as refused:
        tokenizer_of(model, tmp_path / "out")
    assert "save_pretrained" in refused.value.remedy
    (model / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(lw.UserError, match="Unigram"):
        tokenizer_of(model, tmp_path / "out")


@pytest.mark.trained
def test_evaluate_reads_text_with_the_result(tmp_path):
    model = Path(ASSETS) / "models" / "stories-char-940k"
    report = lw.compress(model, tmp_path / "out", bits=8, format="gguf", text_samples=4, length=64)
    assert report.proof is not None
    source = open_checkpoint(tmp_path / "out")
    assert windows(source, "builtin", samples=2, length=32).ids.shape == (2, 32)
    found = lw.evaluate(tmp_path / "out", against=model, samples=4, length=64)
    assert found.text.kl == pytest.approx(report.comparison.kl, rel=0.3)
