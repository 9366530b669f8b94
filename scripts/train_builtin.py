"""Train the built-in model `builtin:tiny` and its tokenizer from text that every Python carries.

The text is `pydoc_data.topics` and the docstrings of the standard library. It is cut into three
parts by document: one trains the tokenizer and the model, one is for calibration, one is held out.
The model is a small Llama with grouped-query attention, stored in bfloat16.

Everything is written to `<name>.partial` folders that replace the real ones at the end, so a
stopped run leaves the previous model in place. A processor and a Python version give one result:

    OMP_WAIT_POLICY=PASSIVE nice -n 10 python scripts/train_builtin.py

On shared cores the passive policy matters: threads that spin while they wait for one that is not
running can take ten times as long.
"""

import argparse
import ast
import hashlib
import json
import logging
import math
import platform
import random
import shutil
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, cast

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

log = logging.getLogger("train_builtin")

BUILTIN = Path(__file__).resolve().parent.parent / "src" / "layerwise" / "builtin"
END_OF_TEXT = "<|endoftext|>"
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
LARGEST_FOLDER_BYTES = 8_000_000
HELD_OUT_WINDOWS = 128
LOG_EVERY = 250


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result, apart from the text itself.

    Attributes:
        seed: Seed of the split, the initial weights, the batches and the dropout.
        steps: Optimizer steps.
        batch: Windows in a step.
        context: Tokens in a window.
        vocabulary: Tokens the tokenizer knows.
        part_bytes: Size aimed at for the calibration text and for the held-out text.
        peak_rate: Learning rate at the end of the warmup.
        warmup: Share of the steps over which the learning rate rises.
        weight_decay: Decoupled weight decay of the matrices.
        dropout: Dropout of the embedding and of what each sublayer adds to the residual stream.
        gradient_norm: Norm that gradients are clipped to.
    """

    seed: int
    steps: int
    batch: int = 4
    context: int = 256
    vocabulary: int = 2048
    part_bytes: int = 200_000
    peak_rate: float = 3e-3
    warmup: float = 0.04
    weight_decay: float = 0.1
    dropout: float = 0.1
    gradient_norm: float = 1.0


@dataclass(frozen=True)
class Corpus:
    """The documents, by part."""

    train: list[str]
    calibration: list[str]
    heldout: list[str]


def docstrings(source: str) -> Iterator[str]:
    """Yield the docstrings of a Python source, in the order they stand in it."""
    with warnings.catch_warnings():
        # Old modules hold invalid escape sequences; they parse all the same.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    owners = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    # A module has no line of its own and comes first.
    for owner in sorted(owners, key=lambda node: getattr(node, "lineno", 0)):
        text = ast.get_docstring(owner)
        if text:
            yield text


def documents() -> dict[str, str]:
    """Return the raw documents by name: every help topic and every module's docstrings."""
    found = {f"topic {name}": text for name, text in topics.items()}
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.intersection(relative.parts):
            continue
        text = "\n\n".join(docstrings(path.read_text(encoding="utf-8")))
        if text:
            found[f"module {relative.as_posix()}"] = text
    return dict(sorted(found.items()))


def without_repeats(raw: Iterable[str]) -> Iterator[str]:
    """Yield the documents without any paragraph that stood in an earlier place.

    Help topics quote each other and classes repeat the docstrings of their bases. A paragraph that
    stood both in the training text and in the held-out text would make the perplexity too low.
    """
    seen: set[str] = set()
    for document in raw:
        kept: list[str] = []
        for paragraph in document.expandtabs().replace("\r\n", "\n").split("\n\n"):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                kept.append("\n".join(line.rstrip() for line in paragraph.strip("\n").split("\n")))
        if kept:
            yield "\n\n".join(kept)


def split(whole: list[str], recipe: Recipe) -> Corpus:
    """Deal the documents out to the three parts after a shuffle."""
    shuffled = list(whole)
    random.Random(recipe.seed).shuffle(shuffled)
    parts: dict[str, list[str]] = {"calibration": [], "heldout": [], "train": []}
    sizes = dict.fromkeys(parts, 0)
    for document in shuffled:
        size = len(document.encode())
        # One long module must not make up most of a small part.
        fits = [
            name
            for name in ("calibration", "heldout")
            if sizes[name] + size <= recipe.part_bytes and size <= recipe.part_bytes // 5
        ]
        name = min(fits, key=lambda part: sizes[part]) if fits else "train"
        parts[name].append(document)
        sizes[name] += size
    return Corpus(**parts)


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that adds no token of its own accord."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, and nothing else."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def new_model(recipe: Recipe, end_of_text: int) -> LlamaForCausalLM:
    """Return the untrained model."""
    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        # 1 / sqrt(192): every linear layer keeps the scale of its input.
        initializer_range=0.07,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return LlamaForCausalLM(config)


def add_dropout(model: LlamaForCausalLM, probability: float) -> None:
    """Drop entries of the embedding and of each sublayer's output while the model trains.

    Llama has no such dropout. As hooks it leaves no trace in the stored model.
    """

    def drop(module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return functional.dropout(output, probability, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)


def next_token_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of every token of a window but its first."""
    logits = model(input_ids=windows, use_cache=False).logits[:, :-1]  # (windows, context-1, vocab)
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def heldout_loss(model: LlamaForCausalLM, windows: Tensor) -> float:
    """Return the mean loss over windows of equal length, with dropout off."""
    was_training = model.training
    model.train(False)
    parts = [windows[start : start + 16] for start in range(0, len(windows), 16)]
    total = sum(float(next_token_loss(model, part)) * len(part) for part in parts)
    model.train(was_training)
    return total / len(windows)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate at a step: a linear rise, then half a cosine down to zero."""
    rising = max(1, round(recipe.warmup * recipe.steps))
    if step < rising:
        return recipe.peak_rate * (step + 1) / rising
    done = (step - rising) / max(1, recipe.steps - rising)
    return recipe.peak_rate * 0.5 * (1 + math.cos(math.pi * done))


def new_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW, with weight decay on matrices and none on the norms."""
    weights = list(model.parameters())
    return torch.optim.AdamW(
        [
            {"params": [w for w in weights if w.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
        ],
        lr=recipe.peak_rate,
        betas=(0.9, 0.99),
        fused=True,
    )


def train(
    model: LlamaForCausalLM, tokens: Tensor, heldout: Tensor, recipe: Recipe, log_file: Path
) -> None:
    """Train in place, and log a line of JSON every few steps.

    Args:
        model: What to train.
        tokens: The training text, of shape (length,).
        heldout: Held-out windows, of shape (windows, context); they are only measured.
        recipe: The schedule.
        log_file: Where the lines go.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    optimizer = new_optimizer(model, recipe)
    places = torch.arange(recipe.context)
    started = time.monotonic()
    running: list[float] = []
    model.train()
    with log_file.open("w", encoding="utf-8") as lines:
        for step in range(1, recipe.steps + 1):
            rate = learning_rate(step - 1, recipe)
            for group in optimizer.param_groups:
                group["lr"] = rate
            last = len(tokens) - recipe.context + 1
            starts = torch.randint(last, (recipe.batch, 1), generator=generator)
            loss = next_token_loss(model, tokens[starts + places])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
            optimizer.step()
            running.append(loss.item())
            if step % LOG_EVERY == 0 or step == recipe.steps:
                line = json.dumps(
                    {
                        "step": step,
                        "loss": round(sum(running) / len(running), 4),
                        "heldout_loss": round(heldout_loss(model, heldout), 4),
                        "learning_rate": round(rate, 8),
                        "seconds": round(time.monotonic() - started, 1),
                    }
                )
                running.clear()
                lines.write(line + "\n")
                lines.flush()
                log.info(line)
    model.train(False)


def round_to_nearest(weight: Tensor, bits: int = 3, group: int = 32) -> Tensor:
    """Round a weight to symmetric codes that share a scale along the inputs.

        scale = max|w| / ((2^bits - 1) / 2)
        zero  = 2^(bits - 1)
        code  = clamp(round(w / scale) + zero, 0, 2^bits - 1)

    Args:
        weight: Float weight of shape (out, in).
        bits: Width of a code.
        group: Inputs that share a scale.

    Returns:
        The decoded weight.
    """
    top, zero = 2**bits - 1, 2 ** (bits - 1)
    grouped = weight.reshape(weight.shape[0], -1, group)  # (out, groups, group)
    scale = grouped.abs().amax(-1, keepdim=True) / (top / 2)
    # A group of zeros has no scale; any scale decodes it to zeros.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (grouped / scale).round().add(zero).clamp(0, top)
    decoded: Tensor = (codes - zero) * scale  # (out, groups, group)
    return decoded.reshape(weight.shape)


def prune_by_magnitude(weight: Tensor, sparsity: float = 0.6) -> Tensor:
    """Zero the given share of a weight's entries, the smallest in magnitude."""
    order = weight.abs().flatten().argsort(stable=True)
    pruned = weight.flatten().clone()
    pruned[order[: int(sparsity * weight.numel())]] = 0.0
    return pruned.reshape(weight.shape)


def perplexity_of_stored(
    folder: Path, heldout: Tensor, change: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Return the held-out perplexity of the stored model, computed in float32.

    Args:
        folder: The stored model.
        heldout: Tokens of shape (windows, context).
        change: Applied to the weight of every linear layer of every block.
    """
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if change is not None:
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = change(module.weight.data)
    return math.exp(heldout_loss(model, heldout))


def text_facts(texts: list[str], tokenizer: Any) -> dict[str, Any]:
    """Return the size and the digest of one part of the text, as it is stored."""
    stored = "\n\n".join(texts) + "\n"
    return {
        "documents": len(texts),
        "bytes": len(stored.encode()),
        "tokens": len(encode(tokenizer, stored)),
        "sha256": hashlib.sha256(stored.encode()).hexdigest(),
    }


def readme(facts: dict[str, Any]) -> str:
    """Return the page about the model, with its figures."""
    shape, figures = facts["model"], facts["heldout_perplexity"]
    rows = "\n".join(
        f"| {name} | {part['documents']} | {part['bytes']:,} | {part['tokens']:,} |"
        for name, part in facts["text"].items()
    )
    return f"""# builtin:tiny

A small Llama with grouped-query attention and its tokenizer, so that every command can be tried
without a download. This page is written by `scripts/train_builtin.py`; its figures come from
`tiny/TRAINING.json`.

## The model

{shape["parameters"]:,} parameters in bfloat16: {shape["blocks"]} blocks of width {shape["width"]},
{shape["heads"]} query heads that share {shape["key_value_heads"]} key-value heads, an MLP of width
{shape["mlp_width"]}, a vocabulary of {facts["recipe"]["vocabulary"]:,} tied to the output, and a
context of {facts["recipe"]["context"]} tokens. Every linear layer has an input width divisible
by 64. The tokenizer is a byte-level BPE; it adds no token at either end. `{END_OF_TEXT}` stood
between documents in training.

## What compression does to it

Perplexity on the first {figures["windows"]} windows of {facts["recipe"]["context"]} tokens of the
held-out text, computed in float32 from the stored weights. Each window is on its own, and every
token but its first is predicted.

| linear layers of the blocks | perplexity |
|---|---|
| as stored | {figures["stored"]:.2f} |
| rounded to 3 bits, symmetric, groups of 32 | {figures["rtn_3bit_group32"]:.2f} |
| 60% pruned by magnitude in each layer | {figures["magnitude_60"]:.2f} |

## The text

`pydoc_data.topics` and the docstrings of the standard library of Python {facts["python"]}, without
tests; no paragraph stands in it twice. Documents (a help topic, or a module's docstrings) were
shuffled and dealt out whole, so no document is in two parts. The text is part of Python and under
the PSF licence.

| part | documents | bytes | tokens |
|---|---|---|---|
{rows}

## How it was made

    {facts["command"]}

{facts["recipe"]["steps"]:,} steps of {facts["recipe"]["batch"]} windows, {facts["tokens_seen"]:,}
tokens in all or {facts["passes"]:.1f} passes over the training text, from seed
{facts["recipe"]["seed"]}, in {facts["seconds"] / 60:.0f} minutes on {facts["threads"]} threads.
The log is `tiny/training_log.jsonl`. The last step is what is stored: the held-out text chose no
checkpoint. Another Python version has other docstrings and so gives another model.
"""


def put_in_place(builtin: Path, staging: Path) -> None:
    """Move the finished folders and the page from the staging folder to where they belong."""
    old = builtin / "replaced.partial"
    shutil.rmtree(old, ignore_errors=True)
    old.mkdir()
    for file in staging.rglob("*.safetensors"):
        # It is written readable by its owner alone, and would be installed so.
        file.chmod(0o644)
    for finished in sorted(staging.iterdir()):
        target = builtin / finished.name
        if target.is_dir():
            target.rename(old / target.name)
        finished.replace(target)
    staging.rmdir()
    shutil.rmtree(old)


def write_tokenizer(texts: list[str], recipe: Recipe, folder: Path) -> Any:
    """Train and store the tokenizer, and return it as a user would load it."""
    trained = train_tokenizer(texts, recipe.vocabulary)
    trained.save_pretrained(folder)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    config_file = folder / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config.pop("backend", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    loaded = AutoTokenizer.from_pretrained(folder)
    sample = texts[0][:5000]
    assert encode(loaded, sample) == loaded(sample)["input_ids"], "the tokenizer adds tokens"
    assert encode(loaded, sample) == encode(trained, sample), "the tokenizer loads as another"
    assert loaded.decode(encode(loaded, sample)) == sample, "the tokenizer loses text"
    return loaded


def build(recipe: Recipe, builtin: Path, threads: int) -> None:
    """Run everything from the text to the finished folders."""
    started = time.monotonic()
    staging = builtin / "new.partial"
    shutil.rmtree(staging, ignore_errors=True)
    folder, text_folder = staging / "tiny", staging / "text"
    folder.mkdir(parents=True)
    text_folder.mkdir()

    corpus = split(list(without_repeats(documents().values())), recipe)
    for name in ("calibration", "heldout"):
        stored = "\n\n".join(getattr(corpus, name)) + "\n"
        (text_folder / f"{name}.txt").write_text(stored, encoding="utf-8", newline="\n")
    tokenizer = write_tokenizer(corpus.train, recipe, folder)
    text = {name: text_facts(part, tokenizer) for name, part in vars(corpus).items()}
    log.info("text %s", json.dumps(text))

    end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    stream = [token for document in corpus.train for token in (*encode(tokenizer, document), end)]
    ids = encode(tokenizer, (text_folder / "heldout.txt").read_text(encoding="utf-8"))
    windows = min(HELD_OUT_WINDOWS, len(ids) // recipe.context)
    heldout = torch.tensor(ids[: windows * recipe.context]).reshape(windows, recipe.context)

    torch.manual_seed(recipe.seed)
    model = new_model(recipe, end)
    add_dropout(model, recipe.dropout)
    train(model, torch.tensor(stream), heldout, recipe, folder / "training_log.jsonl")
    cast(nn.Module, model).to(torch.bfloat16)
    model.save_pretrained(folder)

    config = model.config
    tokens_seen = recipe.steps * recipe.batch * recipe.context
    facts: dict[str, Any] = {
        "seed": recipe.seed,
        "steps": recipe.steps,
        "tokens_seen": tokens_seen,
        "passes": round(tokens_seen / len(stream), 2),
        "seconds": round(time.monotonic() - started),
        "threads": threads,
        "python": platform.python_version(),
        "packages": {
            module.__name__: module.__version__ for module in (tokenizers, torch, transformers)
        },
        "command": (
            f"python scripts/train_builtin.py --steps {recipe.steps} --seed {recipe.seed}"
            f" --threads {threads}"
        ),
        "model": {
            "parameters": sum(weight.numel() for weight in model.parameters()),
            "dtype": "bfloat16",
            "blocks": config.num_hidden_layers,
            "width": config.hidden_size,
            "heads": config.num_attention_heads,
            "key_value_heads": config.num_key_value_heads,
            "mlp_width": config.intermediate_size,
        },
        "heldout_perplexity": {
            "windows": windows,
            "stored": perplexity_of_stored(folder, heldout),
            "rtn_3bit_group32": perplexity_of_stored(folder, heldout, round_to_nearest),
            "magnitude_60": perplexity_of_stored(folder, heldout, prune_by_magnitude),
        },
        "text": text,
        "recipe": asdict(recipe),
    }
    (folder / "TRAINING.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (staging / "README.md").write_text(readme(facts), encoding="utf-8")
    size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    assert size <= LARGEST_FOLDER_BYTES, f"{size} bytes is too much to ship in the package"
    put_in_place(builtin, staging)
    log.info("%s", json.dumps(facts["heldout_perplexity"]))


def main() -> None:
    """Read the options and train."""
    parser = argparse.ArgumentParser(description="Train the built-in model builtin:tiny.")
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    parser.add_argument(
        "--out", type=Path, default=BUILTIN, help="folder that gets tiny/ and text/"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(options.threads)
    build(Recipe(seed=options.seed, steps=options.steps), options.out, options.threads)


if __name__ == "__main__":
    main()
