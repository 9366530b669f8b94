"""Tiny random models, one per architecture, saved as transformers saves them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

VOCAB = 64

_TEXT: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_SHARED_HEADS = {"num_key_value_heads": 2}
_GEMMA = {**_SHARED_HEADS, "head_dim": 8}
_EXPERTS = {**_SHARED_HEADS, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# What each `model_type` needs beside `_TEXT`.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "llama": _SHARED_HEADS,
    "mistral": {**_SHARED_HEADS, "sliding_window": 8},
    "qwen2": _SHARED_HEADS,
    "qwen3": {**_SHARED_HEADS, "head_dim": 8},
    "smollm3": _SHARED_HEADS,
    "gemma": _GEMMA,
    "gemma2": {**_GEMMA, "sliding_window": 8},
    "gemma3_text": {
        **_GEMMA,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": _SHARED_HEADS,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {"rotary_pct": 0.5},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bert": {},
    "roberta": {},
    "vit": {"image_size": 8, "patch_size": 4},
    "mixtral": {**_SHARED_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "head_dim": 8},
}
_CLASSES = {
    "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "vit": "ViTForImageClassification",
}


def built(model_type: str, **settings: Any) -> nn.Module:
    """A model whose every tensor matters to its output: no norm is 1, no bias is 0."""
    given = {**_TEXT, **SETTINGS[model_type], **settings}
    config = transformers.AutoConfig.for_model(model_type, **given)
    # Experts are multiplied one after the other, as the definition says.
    config._experts_implementation = "eager"
    name = _CLASSES.get(model_type)
    make = getattr(transformers, name) if name else transformers.AutoModelForCausalLM.from_config
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(config).float()
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.data.add_(spread * torch.randn_like(parameter))
    return model.eval()


def make(model_type: str, folder: Path, **settings: Any) -> nn.Module:
    """Save a tiny random model of a kind as transformers does, and return it."""
    model = built(model_type, **settings)
    model.save_pretrained(folder)
    return model


def make_stacked(model_type: str, folder: Path) -> nn.Module:
    """Save a mixture of experts with all experts of a block in one 3-D tensor."""
    model = make(model_type, folder)
    tensors = {name: value.clone().contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return model


def inputs(model_type: str) -> torch.Tensor:
    """Three windows of 16 tokens; for a vision model, three pictures."""
    generator = torch.Generator().manual_seed(1)
    if model_type == "vit":
        return torch.randn(3, 3, 8, 8, generator=generator)
    return torch.randint(3, VOCAB, (3, 16), generator=generator)


class Convolutional(nn.Module):
    """A small picture classifier with strides, "same" padding, dilation and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, (3, 5), padding="same", dilation=(2, 1))
        self.conv3 = nn.Conv2d(12, 6, 1, bias=False)
        self.fc = nn.Linear(6, 5)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        hidden = self.bn1(self.conv1(pictures)).relu()
        hidden = self.conv3(self.conv2(hidden).relu()).relu()
        return self.fc(hidden.mean(dim=(2, 3)))


def convolutional() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Convolutional()
        model(torch.randn(16, 3, 8, 8))  # running statistics of the batch norm
    return model.eval()
