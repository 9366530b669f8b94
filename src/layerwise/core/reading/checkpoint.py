"""Trained weights by name: a checkpoint on disk, or a module in memory, read a slice at a time."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.written import fits, parse_json

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
STEM = "model"
WEIGHTS = f"{STEM}.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
INDEX = f"{STEM}{INDEX_SUFFIX}"
GGUF = f"{STEM}.gguf"
# Weights first: training leaves other pickles beside them.
_PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What a model directory holds beside its weights that goes with a new version of them:
# configuration, tokenizer, generation, templates, licences; and what does not.
_COMPANIONS = (
    *("*.json", "*.jsonl", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.py", "*.md"),
    *("LICENSE*", "NOTICE*"),
)
_LEFT_BEHIND = "*.index.json"
_OURS = frozenset({"report.json", "report.html", "recipe.yaml", "plan.yaml"})


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a tensor before it is read; `size` is in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """Number of entries."""
        return int(torch.Size(self.shape).numel())

    @property
    def size(self) -> int:
        """Bytes stored."""
        return self.count * self.dtype.itemsize


@runtime_checkable
class Source(Protocol):
    """Named tensors that can be read again and again, and what describes the model."""

    @property
    def label(self) -> str:
        """How messages call it: a path, or the class of a module."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the order the output lists them."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's `config.json`; empty when there is none."""
        ...

    @property
    def companions(self) -> tuple[Path, ...]:
        """Files to carry over beside the weights: configuration, tokenizer, generation."""
        ...

    @property
    def size(self) -> int:
        """Bytes of the weight files."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or rows `start` to `stop` of it, as a copy of its own."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """Safetensors files on disk, called as the user did.  `open_checkpoint` makes and checks it."""

    label: str
    path: Path
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, Path]  # by tensor; a file whose tensors are not listed, by its own name
    config: Mapping[str, Any]
    companions: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.stat().st_size for file in set(self.files.values()))

    @property
    def folder(self) -> Path:
        """The directory that a loader of models takes.

        Raises:
            UserError: This is a file that no such loader would find.
        """
        if self.config and (self.path.is_dir() or self.path.name == WEIGHTS):
            return self.path if self.path.is_dir() else self.path.parent
        raise UserError(
            f"{self.path} cannot be loaded as a model: that takes a directory with a config.json "
            f"and {WEIGHTS}.",
            "Give the model's directory.",
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or rows `start` to `stop` of it.

        The file is opened anew for each call: pages of a mapping that stays open would count
        as this process's memory until the end.
        """
        with safe_open(self.files[name], framework="pt") as file:
            if not self.tensors[name].shape:
                return file.get_tensor(name).clone()
            return file.get_slice(name)[start:stop].clone()


@dataclass(frozen=True)
class ModuleSource:
    """The state dict of a module in memory."""

    module: nn.Module
    state: Mapping[str, Tensor]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, Any]

    @property
    def label(self) -> str:
        """The module's class."""
        return type(self.module).__name__

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(info.size for info in self.tensors.values())

    @property
    def companions(self) -> tuple[Path, ...]:
        """Nothing lies beside a module."""
        return ()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or rows `start` to `stop` of it."""
        tensor = self.state[name].detach()
        return (tensor[start:stop] if tensor.dim() else tensor).cpu().clone().contiguous()


def open_source(model: str | Path | nn.Module) -> Source:
    """Open a checkpoint by path, hub id or `builtin:tiny`, or a module in memory.

    Raises:
        UserError: There is nothing there that can be read safely; the message says what.
    """
    return module_source(model) if isinstance(model, nn.Module) else open_checkpoint(model)


def module_source(module: nn.Module) -> ModuleSource:
    """A module in memory; tied parameters are listed once, under their first name."""
    seen: set[int] = set()
    tensors: dict[str, TensorInfo] = {}
    state = module.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = TensorInfo(name, tensor.dtype, tuple(tensor.shape))
    config: Any = getattr(module, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    return ModuleSource(module, state, MappingProxyType(tensors), MappingProxyType(described))


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Open safetensors files without reading any weight, and check that all of them are there.

    Args:
        model: A model directory, one safetensors file, `builtin:tiny`, or a hub id.

    Raises:
        UserError: No safetensors, a pickle, a truncated shard, an index that names a tensor
            or a file which is not there, a tensor in two files.
    """
    path = _locate(str(model))
    if path.is_dir() and (packed := _gguf(str(model), path)):
        return packed
    if path.is_file():
        if path.suffix == ".gguf":
            raise _only_gguf(path)
        if path.suffix != ".safetensors":
            raise _not_safetensors([path])
        # Beside a config.json it is the weights of that model; elsewhere it is on its own.
        shards, folder = [path], path.parent if (path.parent / "config.json").exists() else None
    else:
        shards, folder = _shards(path), path
    tensors: dict[str, TensorInfo] = {}
    files: dict[str, Path] = {}
    for shard in shards:
        for info in _header(shard):
            if info.name in files:
                raise UserError(
                    f"both {files[info.name]} and {shard} hold the tensor {info.name}.",
                    "Give the one that you mean, or remove the other.",
                )
            tensors[info.name], files[info.name] = info, shard
    if path.is_dir():
        _check_index(path, files)
    config = _config(folder / "config.json") if folder else {}
    companions = _companions(folder) if folder else ()
    return Checkpoint(
        str(model),
        path,
        MappingProxyType(tensors),
        MappingProxyType(files),
        config,
        companions,
    )


def _locate(model: str) -> Path:
    if model.startswith("builtin:"):
        from layerwise import builtin

        if model != builtin.NAME:
            raise UserError(f"there is no model {model}.", f"The built-in model is {builtin.NAME}.")
        return builtin.model_path()
    path = Path(model).expanduser()
    if os.path.exists(path):  # false, and no error, where a name is too long for a file
        return path
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(
            f"{model} does not exist.",
            "Give a model directory, a safetensors file, a hub id (owner/name) or builtin:tiny.",
        )
    return _download(model)


def _download(model: str) -> Path:
    hub = need("huggingface_hub", f"{model} is not a local path, and loading from the hub")
    try:
        # No pickles; code that comes along is not run unless the user trusts it.
        kept = ["*.safetensors", *_COMPANIONS]
        return Path(hub.snapshot_download(model, allow_patterns=kept))
    except Exception as error:
        raise UserError(
            f"{model} is not a local path, and the hub could not supply it: {error}",
            "Check the name and the network, or download it and give the directory.",
        ) from error


def _not_safetensors(files: Sequence[Path]) -> UserError:
    first = files[0]
    if not any(first.match(pattern) for pattern in _PICKLES):
        return UserError(
            f"{first} is not a safetensors file.",
            "Give a model directory or a .safetensors file.",
        )
    # Tensors that share memory, as tied weights do, must be copied apart to be saved.
    return UserError(
        f"{first} is not a safetensors file; a pickle can run any code when it is opened.",
        'If you trust it, convert it: python -c "import torch, safetensors.torch as s; '
        "[s.save_file({k: v.contiguous().clone() for k, v in "
        "torch.load(f, weights_only=True).items()}, f.rpartition('.')[0] + '.safetensors') "
        f'for f in {[str(file) for file in files]}]"',
    )


def _gguf(label: str, folder: Path) -> Checkpoint | None:
    """A directory that `--format gguf` made: its tensors are not listed, only its file is."""
    config = _config(folder / "config.json")
    packed = config.get("quantization_config")
    if not isinstance(packed, dict) or packed.get("quant_method") != "gguf":
        if (files := sorted(folder.glob("*.gguf"))) and not any(folder.glob("*.safetensors")):
            raise _only_gguf(files[0])
        return None
    if not (folder / GGUF).exists():
        raise UserError(f"{folder} lacks its {GGUF}.", "Copy that file again.")
    held = MappingProxyType({GGUF: folder / GGUF})
    return Checkpoint(label, folder, MappingProxyType({}), held, config, _companions(folder))


def _only_gguf(file: Path) -> UserError:
    return UserError(
        f"{file} is not a safetensors file but a GGUF file, with weights in llama.cpp's own types.",
        "Give the model directory that it was made from; `layerwise evaluate` reads directories "
        "that --format gguf made.",
    )


def _config(file: Path) -> Mapping[str, Any]:
    if not file.exists():
        return {}
    try:
        content: Any = parse_json(file.read_text())
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}", "Download it again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} does not describe a model.", "Download it again.")
    return content


def _shards(folder: Path) -> list[Path]:
    if index := _index(folder):
        names = sorted(set(_weight_map(index).values()))
        for name in names:
            if not os.path.isfile(folder / name):  # as above
                raise UserError(
                    f"{index} names the file {name}, which is not there.",
                    "Download or copy that shard again.",
                )
        return [folder / name for name in names]
    if (folder / WEIGHTS).exists():  # others beside it hold the same in another layout
        return [folder / WEIGHTS]
    if shards := sorted(folder.glob("*.safetensors")):
        return shards
    for pattern in _PICKLES:
        if pickles := sorted(folder.glob(pattern)):
            raise _not_safetensors(pickles)
    raise UserError(
        f"{folder} holds no .safetensors file.",
        "Give the directory that holds the weights; `model.save_pretrained(dir)` writes one.",
    )


def _index(folder: Path) -> Path | None:
    """The file that says which shard holds a tensor; the usual one, where there are several."""
    found = sorted(folder.glob(f"*{INDEX_SUFFIX}"), key=lambda file: (file.name != INDEX, file))
    return found[0] if found else None


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found = parse_json(index.read_text())["weight_map"]
        if not fits(found, Mapping[str, str]):
            raise ValueError("weight_map is no mapping of tensors to files")
        if outside := [name for name in found.values() if Path(name).name != name]:
            raise ValueError(f"{outside[0]} is no name of a file beside it")
        return dict(found)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is not a shard index: {error!r}", "Download it again.") from error


def _check_index(folder: Path, files: Mapping[str, Path]) -> None:
    index = _index(folder)
    if index is None:
        return
    for tensor, shard in _weight_map(index).items():
        if files.get(tensor) != folder / shard:
            raise UserError(
                f"{index} says that {shard} holds the tensor {tensor}, but it does not.",
                "The index and the shards are from different saves: download both again.",
            )


def _header(shard: Path) -> list[TensorInfo]:
    found: list[TensorInfo] = []
    try:
        with safe_open(shard, framework="pt") as file:
            for name in file.offset_keys():
                view = file.get_slice(name)
                shape = tuple(int(n) for n in view.get_shape())
                if view.get_dtype() not in DTYPES:
                    raise UserError(
                        f"{shard}: tensor {name} has the type {view.get_dtype()}.",
                        f"layerwise reads {', '.join(DTYPES)}.",
                    )
                found.append(TensorInfo(name, DTYPES[view.get_dtype()], shape))
    except (SafetensorError, OSError) as error:
        if shard.exists() and not os.access(shard, os.R_OK):
            raise UserError(f"{shard} may not be read.", "Change its permissions.") from error
        raise UserError(
            f"{shard} is damaged or cut short: {error}", "Download or copy that file again."
        ) from error
    return found


def _companions(folder: Path) -> tuple[Path, ...]:
    return tuple(
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and any(file.match(pattern) for pattern in _COMPANIONS)
        and not file.match(_LEFT_BEHIND)
        and file.name not in _OURS
    )
