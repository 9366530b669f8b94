"""Make a random Llama of Llama-3.2-1B's shape, with a vocabulary of 8192: bf16, sharded.

python benchmarks/make_llama_1b.py /tmp/llama-1b
python benchmarks/make_llama_1b.py /tmp/llama-1b-4 --blocks 4
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
BLOCKS_PER_SHARD = 4


def main() -> None:
    """Write the shards one after the other, from a fixed seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, default=16)
    chosen = parser.parse_args()
    out = chosen.out
    out.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    shards = chosen.blocks // BLOCKS_PER_SHARD
    index: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        tensors = {}
        if number == 0:
            tensors |= {
                "model.embed_tokens.weight": _random(8192, 2048, generator),
                "model.norm.weight": torch.ones(2048, dtype=torch.bfloat16),
            }
        for block in range(number * BLOCKS_PER_SHARD, (number + 1) * BLOCKS_PER_SHARD):
            tensors |= _block(f"model.layers.{block}", generator)
        save_file(tensors, out / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    (out / "config.json").write_text(
        json.dumps(CONFIG | {"num_hidden_layers": chosen.blocks}, indent=1)
    )
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    told = {"metadata": {"total_size": size}, "weight_map": index}
    (out / "model.safetensors.index.json").write_text(json.dumps(told, indent=1))


def _block(name: str, generator: torch.Generator) -> dict[str, torch.Tensor]:
    shapes = {
        "self_attn.q_proj": (2048, 2048),
        "self_attn.k_proj": (512, 2048),
        "self_attn.v_proj": (512, 2048),
        "self_attn.o_proj": (2048, 2048),
        "mlp.gate_proj": (8192, 2048),
        "mlp.up_proj": (8192, 2048),
        "mlp.down_proj": (2048, 8192),
    }
    tensors = {
        f"{name}.{layer}.weight": _random(*shape, generator) for layer, shape in shapes.items()
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}.{norm}.weight"] = torch.ones(2048, dtype=torch.bfloat16)
    return tensors


def _random(rows: int, width: int, generator: torch.Generator) -> torch.Tensor:
    return (torch.randn(rows, width, generator=generator) * 0.02).bfloat16()


if __name__ == "__main__":
    main()
