"""Run exported GGUF files with llama.cpp, and compare what it answers with what we answer.

    python scripts/interop.py [--llama PYTHON] [--work DIR]

`PYTHON` is an interpreter that has `llama_cpp` (`make interop` builds one from llama-cpp-python's
source package).  `builtin:tiny`, and with LAYERWISE_ASSETS more models, are exported at several
widths; both sides read the same windows of held-out text, and the tokenizers the same sentences.
Random models of every family, and of every kind of rotary positions, follow.

What may differ.  llama.cpp rounds what a layer reads before it multiplies it with quantized
weights: to 8 bits, 32 numbers (Q6_K: 256) to a scale; with F16 weights, to float16.  So a second
model of ours has that rounding put before its layers.  llama.cpp must lie within `SAME` of it, in
nats per token (of the entropy, and of the KL divergence); what is left are sums in another order,
which move a number over the edge between two codes here and there, and sums of blocks that
llama.cpp keeps in float16 for Q4_1 and Q5_1.  It must lie within `ROUNDED` of ours without it:
8 bits leave an error of 0.2 to 0.7% of each input (1 / 127 / sqrt 12 times the largest of 32
over their mean), up to 4% after some 30 layers; such an error of logits that spread by 3 is
(0.04 * 3)^2 / 2 nats.  On the random tokens that random models read only the divergence counts:
the entropy of a guess about them says nothing.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SAME, ROUNDED = 1e-3, 1e-2  # nats per token
WINDOWS, LENGTH = 32, 128
WIDTHS: Mapping[str, Mapping[str, Any]] = {
    "F16": {"density": 0.9},
    "Q8_0": {"bits": 8},
    "Q6_K": {},  # see _wide_in_six_bits
    "Q5_0": {"bits": 5, "symmetric": True},
    "Q5_1": {"bits": 5, "symmetric": False},
    "Q4_0": {"bits": 4, "symmetric": True},
    "Q4_1": {"bits": 4, "symmetric": False},
    "mixed": {"budget": "5.5bits", "allow": {"bits": (4, 5, 8)}},
}


_YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "llama, linear": {"factor": 2.0},
    "llama, llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama, yarn": _YARN,
    "qwen2": {},
    "qwen2, yarn": _YARN,
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 64, "layer_types": None},
    "gemma3_text": {"query_pre_attn_scalar": 64, "layer_types": None},
}


def answer(folder: Path) -> None:
    """In an interpreter with llama_cpp: logits and tokens of what lies in a folder."""
    import llama_cpp

    ids = np.load(folder / "ids.npy")
    model = llama_cpp.Llama(
        model_path=json.loads((folder / "model.json").read_text()),
        n_ctx=ids.shape[1],
        n_batch=ids.shape[1],
        n_threads=2,
        logits_all=True,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )
    logits = []
    for window in ids.tolist():
        model.reset()
        model.eval(window)
        logits.append(np.array(model.scores[: len(window)], dtype=np.float32))
    np.save(folder / "logits.npy", np.stack(logits))
    if (folder / "texts.json").exists():
        texts = json.loads((folder / "texts.json").read_text())
        tokens = [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
        (folder / "tokens.json").write_text(json.dumps(tokens))


def main() -> int:
    """Compare; the exit status says whether all is within bounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", default=sys.executable)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.answer:
        answer(chosen.answer)
        return 0
    with tempfile.TemporaryDirectory() as made:
        failures = list(compare(chosen.llama, chosen.work or Path(made)))
    for failure in failures:
        print(f"FAILED: {failure}")
    return bool(failures)


def compare(python: str, work: Path) -> Iterator[str]:
    """Print a table; what is out of bounds is yielded."""
    print(
        f"{'model':22} {'stored as':9} {'ours':>9} {'rounded':>9} {'llama.cpp':>9} "
        f"{'KL':>9} {'KL to rounded':>13}"
    )
    for name, model, text in models():
        yield from _compare_one(python, work / name, name, model, text)
    for name in FAMILIES:
        folder = work / f"{name} model"
        make_random(name, folder)
        yield from _compare_one(python, work / name, name, str(folder), None)


def models() -> Iterator[tuple[str, str, str]]:
    """Trained models, and what they read."""
    from layerwise import builtin

    yield "tiny", builtin.NAME, builtin.text_path("heldout").read_text()
    if assets := os.environ.get("LAYERWISE_ASSETS"):
        root = Path(assets)
        stories = json.loads((root / "text/tinystories/heldout_stories.json").read_text())
        # This model knows neither line ends nor two spaces in a row: its tokenizer removes them,
        # and llama.cpp has no step that would.
        known = json.loads((root / "models/stories-char-940k/tokenizer.json").read_text())
        characters = {*known["model"]["vocab"], " "}
        words = " ".join("".join(c if c in characters else " " for c in "\n".join(stories)).split())
        yield "stories-char-940k", str(root / "models/stories-char-940k"), words
        text = (root / "text/wikitext2/test.txt").read_text()
        yield "reference-6m", str(root / "models/reference-6m"), text[len(text) // 2 :]


def make_random(name: str, folder: Path) -> None:
    """Save a random model whose every tensor matters, wide enough for blocks of 256."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    import models as makers

    kind, _, positions = name.partition(", ")
    settings: dict[str, Any] = dict(FAMILIES[name])
    if positions:
        settings = {"rope_theta": 10000.0, "rope_type": positions, **settings}
        settings = {"rope_parameters": settings, "max_position_embeddings": 256}
    size = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 7}
    head = {} if kind == "qwen2" else {"head_dim": 64}
    makers.make(kind, folder, **size, **head, **settings)


def _compare_one(python: str, work: Path, name: str, model: str, text: str | None) -> Iterator[str]:
    import torch

    import layerwise as lw
    from layerwise.core.reading.text import windows

    source = lw.open(model).source
    work.mkdir(parents=True, exist_ok=True)
    if text is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, source.config["vocab_size"], (4, 64), generator=generator)
    else:
        ids = windows(source, [text], samples=WINDOWS, length=LENGTH).ids
        texts = [text[start : start + 400].strip() for start in range(0, 8000, 400)]
        (work / "texts.json").write_text(json.dumps(texts))
    np.save(work / "ids.npy", ids.numpy())
    for label in WIDTHS if text is not None else ("F16", "Q6_K", "Q4_0"):
        out, wish = work / label, {"format": "gguf", **WIDTHS[label]}
        if label == "Q6_K":
            wish = {"plan": _wide_in_six_bits(model)}
            if all(layer.bits != 6 for layer in wish["plan"].layers.values()):
                continue
        lw.compress(model, out, **wish, proof="none")
        (work / "model.json").write_text(json.dumps(str(out / "model.gguf")))
        command = [python, __file__, "--answer", str(work)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        theirs = torch.from_numpy(np.load(work / "logits.npy"))
        ours, rounded = _answers(out, ids)
        entropies = [_entropy(logits, ids) for logits in (ours, rounded, theirs)]
        apart, nearly = _divergence(ours, theirs), _divergence(rounded, theirs)
        figures = " ".join(f"{math.exp(entropy):9.4f}" for entropy in entropies)
        print(f"{name:22} {label:9} {figures} {apart:9.2e} {nearly:13.2e}", flush=True)
        case = f"{name} as {label}"
        between = [abs(entropy - entropies[2]) * (text is not None) for entropy in entropies]
        if not max(between[1], nearly) < SAME:
            yield f"{case}: llama.cpp differs from the same model with rounded inputs"
        if not max(between[0], apart) < ROUNDED:
            yield f"{case}: llama.cpp differs by more than rounding explains"
    if text is not None:
        yield from _compare_tokens(source, work, name)


def _wide_in_six_bits(model: str) -> Any:
    """Six bits for layers whose width is a multiple of 256; eight for the others, if any."""
    import layerwise as lw
    from layerwise.core.plan import LayerPlan

    plan, found = lw.plan(model, bits=8, format="gguf"), lw.open(model).structure
    six = LayerPlan(bits=6, group=16, symmetric=True)
    layers = {
        name: layer if found.layers[name].width % 256 else six
        for name, layer in plan.layers.items()
    }
    return type(plan)(layers, plan.format)


def _compare_tokens(source: Any, work: Path, name: str) -> Iterator[str]:
    from tokenizers import Tokenizer

    folder = next(f.parent for f in source.companions if f.name == "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = json.loads((work / "texts.json").read_text())
    tokens = json.loads((work / "tokens.json").read_text())
    equal = sum(tokenizer.encode(t).ids == given for t, given in zip(texts, tokens, strict=True))
    print(f"{name:22} tokens    {equal} of {len(texts)} texts are split alike")
    if equal < len(texts):
        yield f"{name}: llama.cpp splits {len(texts) - equal} texts otherwise"


def _answers(out: Path, ids: Any) -> tuple[Any, Any]:
    """Our logits, and those of our model with its layers' inputs rounded as llama.cpp does."""
    import gguf
    import torch

    import layerwise as lw

    model = lw.load(out)
    with torch.no_grad():
        ours = model(ids).logits
        stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out / "model.gguf").tensors}
        kinds = _kinds(out, stored)
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(_rounding(kinds[name]))
        return ours, model(ids).logits


def _kinds(out: Path, stored: Mapping[str, str]) -> Mapping[str, str]:
    """How each layer's weight is stored, by the layer's name."""
    from layerwise.core.reading.checkpoint import open_checkpoint
    from layerwise.export.gguf import Gguf

    names = Gguf(open_checkpoint(out)).model.names
    kinds = {name.removesuffix(".weight"): stored.get(given) for name, given in names.items()}
    embeddings = stored["token_embd.weight"]
    return {name: kind or embeddings for name, kind in kinds.items()} | {
        "lm_head": stored.get("output.weight", embeddings)
    }


def _rounding(kind: str) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]:
    block = {"F16": 0, "Q6_K": 256}.get(kind, 32)

    def rounded(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        values = inputs[0]
        if not block:
            return (values.half().float(),)
        parts = values.unflatten(-1, (-1, block))
        scale = parts.abs().amax(dim=-1, keepdim=True) / 127
        codes = (parts / scale.where(scale > 0, 1.0)).round()
        return ((codes * (scale if block == 256 else scale.half().float())).flatten(-2),)

    return rounded


def _entropy(logits: Any, ids: Any) -> float:
    scored = logits[:, :-1].double().log_softmax(dim=-1)
    return float(-scored.gather(2, ids[:, 1:, None]).mean())


def _divergence(first: Any, second: Any) -> float:
    one, two = (logits.double().log_softmax(dim=-1) for logits in (first, second))
    return float((one.exp() * (one - two)).sum(dim=-1).mean())


if __name__ == "__main__":
    sys.exit(main())
