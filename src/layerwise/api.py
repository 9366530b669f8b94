"""The library: what the command line does, in as few lines of Python."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.core import cache as caches
from layerwise.core import catalogue
from layerwise.core.checkpoint import Source, open_checkpoint, open_source
from layerwise.core.economy import memory_limit
from layerwise.core.errors import UserError
from layerwise.core.forecast import Forecast
from layerwise.core.outcome import ByteVote, Evaluation, Report, Sweep
from layerwise.core.plan import Plan
from layerwise.core.progress import Progress, Silent
from layerwise.core.rounds import Federation
from layerwise.core.structure import Structure, structure
from layerwise.core.text import Text
from layerwise.evaluate.pictures import Images
from layerwise.evaluate.tasks import Tasks
from layerwise.export.bitstack import BitStack, Stack
from layerwise.flow.assessing import Asked, assess, load_or_say
from layerwise.flow.compressing import compress as _compress
from layerwise.flow.federating import Clients
from layerwise.flow.federating import federate as _federate
from layerwise.flow.identity import candidates_of
from layerwise.flow.loading import files_within, load_into
from layerwise.flow.locally import Local
from layerwise.flow.market import check_level
from layerwise.flow.planning import make_plan
from layerwise.flow.preparing import Proving, Texts, check, prepare, rewritten
from layerwise.flow.promising import foresight, promised
from layerwise.flow.studies import Study, study_of
from layerwise.flow.survey import Survey, everywhere, survey
from layerwise.flow.sweeping import Setting, points_of, publish
from layerwise.flow.sweeping import sweep as _sweep
from layerwise.flow.voting import vote
from layerwise.flow.wish import Wish

Model = str | Path | nn.Module
CACHE_BYTES = 20 * 10**9


@dataclass(frozen=True, slots=True)
class Opened:
    """A model's tensors and what layerwise makes of them."""

    source: Source
    structure: Structure


def open(model: Model) -> Opened:
    """Open a model without reading its weights.

    Args:
        model: Path, hub id, `builtin:tiny` or module.

    Raises:
        UserError: It cannot be read safely.
    """
    source = open_source(model)
    return Opened(source, structure(source))


def measure(
    model: Model,
    measures: str | Sequence[str] = ("weight_error", "zd"),
    *,
    calibration: Text | None = None,
    samples: int = 64,
    length: int = 256,
    levels: Sequence[int] = (),
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **wish: Any,
) -> Survey:
    """Score every layer.

    Args:
        model: Path, hub id, `builtin:tiny` or module.
        measures: Names of measures; those that compare see the first level, or 4 bits.
        calibration: Text to gather evidence on.
        samples: Windows of it.
        length: Tokens per window.
        levels: Widths to find the error of every layer at.
        device: Where the block at work is put: "cpu", "cuda", or "auto" for the better one here.
        trust_remote_code: Let the checkpoint bring its own Python.
        progress: Is told of each block.
        wish: Fields of `Wish` that say how a level is made: method, group, symmetric.
    """
    names = [measures] if isinstance(measures, str) else measures
    chosen = [catalogue.get(f"measure/{name}") for name in names]
    asked, texts = Wish(**wish), Texts(calibration, samples, length)
    where: Any = {"device": device, "trust_remote_code": trust_remote_code}
    source = rewritten(open_source(model), asked.rewriting, texts, **where)
    found = structure(source)
    wanted = asked.fitted(found)
    comparing = any("approximation" in method.evidence for method in chosen)
    tried = [wanted.level(bits) for bits in levels or ([4] if comparing else [])]
    steps = [catalogue.get(id) for level in tried for id, _ in level.steps]
    prepared = prepare(source, found, [*chosen, *steps], texts, proof="none", **where)
    for level in tried:
        check_level(prepared, wanted, level)
    even = [everywhere(level, found, source, wanted.options) for level in tried]
    return survey(
        prepared,
        {name: [plans[name] for plans in even] for name in found.layers},
        options=wanted.options,
        measures=chosen,
        progress=progress or Silent(),
    )


def plan(
    model: Model,
    *,
    calibration: Text | None = None,
    samples: int = 64,
    length: int = 256,
    text: Text | None = None,
    text_samples: int = 32,
    max_memory: str = "",
    cache: bool = True,
    cache_bytes: int = CACHE_BYTES,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **wish: Any,
) -> Plan:
    """Decide what every layer gets.

    Args:
        model: Path, hub id, `builtin:tiny` or module.
        calibration: Text to gather evidence on.
        samples: Windows of it.
        length: Tokens per window.
        text: Text that a limit on the KL is to hold on.
        text_samples: Windows of it.
        max_memory: The most memory that may be held now, or when the plan is carried out without
            a proof, such as "4GiB"; "" for no limit.
        cache: Keep what is made of layers, so that another budget takes seconds.
        cache_bytes: Most that all that is kept may take.
        device: Where the block at work is put: "cpu", "cuda", or "auto" for the better one here.
        trust_remote_code: Let the checkpoint bring its own Python.
        progress: Is told of each block.
        wish: Fields of `Wish`: bits or budget, method, group, symmetric, density, rank …

    Raises:
        UserError: The wish cannot be met, or not within `max_memory`.
    """
    wanted = Wish(**wish)
    texts = Texts(calibration, samples, length, text, text_samples)
    where: Any = {"device": device, "trust_remote_code": trust_remote_code}
    source = rewritten(open_source(model), wanted.rewriting, texts, **where)
    prepared = prepare(
        source,
        structure(source),
        wanted.methods(),
        texts,
        needing=wanted.needing,
        learning=wanted.learning,
        proof="none" if wanted.max_kl is None else "auto",
        **where,
    )
    with caches.opened(cache_bytes, lasting=cache) as kept:
        candidates = candidates_of(prepared, kept)
        made = make_plan(prepared, wanted, candidates, progress or Silent(), max_memory).plan
    check(prepared, made)
    return made


def forecast(
    model: Model,
    plan: Plan,
    *,
    calibration: Text | None = None,
    samples: int = 64,
    length: int = 256,
    text: Text | None = None,
    text_samples: int = 32,
    noise_floor: bool = True,
    proof: Proving = "auto",
    max_memory: str = "",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Forecast:
    """Say what `compress` would take to carry out a plan: size, memory, time.

    Args:
        model: Path, hub id, `builtin:tiny` or module.
        plan: What would be carried out.
        calibration: Text to gather evidence on.
        samples: Windows of it.
        length: Tokens per window.
        text: Text to compare on.
        text_samples: Windows of it.
        noise_floor: Whether the original in bfloat16 would be compared with itself.
        proof: What would be proven.
        max_memory: The most memory that may be held, such as "4GiB"; "" for no limit.
        device: Where the block at work would be put.
        trust_remote_code: Let the checkpoint bring its own Python.

    Raises:
        UserError: The plan cannot be carried out, or not within `max_memory`.
    """
    texts = Texts(calibration, samples, length, text, text_samples, noise_floor)
    where: Any = {"device": device, "trust_remote_code": trust_remote_code}
    source = rewritten(open_source(model), plan.rewriting, texts, **where)
    prepared = prepare(
        source,
        structure(source),
        plan.methods(),
        texts,
        needing=plan.needing,
        proof=proof,
        **where,
    )
    seen = foresight(prepared, plan, check(prepared, plan).size)
    return promised(seen, max_memory)[1]


def compress(
    model: Model,
    out: str | Path,
    *,
    plan: str | Path | Plan | None = None,
    calibration: Text | None = None,
    samples: int = 64,
    length: int = 256,
    text: Text | None = None,
    text_samples: int = 32,
    noise_floor: bool = True,
    proof: Proving = "auto",
    max_memory: str = "",
    cache: bool = True,
    cache_bytes: int = CACHE_BYTES,
    layer_windows: int = 4,
    device: str = "cpu",
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    recipe: Mapping[str, Any] | None = None,
    **wish: Any,
) -> Report:
    """Make a smaller model, prove it, and write it as a directory.

    Args:
        model: Path, hub id, `builtin:tiny` or module.
        out: Directory to make; must not exist.
        plan: A plan, or the file of one; otherwise `wish` makes one.
        calibration: Text to gather evidence on.
        samples: Windows of it.
        length: Tokens per window.
        text: Text to compare on; by default one that calibration did not see.
        text_samples: Windows of it.
        noise_floor: Compare the original in bfloat16 with itself too: what no one minds.
        proof: "logits" loads the files back and compares; "auto" does if the model can run.
        max_memory: The most memory that may be held, such as "4GiB"; "" for no limit.
        cache: Keep what is made of layers, so that another budget takes seconds.
        cache_bytes: Most that all that is kept may take.
        layer_windows: Windows of the text on which each layer's own KL is measured, when a
            budget was shared out; 0 leaves that out.
        device: Where the block at work is put: "cpu", "cuda", or "auto" for the better one here.
        restart: Throw away a stopped run with other options.
        trust_remote_code: Let the checkpoint bring its own Python.
        progress: Is told of the stages.
        recipe: What to write beside the output as recipe.yaml.
        wish: Fields of `Wish`: bits or budget, method, group, symmetric, density, rank, format …

    Raises:
        UserError: Something is not as it must be; nothing was written.
    """
    if plan is not None and wish:
        raise UserError(
            f"the plan says what to do, and {sorted(wish)[0]} says it too.",
            "Leave one out, or change the plan.",
        )
    with caches.opened(cache_bytes, lasting=cache) as kept:
        return _compress(
            model,
            out,
            Wish(**wish),
            Texts(calibration, samples, length, text, text_samples, noise_floor),
            progress or Silent(),
            plan=Path(plan) if isinstance(plan, str) else plan,
            proof=proof,
            max_memory=max_memory,
            cache=kept,
            layer_windows=layer_windows,
            device=device,
            restart=restart,
            trust_remote_code=trust_remote_code,
            recipe=recipe,
        )


def sweep(
    model: str | Path,
    out: str | Path,
    *,
    methods: Sequence[str],
    budgets: Sequence[str] = (),
    uniform: bool = False,
    calibration: Text | None = None,
    samples: int = 64,
    length: int = 256,
    text: Text | None = None,
    text_samples: int = 32,
    processes: int = 1,
    ray: str = "",
    max_memory: str = "",
    cache: bool = True,
    cache_bytes: int = CACHE_BYTES,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    recipe: Mapping[str, Any] | None = None,
    **wish: Any,
) -> Sweep:
    """Try methods and budgets on a model, on one calibration, and write what came of it.

    The directory holds a plan for every point, which `compress` carries out in seconds: what the
    sweep made of layers is kept.

    Args:
        model: Path, hub id or `builtin:tiny`.
        out: Directory to make; must not exist.
        methods: Quantizers.
        budgets: As `compress` takes them; bare numbers are bits.
        uniform: Add every allowed width for all layers alike.
        calibration: Text to gather evidence on.
        samples: Windows of it.
        length: Tokens per window.
        text: Text to compare on; by default one that calibration did not see.
        text_samples: Windows of it.
        processes: Find points in so many processes.
        ray: Find them on the Ray cluster at this address; "auto" for the one that is there, or
            one of this machine alone.
        max_memory: The most memory that all processes may hold together, such as "4GiB", or each
            of them on a cluster; "" for no limit.
        cache: Keep what is made of layers for other runs.
        cache_bytes: Most that all that is kept may take.
        device: Where the block at work is put: "cpu", "cuda", or "auto" for the better one here.
        trust_remote_code: Let the checkpoint bring its own Python.
        progress: Is told of the stages.
        recipe: What to write beside the output as recipe.yaml.
        wish: Fields of `Wish` that all points share: allow, group, density, sensitivity, format …

    Raises:
        UserError: Something is not as it must be.
    """
    points = points_of(wish, methods, budgets, uniform)
    used = {method.id for point in points for method in point.wish.methods()}
    with caches.opened(cache_bytes, lasting=cache) as kept:
        setting = Setting(
            str(model),
            Texts(calibration, samples, length, text, text_samples),
            device,
            trust_remote_code,
            str(kept.folder),
            cache_bytes,
            sorted(used),
            [name for point in points for name in point.wish.needing],
            [name for point in points for name in point.wish.learning],
            points[0].wish.rewriting,
        )
        target = Path(os.path.abspath(Path(out).expanduser()))
        found = _sweep(
            setting,
            points,
            target,
            progress or Silent(),
            processes=processes,
            ray=ray,
            max_memory=max_memory,
            recipe=recipe or {},
        )
        publish(found, target)
    return found


def load(
    model: str | Path,
    *,
    into: nn.Module | None = None,
    budget: str = "",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model into transformers, whatever format layerwise wrote it in, or into a module.

    Args:
        model: Path, hub id or `builtin:tiny`.
        into: A module such as it was made from, where that is no model of transformers: a copy of
            it is filled, in its own dtype.
        budget: Most bytes of its tensors that are read, as they are stored, such as "12MiB", of
            files that can be read in part (`--format bitstack`); "" is all.
        dtype: What it is to compute in, if transformers loads it.
        trust_remote_code: Let the checkpoint bring its own Python.

    Returns:
        The model in evaluation mode, its weights in full.

    Raises:
        UserError: It is not there, does not fit, has no such size, or a package it needs is
            missing.
    """
    source, most = open_checkpoint(model), memory_limit(budget) if budget else None
    if into is not None:
        return load_into(source, into, most)
    return load_or_say(source, dtype, trust_remote_code, most)


def stack(
    model: str | Path,
    budget: str,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> Stack:
    """Load a model that can grow and shrink while it is in use; see `Stack`.

    Weights lie in full while transformers loads them; then only the blocks that there is room for
    are held, and unpacked whenever a layer answers.

    Args:
        model: What `--format bitstack` wrote.
        budget: Most bytes of stored tensors that are held, such as "12MiB".
        dtype: What it is to compute in.
        trust_remote_code: Let the checkpoint bring its own Python.

    Raises:
        UserError: It is not there, is of another format, or has no such size.
    """
    source = open_checkpoint(model)
    files = files_within(source, memory_limit(budget))
    assert isinstance(files, BitStack)
    return Stack(load_or_say(source, dtype, trust_remote_code, files.least), files)


def evaluate(
    model: Model,
    *,
    against: Model | None = None,
    text: Text | None = None,
    samples: int = 128,
    length: int = 256,
    noise_floor: bool = True,
    tasks: str | Sequence[str] = (),
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    cache: bool = True,
    images: Images | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """How good a model is: on text, on tasks, on images; and how far from another one.

    Checkpoints are loaded with transformers, as their users will load them.  Without tasks and
    images, a text is read: perplexity, and with an original KL and top-1 agreement.

    Args:
        model: Path, hub id or `builtin:tiny`, quantized ones too; for images also a module.
        against: The model it was made from.
        text: Held-out text; the built-in one if neither tasks nor images are given.
        samples: Windows of it.
        length: Tokens per window.
        noise_floor: Compare the original in bfloat16 with itself on the same windows: one more
            forward pass of it.  What is below that, no one who serves in bfloat16 can see.
        tasks: Tasks of lm-eval, as a list or comma separated.
        limit: First items of each task.
        num_fewshot: Solved examples before each item; by default what the task says.
        batch_size: Items answered at once.
        include_path: Directory of YAML files with more tasks.
        cache: Take task results of an earlier run with the same weights, and keep new ones.
        images: An .npz file with `x` and `y`, a folder of class folders, or arrays `(x, y)`.
        mean: Mean of each channel, of values from 0 to 1; by default what the checkpoint says, and
            for a module no normalisation.
        std: Standard deviation of each channel.
        trust_remote_code: Let the checkpoint bring its own Python.

    Raises:
        UserError: A model or what it is to be judged on is not there, or they do not fit.
    """
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    put = tasks or any(one is not None for one in (limit, num_fewshot, include_path))
    wanted = Tasks(
        [name.strip() for name in names if name.strip()],
        limit,
        num_fewshot,
        batch_size,
        None if include_path is None else Path(include_path).expanduser(),
        cache,
        trust_remote_code,
    )
    asked = Asked(text, samples, length, noise_floor, wanted if put else None, images, mean, std)
    return assess(model, against, asked, trust_remote_code=trust_remote_code)


def federate(
    study: str | Study = "digits",
    out: str | Path | None = None,
    *,
    method: str = "fedavg",
    options: Mapping[str, Any] | None = None,
    clients: int = 10,
    alpha: float = 0.5,
    fraction: float = 1.0,
    rounds: int = 15,
    network: str = "mlp",
    proxy: int = 100,
    faults: Mapping[int, str] | None = None,
    seed: int = 0,
    restart: bool = False,
    progress: Progress | None = None,
    **local: Any,
) -> Federation:
    """Train a model at several clients that keep their samples, round by round, in one process.

    A client that sends NaN, wrong shapes or nothing is left out of the round and reported; the
    round goes on.  With `out`, a run that was stopped goes on after its last whole round and ends
    with the same bytes.

    Args:
        study: Images and labels: `digits`, `mnist`, `cifar10` or a `Study` of your own.
        out: Directory to make of the model; must not exist.
        method: How the server joins what clients return.
        options: Of that method.
        clients: How many share the samples.
        alpha: Of the Dirichlet distribution that shares each class out: 0.1 is skewed badly.
        fraction: Share of the clients that each round asks, at least two of them.
        rounds: How many there are.
        network: `mlp`, or `cnn` with batch norms.
        proxy: Samples that the server holds back, each class alike.
        faults: Clients that fail every round, by number: nan, shape, nothing or noise.
        seed: Of everything that is drawn.
        restart: Throw away a stopped run with other options.
        progress: Is told of each round.
        local: Fields of `Local`: epochs, batch, rate, momentum, proximal, learning …

    Raises:
        UserError: Something is not as it must be; nothing was written.
    """
    setting = Clients(
        clients, alpha, fraction, rounds, network, Local(**local), proxy, faults, seed
    )
    return _federate(
        study_of(study, seed) if isinstance(study, str) else study,
        catalogue.get(f"federate/{method}"),
        options or {},
        setting,
        progress or Silent(),
        out=None if out is None else Path(os.path.abspath(Path(out).expanduser())),
        restart=restart,
    )


def ensemble(
    models: Sequence[str | Path],
    *,
    text: str | Path | Sequence[str] | None = None,
    samples: int = 8,
    length: int = 256,
    weights: Sequence[float] | None = None,
    prompt: str = "",
    count: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> ByteVote:
    """Let language models vote byte by byte, whatever their tokenizers.

    Args:
        models: Paths, hub ids or `builtin:tiny`.
        text: What is read; None and no prompt for the built-in text.
        samples: Windows of it, each read by itself.
        length: Bytes of each.
        weights: What each model counts; alike if None.
        prompt: What is continued, and may end inside a token.
        count: Bytes that continue it.
        temperature: Of the bytes' probabilities; 0 takes the likeliest.
        seed: Of what is drawn.
        trust_remote_code: Let checkpoints bring their own Python.
        progress: Is told of each window.

    Raises:
        UserError: A model cannot be read, or cannot write the text.
    """
    return vote(
        models,
        text="builtin" if text is None and not prompt else text,
        samples=samples,
        length=length,
        weights=weights,
        prompt=prompt,
        count=count,
        temperature=temperature,
        seed=seed,
        trust_remote_code=trust_remote_code,
        progress=progress or Silent(),
    )
