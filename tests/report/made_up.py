"""A report and a sweep of any size, with every field filled, from no run."""

import math
import random
from dataclasses import replace

from layerwise.core.telling.outcome import (
    Candidate,
    Comparison,
    LayerRow,
    Prediction,
    Proof,
    Report,
    Sweep,
    SweepPoint,
)

SHAPES = {
    "self_attn.q_proj": ("query", 4096, 4096),
    "self_attn.k_proj": ("key", 1024, 4096),
    "self_attn.v_proj": ("value", 1024, 4096),
    "self_attn.o_proj": ("attention output", 4096, 4096),
    "mlp.gate_proj": ("gate", 14336, 4096),
    "mlp.up_proj": ("up", 14336, 4096),
    "mlp.down_proj": ("down", 4096, 14336),
}
ENVIRONMENT = {
    "layerwise": "0.1.0",
    "python": "3.11.2",
    "torch": "2.13.0",
    "platform": "Linux-6.1-x86_64",
    "cpu": "A processor with a name @ 2.60GHz",
    "device": "cpu",
    "threads": "2",
    "date": "2026-11-21 11:47 UTC",
}


def comparison(kl: float, perplexity: float = 8.64, top1: float = 0.931) -> Comparison:
    return Comparison(65_280, perplexity, 8.21, kl, top1, "wikitext-2 test, 256 windows of 256")


def row(block: int, name: str, draw: random.Random, blocks: int) -> LayerRow:
    role, rows, width = SHAPES[name]
    count = rows * width
    weight = (3.0 if role in ("down", "value") else 1.0) * (1 + 4 * math.exp(-block)) / blocks
    options: list[tuple[int, float, int]] = [
        (bits, density, rank)
        for bits in (2, 3, 4, 8)
        for density in (1.0, 0.75, 0.5)
        for rank in (0, 16, 32)
    ]
    chosen = draw.choice([(3, 1.0, 0), (4, 1.0, 0), (4, 0.75, 16), (2, 1.0, 32), (8, 1.0, 0)])
    made = [
        Candidate(
            label=f"{bits} bits, density {density:g}, rank {rank}",
            bits=bits,
            density=density,
            rank=rank,
            bytes=int(count * (bits + 0.25) * density / 8 + rank * (rows + width) * 2),
            error=weight
            * (4.0**-bits + 0.3 * (1 - density) ** 2)
            * (1 - 0.006 * rank)
            * draw.uniform(0.8, 1.25),
            chosen=(bits, density, rank) == chosen,
        )
        for bits, density, rank in options
    ]
    (taken,) = (candidate for candidate in made if candidate.chosen)
    return LayerRow(
        layer=f"model.layers.{block}.{name}",
        rows=rows,
        width=width,
        bytes_before=2 * count,
        bytes_after=taken.bytes,
        bits=taken.bits,
        stored_bits=8 * taken.bytes / count,
        method="sparsegpt + gptq" if taken.density < 1 else "gptq",
        density=taken.density,
        rank=taken.rank,
        error=taken.error**0.5 / 4,
        score=weight,
        why=f"costs {taken.error:.2g} nats at {taken.label}; 8 bits would save little of it",
        notes=("the Gram matrix needed damping 0.02",) if draw.random() < 0.03 else (),
        block=f"model.layers.{block}",
        role=role,
        curve=tuple(made),
        predicted_kl=taken.error,
        measured_kl=taken.error * draw.lognormvariate(0, 0.35),
    )


def report(blocks: int = 43, model: str = "meta-llama/Llama-3.1-8B") -> Report:
    """A run over `7 * blocks` layers: 43 blocks make 301."""
    draw = random.Random(0)
    rows = [row(block, name, draw, blocks) for block in range(blocks) for name in SHAPES]
    after = sum(one.bytes_after for one in rows) + 2_101_346_304
    return Report(
        model=model,
        out="/models/llama-3.1-8b-3.5bits",
        format="compressed-tensors",
        layers=rows,
        left={f"model.layers.{n}.input_layernorm.weight": "a vector (norm)" for n in range(blocks)}
        | {"model.embed_tokens.weight": "embedding", "lm_head.weight": "output head"},
        bytes_before=sum(one.bytes_before for one in rows) + 2_101_346_304,
        bytes_after=after,
        average_bits=sum(one.stored_bits * one.rows * one.width for one in rows)
        / sum(one.rows * one.width for one in rows),
        comparison=comparison(0.0312),
        proof=Proof("transformers LlamaForCausalLM", 3.1e-6, 2.4e-3, 2048),
        seconds=5321.0,
        work_seconds=4980.0,
        cpu_seconds=9000.0,
        peak_bytes=6_120_000_000,
        forecast={"size_bytes": after, "peak_bytes": 5_900_000_000, "seconds": 4400.0},
        notes=["one expert saw no token and was rounded"],
        prediction=Prediction("fisher", 0.0287, 0.0312, 0.914, len(rows)),
        noise_floor=comparison(0.00021, 8.2104, 0.9962),
        environment=ENVIRONMENT,
        recipe={"compress": {"model": model, "budget": "3.5bits", "method": "gptq", "rank": 16}},
    )


def sweep(model: str = "meta-llama/Llama-3.1-8B") -> Sweep:
    """Five methods at four budgets; the joint budget is best, uniform rounding worst."""
    draw = random.Random(1)
    factors = {
        "uniform rtn": 6.0,
        "uniform gptq": 2.4,
        "knapsack gptq": 1.3,
        "awq": 1.9,
        "joint": 0.9,
    }
    points: list[SweepPoint] = []
    for method, factor in factors.items():
        for budget in (2.0, 2.5, 3.0, 4.0):
            kl = factor * 4 ** (1.2 - budget) * draw.uniform(0.92, 1.08)
            size = int(8_000_000_000 * budget / 8) + 2_100_000_000 - draw.randrange(2_000_000)
            points.append(
                SweepPoint(
                    method=method,
                    budget=f"{budget:g}bits",
                    bits=budget - 0.003,
                    bytes=size,
                    kl=kl,
                    perplexity=8.21 * math.exp(kl),
                    top1=1 / (1 + kl**0.7),
                    seconds=draw.uniform(400, 4000),
                    front=False,
                    out=f"{method.replace(' ', '-')}-{budget:g}bits",
                    uniform=method.startswith("uniform"),
                )
            )
    points = [
        replace(p, front=not any(q.bytes <= p.bytes and (q.kl or 0) < (p.kl or 0) for q in points))
        for p in points
    ]
    return Sweep(
        model=model,
        text="wikitext-2 test",
        points=points,
        original=comparison(0.0, 8.21, 1.0),
        noise_floor=comparison(0.00021, 8.2104, 0.9962),
        format="compressed-tensors",
        bytes_before=16_060_000_000,
        seconds=30_000.0,
        environment=ENVIRONMENT,
        recipe={"sweep": {"model": model, "budgets": "2,2.5,3,4bits"}},
    )
