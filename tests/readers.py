"""Everything that reads a file which may come from anywhere, as functions of that file's bytes.

`scripts/fuzz.py` and the tests give them damaged files.  They may refuse one as a mistake of the
user's, and may do nothing else but read it.
"""

import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save

from layerwise.cli.commands import _recipe
from layerwise.core.merging.blend import read_blend
from layerwise.core.merging.signatures import Signature, read_signature
from layerwise.core.plan import read_plan
from layerwise.core.reading.checkpoint import INDEX, WEIGHTS, open_checkpoint
from layerwise.core.reading.labelled import labelled_texts
from layerwise.core.reading.structure import structure
from layerwise.flow.mergekit import translate
from layerwise.flow.merging import Wanted
from layerwise.flow.reporting import read_outcome

LAYER = "model.layers.0.mlp.up_proj"
TENSORS = {f"{LAYER}.weight": torch.ones(4, 2), "bias": torch.zeros(3, dtype=torch.bfloat16)}
SHARD = save(TENSORS)
# No file of these is larger, so that reading more than this of one is an allocation of its wish.
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Reader:
    """A reader, the files it usually gets, and whether these begin with a safetensors header.

    HERE in a file stands for the folder that it lies in.
    """

    read: Callable[[Path], object]
    name: str
    seeds: tuple[bytes, ...]
    beside: Mapping[str, bytes]
    headed: bool = False

    def __call__(self, content: bytes, folder: Path) -> None:
        """Read a file of this content, in a folder of its own."""
        for name, other in self.beside.items():
            (folder / name).write_bytes(other)
        (folder / self.name).write_bytes(content.replace(b"HERE", bytes(folder)))
        self.read(folder / self.name)


def _checkpoint(file: Path) -> None:
    opened = open_checkpoint(file if file.suffix == ".safetensors" else file.parent)
    outside = [one for one in opened.files.values() if one.parent != file.parent]
    assert not outside, f"{outside} are outside the directory"
    assert sum(info.size for info in opened.tensors.values()) <= MOST_BYTES
    structure(opened)
    for name, info in opened.tensors.items():
        found = opened.read(name)
        assert tuple(found.shape) == info.shape
        assert found.dtype == info.dtype


def _plan(file: Path) -> None:
    read_plan(file, structure(open_checkpoint(file.parent / WEIGHTS)))


def _mergekit(file: Path) -> None:
    translate(file, Wanted())


def _yaml(content: object) -> bytes:
    return yaml.safe_dump(content, sort_keys=False).encode()


def _signature() -> bytes:
    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path("/tmp")
    file = folder / "layerwise-signature-seed.safetensors"
    file.unlink(missing_ok=True)
    Signature("seed", {"bias": torch.arange(3.0)}, {"bias": 0.5}).rounded(4).save(file)
    content = file.read_bytes()
    file.unlink()
    return content


_INDEX = json.dumps({"metadata": {"total_size": 38}, "weight_map": dict.fromkeys(TENSORS, WEIGHTS)})
_CONFIG = json.dumps({
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2,
    "num_hidden_layers": 1, "tie_word_embeddings": True, "quantization_config": None,
})  # fmt: skip
_PLAN = {
    "model": "m", "format": "dense", "budget": "3bits", "inputs": "original", "tune": ["bias"],
    "options": {"quantize/gptq": {"damping": 0.01}},
    "layers": {"model.layers.*": {"bits": 4, "group": 2, "method": "gptq", "density": 0.5}},
}  # fmt: skip
_BLEND = {
    "method": "ties", "models": ["a", "b"], "base": "z", "dtype": "float32",
    "tensors": {"*": {"weights": [1, [0, 0.5]], "density": 0.2}},
}  # fmt: skip
_MERGEKIT = {
    "merge_method": "ties", "base_model": "HERE", "dtype": "float32",
    "parameters": {"density": [{"filter": "mlp", "value": 0.5}, {"value": 1}]},
    "models": [{"model": "HERE/model.safetensors", "parameters": {"weight": [0, 0.5, 1]}}],
}  # fmt: skip
_SLICES = {
    "merge_method": "passthrough",
    "slices": [{"sources": [{"model": "HERE", "layer_range": [0, 1]}]}],
}
_RECIPE = {"compress": {"model": "m", "out": "o", "bits": 4, "allow": {"bits": [2, None]}}}
_SWEEP = {
    "model": "m", "text": "t", "original": None, "noise_floor": None, "format": "dense",
    "bytes_before": 1, "seconds": 1.0, "notes": [], "environment": {}, "recipe": {},
    "points": [{
        "method": "rtn", "budget": "3bits", "bits": 3.0, "bytes": 9, "kl": 0.1, "perplexity": 2.0,
        "top1": 0.5, "seconds": 1.0, "front": True, "out": "p", "uniform": False,
    }],
}  # fmt: skip
_LABELS = (
    b"good\t1\nbad\t0\n",
    b'{"text": "good", "label": 1}\n',
    b'[{"text": "a", "label": "b"}]',
)

READERS: Mapping[str, Reader] = {
    "shard": Reader(_checkpoint, "model.safetensors", (SHARD,), {}, headed=True),
    "index": Reader(_checkpoint, INDEX, (_INDEX.encode(),), {WEIGHTS: SHARD}),
    "config": Reader(_checkpoint, "config.json", (_CONFIG.encode(),), {WEIGHTS: SHARD}),
    "plan": Reader(_plan, "plan.yaml", (_yaml(_PLAN),), {WEIGHTS: SHARD}),
    "blend": Reader(read_blend, "merge.yaml", (_yaml(_BLEND),), {}),
    "mergekit": Reader(
        _mergekit,
        "recipe.yml",
        (_yaml(_MERGEKIT), _yaml(_SLICES)),
        {WEIGHTS: SHARD, "config.json": _CONFIG.encode()},
    ),
    "recipe": Reader(_recipe, "recipe.yaml", (_yaml(_RECIPE),), {}),
    "outcome": Reader(read_outcome, "sweep.json", (json.dumps(_SWEEP).encode(),), {}),
    "labels": Reader(labelled_texts, "labels.tsv", _LABELS, {}),
    "signature": Reader(read_signature, "s.safetensors", (_signature(),), {}, headed=True),
}

# What readers go by, and what they may not expect.
WORDS = (
    *(b"../", b"/etc/passwd", b"\x00", b"\xff\xfe", b"null", b"true", b"NaN", b"-1", b"1e999"),
    *(b"[]", b"{}", b'""', b"[[", b"{{", b"&a ", b"*a", b"<<: ", b"---\n", b"!!set "),
    *(b"!!python/object:os.system ", b"2001-99-99", b"9223372036854775808", b"4294967296", b"0"),
    *(b"0.5", b"'", b'"', b":", b",", b"\n", b"  ", b"- ", b"F32", b"BF16", b"I64", b"shape"),
    *(b"data_offsets", b"dtype", b"weight_map", b"quantization_config", b"model_type", b"layers"),
    *(b"tensors", b"models", b"bits", b"group", b"*", b"?", b"[a-", b"x" * 300, b"[" * 2000),
    b'{"a":' * 2000,
)


def mutated(content: bytes, chance: random.Random, headed: bool) -> bytes:
    """A file with some damage; mostly in its header, where it has one."""
    if headed and chance.random() < 0.8:
        header, rest = header_of(content)
        return with_header(_damaged(header, chance), rest)
    return _damaged(content, chance)


def _damaged(content: bytes, chance: random.Random) -> bytes:
    made = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 3, 8))):
        at = chance.randrange(len(made) + 1)
        end = min(len(made), at + chance.choice((1, 2, 4, 16, 64)))
        match chance.randrange(6):
            case 0 if at < len(made):
                made[at] ^= 1 << chance.randrange(8)
            case 1:
                del made[at:end]
            case 2:
                made[at:at] = made[at:end] * chance.choice((1, 2, 50))
            case 3:
                made[at:end] = chance.choice(WORDS)
            case 4:
                made[at:at] = chance.choice(WORDS)
            case _:
                other = chance.randrange(len(made) + 1)
                made[at:end] = made[other : other + end - at]
    return bytes(made)


def header_of(content: bytes) -> tuple[bytes, bytes]:
    """The header and what follows it, of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + size], content[8 + size :]


def with_header(header: bytes, rest: bytes) -> bytes:
    """A safetensors file that says rightly how long its header is."""
    return struct.pack("<Q", len(header)) + header + rest
