"""Merges against reading and writing alone, and against mergekit in its own environment.

    python benchmarks/merging.py --millions 20                       # a minute
    python benchmarks/merging.py --millions 200 --mergekit /tmp/mk   # the bars of the issue
    python benchmarks/merging.py --millions 2000 --methods linear    # private memory does not grow

It makes a base and four models of bfloat16 itself (random numbers in the shapes of a Llama), under
--folder.  With --mergekit DIR it makes an environment there, unless one is there.  `copy` reads
four models and writes one, 4 MiB at a time, with one fsync at the end, and does nothing else.  The
error of TIES is that of the update of one tensor, against float64, over the entries whose sign and
trim are no near ties.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from beside import environment, in_turn, print_ratios
from safetensors.torch import save_file

COPY = """
import os, sys
*sources, out = sys.argv[1:]
step, written = 1 << 22, os.open(out, os.O_WRONLY | os.O_CREAT)
files = [os.open(one, os.O_RDONLY) for one in sources]
at, buffer = 0, bytearray(step)
while True:
    sizes = [os.preadv(file, [buffer], at) for file in files]
    if not sizes[-1]:
        break
    os.pwrite(written, memoryview(buffer)[: sizes[-1]], at)
    at += sizes[-1]
os.fsync(written)
"""
OURS = """
import sys, json
import layerwise as lw
models, base, method, out = json.loads(sys.argv[1])
options = {"density": 0.5, "scope": "tensor"} if method == "ties" else {}
lw.merge(models, out, base=base if method == "ties" else None, method=method, options=options)
"""


def main() -> None:
    """Make the models, run everything, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=20, help="parameters of each model")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/layerwise-merging"))
    parser.add_argument("--methods", default="linear,ties")
    parser.add_argument("--mergekit", type=Path, help="environment to make and to use")
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    base, *models = _models(chosen.folder / f"{chosen.millions}M", chosen.millions)
    size = sum(file.stat().st_size for one in models for file in one.glob("*.safetensors"))
    print(
        f"four models and a base of {chosen.millions}M bfloat16 weights; {size / 1e9:.2f} GB read"
    )
    runs: dict[str, list[str]] = {
        "copy": [
            sys.executable,
            "-c",
            COPY,
            *(str(one / "model.safetensors") for one in models),
            str(out),
        ]
    }
    for method in chosen.methods.split(","):
        given = json.dumps([[str(one) for one in models], str(base), method, str(out)])
        runs[f"layerwise {method}"] = [sys.executable, "-c", OURS, given]
        if chosen.mergekit:
            recipe = chosen.folder / f"{method}.yml"
            recipe.write_text(json.dumps(_recipe(method, base, models)))
            tool = environment(chosen.mergekit, "mergekit") / "mergekit-yaml"
            runs[f"mergekit {method}"] = [str(tool), str(recipe), str(out)]
    found = in_turn(runs, chosen.repeats, out)
    for name in list(runs)[1:]:
        print_ratios(found, name, "copy")
        if (peer := name.replace("layerwise", "mergekit")) != name and peer in runs:
            print_ratios(found, name, peer)
    if "ties" in chosen.methods:
        print(f"update of TIES against float64: {_ties_error(base, models, out):.2e} of its length")


def _models(folder: Path, millions: int) -> list[Path]:
    """A base and four models near it."""
    hidden = max(128, round((millions / 200) ** 0.5 * 1024) // 128 * 128)
    block = 4 * hidden**2 + 3 * hidden * 4 * hidden
    blocks = max(1, round((millions * 10**6 - 32_000 * hidden) / block))
    shapes = {"model.embed_tokens.weight": (32_000, hidden)}
    for number in range(blocks):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"model.layers.{number}.self_attn.{name}.weight"] = (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            shapes[f"model.layers.{number}.mlp.{name}.weight"] = (4 * hidden, hidden)
        shapes[f"model.layers.{number}.mlp.down_proj.weight"] = (hidden, 4 * hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{number}.{name}.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32_000,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": blocks,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    made: list[Path] = []
    for number in range(5):
        path = folder / f"m{number}"
        made.append(path)
        if (path / "config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, torch.Tensor] = {}
        for place, (name, shape) in enumerate(shapes.items()):
            start = torch.Generator().manual_seed(place)
            tensor = torch.randn(shape, generator=start) / hidden**0.5
            if number:
                own = torch.Generator().manual_seed(1_000_000 * number + place)
                tensor += torch.randn(shape, generator=own) / hidden**0.5 / 20
            tensors[name] = tensor.bfloat16()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        (path / "config.json").write_text(json.dumps(config))
    return made


def _recipe(method: str, base: Path, models: list[Path]) -> dict[str, object]:
    each = {"weight": 1.0, "density": 0.5} if method == "ties" else {"weight": 1.0}
    recipe: dict[str, object] = {
        "merge_method": method,
        "dtype": "bfloat16",
        "models": [{"model": str(one), "parameters": each} for one in models],
    }
    return recipe | ({"base_model": str(base)} if method == "ties" else {})


def _ties_error(base: Path, models: list[Path], out: Path) -> float:
    import layerwise as lw
    from layerwise.core.reading.checkpoint import open_checkpoint

    if out.is_dir():
        shutil.rmtree(out)
    options = {"density": 0.5, "scope": "tensor"}
    lw.merge(models, out, base=base, method="ties", options=options, dtype="float32")
    name = "model.layers.0.mlp.up_proj.weight"
    ground, *others = (open_checkpoint(one).read(name).double() for one in (base, *models))
    differences = torch.stack(others) - ground
    sizes = differences.abs().flatten(1)
    cuts = sizes.kthvalue(sizes.shape[1] - round(0.5 * sizes.shape[1]) + 1, dim=1).values
    kept = differences * (differences.abs() >= cuts[:, None, None])
    total = kept.sum(dim=0)
    agreed = kept * (kept * torch.where(total >= 0, 1.0, -1.0) > 0)
    update = agreed.sum(dim=0) / (agreed != 0).sum(dim=0).clamp(min=1)
    near = total.abs() < 1e-6 * differences.abs().mean()
    found = open_checkpoint(out).read(name).double() - ground
    return float((found - update)[~near].norm() / update[~near].norm())


if __name__ == "__main__":
    main()
