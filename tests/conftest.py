"""Tiny random checkpoints for tests that need files."""

import json
import os
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any, runtime_checkable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

# Tests run side by side on few cores; threads of one would wait for those of another.
torch.set_num_threads(1)

WIDTH, INNER = 32, 64


@pytest.hookimpl(trylast=True)  # the import hook that checks shapes must be there first
def pytest_configure() -> None:
    # beartype refuses a protocol that isinstance cannot check.
    from layerwise.core.progress import Progress

    runtime_checkable(Progress)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("LAYERWISE_ASSETS"):
        missing = pytest.mark.skip(reason="LAYERWISE_ASSETS is not set")
        for item in items:
            if item.get_closest_marker("trained"):
                item.add_marker(missing)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    """Nothing that tests keep is the user's, and nothing of the user's is found by tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAYERWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers whatever ran before it."""
    torch.manual_seed(0)


def llama_config(blocks: int = 2, **changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 256,  # a model of bytes needs no tokenizer
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": blocks,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def llama_tensors(blocks: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def made(rows: int, width: int) -> Tensor:
        drawn = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        return (drawn / width**0.5).to(dtype)

    tensors = {"model.embed_tokens.weight": made(256, WIDTH)}
    for number in range(blocks):
        block = f"model.layers.{number}"
        for name, rows, width in (
            ("self_attn.q_proj", WIDTH, WIDTH),
            ("self_attn.k_proj", WIDTH // 2, WIDTH),
            ("self_attn.v_proj", WIDTH // 2, WIDTH),
            ("self_attn.o_proj", WIDTH, WIDTH),
            ("mlp.gate_proj", INNER, WIDTH),
            ("mlp.up_proj", INNER, WIDTH),
            ("mlp.down_proj", WIDTH, INNER),
        ):
            tensors[f"{block}.{name}.weight"] = made(rows, width)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}.{name}.weight"] = torch.ones(WIDTH, dtype=dtype)
    tensors["model.norm.weight"] = torch.ones(WIDTH, dtype=dtype)
    return tensors


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], shards: int = 1
) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return folder
    names = list(tensors)
    each = -(-len(names) // shards)
    index: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * each : (number + 1) * each]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return folder


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., Path]:
    """Writes a Llama of bytes: `make_llama(folder, blocks=, dtype=, shards=, **config)`."""

    def make(
        folder: Path,
        *,
        blocks: int = 2,
        dtype: torch.dtype = torch.float32,
        shards: int = 1,
        **changes: Any,
    ) -> Path:
        tensors = llama_tensors(blocks, dtype)
        return save_checkpoint(folder, tensors, llama_config(blocks, **changes), shards)

    return make


@pytest.fixture(scope="session")
def llama(make_llama, tmp_path_factory) -> Path:
    """A model directory that no test changes."""
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """About 40 KB of varied text."""
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(97, 123, (40_000,), generator=generator)
    file.write_text("".join(map(chr, letters.tolist())))
    return file
