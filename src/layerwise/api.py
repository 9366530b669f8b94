"""The library: what the command line does, in as few lines of Python."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core import catalogue
from layerwise.core.economy import memory_limit
from layerwise.core.errors import UserError
from layerwise.core.keeping import cache as caches
from layerwise.core.merging.blend import Curve, Rule, read_blend
from layerwise.core.merging.signatures import Signature
from layerwise.core.plan import Plan
from layerwise.core.progress import Progress, Silent
from layerwise.core.reading.checkpoint import Source, open_checkpoint, open_source
from layerwise.core.reading.labelled import Labels
from layerwise.core.reading.parents import Missing
from layerwise.core.reading.structure import Structure, structure
from layerwise.core.reading.text import Text
from layerwise.core.running.skipping import Sparse
from layerwise.core.telling.forecast import Forecast
from layerwise.core.telling.inspection import Inspection
from layerwise.core.telling.merged import Merge
from layerwise.core.telling.outcome import ByteVote, Evaluation, Report, Sweep
from layerwise.core.telling.rounds import Federation
from layerwise.core.written import read_yaml
from layerwise.evaluate.pictures import Images
from layerwise.evaluate.tasks import Tasks
from layerwise.export.bitstack import BitStack, Stack
from layerwise.flow.assessing import Asked, assess, load_or_say
from layerwise.flow.compressing import compress as _compress
from layerwise.flow.connecting import Connection
from layerwise.flow.connecting import connect as _connect
from layerwise.flow.federating import Clients
from layerwise.flow.federating import federate as _federate
from layerwise.flow.identity import candidates_of
from layerwise.flow.inspecting import Looking, look
from layerwise.flow.judging import Loss
from layerwise.flow.loading import files_within, load_into
from layerwise.flow.locally import Local
from layerwise.flow.market import check_level
from layerwise.flow.mergekit import KEY, translate
from layerwise.flow.merging import Wanted
from layerwise.flow.merging import merge as _merge
from layerwise.flow.planning import make_plan
from layerwise.flow.preparing import Proving, Texts, check, prepare
from layerwise.flow.promising import foresight, promised
from layerwise.flow.rewriting import rewritten
from layerwise.flow.signing import Patch, sign
from layerwise.flow.signing import patch as _patch
from layerwise.flow.sparsifying import skipping as _skipping
from layerwise.flow.sparsifying import sparsified
from layerwise.flow.studies import Study, study_of
from layerwise.flow.survey import Survey, everywhere, survey
from layerwise.flow.sweeping import Setting, points_of, publish
from layerwise.flow.sweeping import sweep as _sweep
from layerwise.flow.voting import vote
from layerwise.flow.widening import Wide
from layerwise.flow.widening import widen as _widen
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
    labels: Labels | None = None,
    label_examples: int = 1000,
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
        length: Tokens per window, and the most of a labelled text.
        labels: Texts of known classes: a file, a directory, or pairs of a text and its class.
        label_examples: How many of them.
        levels: Widths to find the error of every layer at.
        device: Where the block at work is put: "cpu", "cuda", or "auto" for the better one here.
        trust_remote_code: Let the checkpoint bring its own Python.
        progress: Is told of each block.
        wish: Fields of `Wish` that say how a level is made: method, group, symmetric.
    """
    names = [measures] if isinstance(measures, str) else measures
    chosen = [catalogue.get(f"measure/{name}") for name in names]
    texts = Texts(calibration, samples, length, labels=labels, label_examples=label_examples)
    asked = Wish(**wish)
    where: Any = {"device": device, "trust_remote_code": trust_remote_code}
    source = rewritten(open_source(model), asked.rewriting, texts, options=asked.options, **where)
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


def inspect(
    model: Model,
    measures: str | Sequence[str] = "all",
    *,
    truth: bool = False,
    against: Model | None = None,
    calibration: Text | None = None,
    samples: int = 64,
    length: int = 256,
    text: Text | None = None,
    text_samples: int = 16,
    labels: Labels | None = None,
    label_examples: int = 1000,
    levels: Sequence[int] = (),
    cache: bool = True,
    cache_bytes: int = CACHE_BYTES,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    **wish: Any,
) -> Inspection:
    """Score every layer, find out what each brings alone, and compare the rankings.

    Args:
        model: Path, hub id, `builtin:tiny` or module.
        measures: Names of measures; "all" for those that the model and the texts allow.
        truth: Measure the KL that the model's answers move by when one layer alone becomes what
            the first level (4 bits, unless `wish` prunes) makes of it, for every layer.
        against: Another model of the same layers, such as the one it was made from, for measures
            that compare with it.
        calibration: Text to gather evidence on.
        samples: Windows of it.
        length: Tokens per window.
        text: Text that the KL is measured on; by default one that calibration did not see.
        text_samples: Windows of it.
        labels: Texts of known classes, for measures that read them: a file of lines of text, tab,
            label, one of JSON lines, a directory of such, or pairs of a text and its class.
        label_examples: How many of them.
        levels: Widths to find the error of every layer at.
        cache: Keep what is made of layers for other runs.
        cache_bytes: Most that all that is kept may take.
        device: Where the block at work is put: "cpu", "cuda", or "auto" for the better one here.
        trust_remote_code: Let the checkpoint bring its own Python.
        progress: Is told of each block.
        wish: Fields of `Wish` that say how a level is made: method, group, density, pruner, rank …

    Raises:
        UserError: What is asked for cannot be had of this model.
    """
    asked = Wish(**wish)
    shown = (calibration, samples, length, text, text_samples, False)
    texts = Texts(*shown, labels=labels, label_examples=label_examples)
    where: Any = {"device": device, "trust_remote_code": trust_remote_code}
    source = rewritten(open_source(model), asked.rewriting, texts, **where)
    names = [measures] if isinstance(measures, str) else measures
    with caches.opened(cache_bytes, lasting=cache) as kept:
        return look(
            source,
            structure(source),
            Looking(names, levels, truth),
            asked,
            texts,
            kept,
            progress or Silent(),
            None if against is None else rewritten(open_source(against), asked.rewriting, texts),
            **where,
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
    source = rewritten(open_source(model), wanted.rewriting, texts, options=wanted.options, **where)
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
    source = rewritten(open_source(model), plan.rewriting, texts, options=plan.options, **where)
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


def merge(
    models: Sequence[Model] = (),
    out: str | Path = "",
    *,
    base: Model | None = None,
    method: str = "",
    weights: Sequence[Curve] | None = None,
    options: Mapping[str, Any] | None = None,
    plan: str | Path | None = None,
    dtype: str = "",
    missing: Missing = "refuse",
    align: bool = False,
    calibration: Text | Sequence[Text] | None = None,
    samples: int = 64,
    length: int = 256,
    text: Text | Sequence[Text] | None = None,
    text_samples: int = 32,
    fit: Text | None = None,
    fit_evaluations: int = 200,
    loss: Loss | None = None,
    norms: Tensor | None = None,
    restart: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Merge:
    """Merge models into one, and write it as a directory.

    The order of the models changes nothing, and equal models with equal settings give equal bytes.

    Args:
        models: Paths, hub ids or modules; by default those of the plan.
        out: Directory to make; must not exist.
        base: The model that the others were tuned from; by default that of the plan.
        method: What merges them; by default the plan's, or linear.
        weights: How much each model counts: a number, or a list of numbers over depth.
        options: Options of the method: values, lists with one for each model, or `{"curve": [...]}`
            with values over depth.
        plan: A file with weights and options for patterns of tensors.
        dtype: What floats are stored in: float32, float16 or bfloat16; by default as the models.
        missing: A tensor that some of the models lack is refused; or kept, made of those that have
            it; or taken from the base for those that lack it.
        align: Match rows of embeddings and heads by what their tokens are.
        calibration: Text that each model's evidence is gathered on, one for all or a list with one
            for each.
        samples: Windows of it.
        length: Tokens per window.
        text: Text, or a list of texts, that every model and the result are compared on.
        text_samples: Windows of each.
        fit: Text that weights for each group of layers are found on, half of it kept aside.
        fit_evaluations: Most models that are tried for that.
        loss: What a module loses, for modules in memory: instead of texts.
        norms: Inputs of modules in memory on which mean and variance of the result's batch norms
            are estimated again; without them they are merged as all else, which they do not bear.
        restart: Throw away a stopped run with other options.
        trust_remote_code: Let checkpoints bring their own Python.
        progress: Is told of the stages.
        recipe: What to write beside the output as recipe.yaml.

    Raises:
        UserError: Something is not as it must be; nothing was written.
    """
    if len(models) == 1 and isinstance(models[0], str | Path):
        file = Path(models[0])
        if file.suffix in (".yml", ".yaml"):
            if KEY in (read_yaml(file, "recipe", "Write one, or give models.") or {}):
                return _by_recipe(
                    file,
                    out,
                    Wanted(
                        missing=missing,
                        texts=_texts(text),
                        text_samples=text_samples,
                        length=length,
                    ),
                    {"base": base, "method": method, "weights": weights, "options": options},
                    progress=progress,
                    restart=restart,
                    trust_remote_code=trust_remote_code,
                    recipe=recipe,
                )
            plan, models = file, ()
    said = None if plan is None else read_blend(Path(plan))
    rules = dict(said.rules) if said else {}
    if weights is not None or options:
        general = rules.get("*", Rule())
        given = dict(general.options) | dict(options or {})
        rules["*"] = Rule(general.weights if weights is None else weights, given)
    chosen = list(models) or list(said.models if said else ())
    if not chosen or not str(out):
        raise UserError("a merge takes models and a directory to make.", "Give both.")
    wanted = Wanted(
        method or (said.method if said else "") or "linear",
        rules,
        dtype=dtype or (said.dtype if said else ""),
        missing=missing,
        align=align,
        calibration=_texts(calibration),
        samples=samples,
        length=length,
        texts=_texts(text),
        text_samples=text_samples,
        fit=fit,
        fit_evaluations=fit_evaluations,
        loss=loss,
        norms=norms,
    )
    return _merge(
        chosen,
        out,
        wanted,
        progress or Silent(),
        base=base if base is not None else (said.base if said else "") or None,
        restart=restart,
        trust_remote_code=trust_remote_code,
        recipe=recipe,
    )


def connect(
    first: nn.Module,
    second: nn.Module,
    loss: Loss,
    *,
    points: int = 11,
    gammas: Sequence[float] = (0.0, 0.3),
    norms: Tensor | None = None,
    seed: int = 0,
) -> Connection:
    """Look at the straight way between two networks, before and after their weights are matched.

    Tells the losses on the way, the barrier, the distance and how much alike the directions of the
    layers are: what `merge/weight_matching` has to work with.

    Args:
        first: A module.
        second: One of the same architecture.
        loss: What a module loses.
        points: How many points of the way are looked at, both ends included.
        gammas: For which directions the alignment R_gamma is told: those of a singular value of at
            least that fraction of the largest.
        norms: Inputs that statistics of batch norms are estimated again on, between the ends.
        seed: Of the order in which units are matched.

    Raises:
        UserError: They are not of one architecture, or of one in which nothing can be permuted.
    """
    return _connect(first, second, loss, points=points, gammas=gammas, norms=norms, seed=seed)


def signature(
    start: Model,
    clean: Model,
    changed: Model,
    out: str | Path = "",
    *,
    layers: int = 0,
    pattern: str = "",
    bits: int = 0,
) -> Signature:
    """Take what one kind of data taught a network that clean data did not, as a small file.

    `merge` adds it to any network of the same start (`base`, the signature among the models,
    method task_arithmetic with scale 1), `patch` to a module in memory.  See `merge/rws`.

    Args:
        start: The model that both others were tuned from.
        clean: Tuned to clean data.
        changed: Tuned to corrupted data.
        out: The file to write, *.safetensors; none where it is empty.
        layers: How many layers are kept, from the shallowest; 0 for half of them, rounded up.
        pattern: Which tensors are kept instead, as in `conv1.*`.
        bits: Round each tensor to so many bits, evenly from its least to its greatest; 0: none.

    Raises:
        UserError: Something is not as it must be; nothing was written.
    """
    file = Path(out)
    if str(out) and file.suffix != ".safetensors":
        raise UserError(f"{out} is no name for a signature.", "Write NAME.safetensors.")
    found = sign(start, clean, changed, layers=layers, pattern=pattern, bits=bits, label=str(out))
    if str(out):
        found.save(file)
    return found


def patch(
    module: nn.Module,
    signatures: Sequence[Signature | str | Path],
    strengths: Sequence[float] | None = None,
) -> Patch:
    """Add signatures to a module; `.remove()`, or a `with` block's end, gives its bits back.

    Args:
        module: Of the architecture that they were taken from; it is changed.
        signatures: Signatures, or their files.
        strengths: Times each; by default one over their number.

    Raises:
        UserError: One does not fit; the module is as it was.
    """
    return _patch(module, signatures, strengths)


def widen(
    first: nn.Sequential,
    second: nn.Sequential,
    inputs: Tensor,
    *,
    budget: int | float = 1.5,
    ridge: float = 1e-3,
    seed: int = 0,
) -> Wide:
    """Merge two chains of linear layers into a wider one: units that do not match both stay.

    `merge/pleas` makes a network of one's size; this one has between that and both.

    Args:
        first: Linear layers with anything between them that works unit by unit.
        second: One of the same hidden widths; its last layer may answer another question.
        inputs: What both networks are shown, (examples, in); no labels.
        budget: Weights of hidden layers, as a multiple of one network's, from 1 to 2.
        ridge: How strongly the weights before the least squares pull.
        seed: Draws another order in which units are matched.

    Raises:
        UserError: The budget is out of range, or the networks are no such chains.
    """
    return _widen(first, second, inputs, budget=budget, ridge=ridge, seed=seed)


def _by_recipe(
    file: Path,
    out: str | Path,
    wanted: Wanted,
    beside: Mapping[str, Any],
    *,
    progress: Progress | None,
    restart: bool,
    trust_remote_code: bool,
    recipe: Mapping[str, Any] | None,
) -> Merge:
    """Carry out a recipe of mergekit's.

    Raises:
        UserError: What the recipe says is said beside it, too.
    """
    if typed := [name for name, value in beside.items() if value]:
        raise UserError(f"{file} says what to do, and {typed[0]} says it too.", "Leave one out.")
    found = translate(file, wanted)
    return _merge(
        found.models,
        out,
        found.wanted,
        progress or Silent(),
        base=found.base,
        restart=restart,
        trust_remote_code=trust_remote_code,
        recipe=recipe,
    )


def _texts(given: Text | Sequence[Text] | None) -> list[Text]:
    """One text, or several; a list of strings is a list of texts here."""
    if given is None:
        return []
    if isinstance(given, str | Path | torch.Tensor):
        return [given]
    return list(given)


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


def sparsify(
    model: nn.Module,
    method: str,
    *,
    density: float | Mapping[str, float],
    calibration: Tensor | None = None,
    **how: Any,
) -> Sparse:
    """Have a loaded model leave work out while it runs.

        with lw.sparsify(model, "wina", density=0.5):
            model.generate(ids)

        thinned = lw.sparsify(model, "think", density=0.6)
        model.generate(ids, past_key_values=thinned.cache())

    Args:
        model: A model that transformers loaded, or a module with blocks of linear layers.  It is
            the same object, with hooks on it.
        method: A sparsifier: wina and teal skip inputs of linear layers, think thins the keys of
            a cache, shortv freezes tokens in blocks, zero_tprune drops tokens of pictures.
        density: Fraction of the work to keep; of inputs also for each layer by name.
        calibration: Token ids, (windows, length), on which shortv finds what blocks contribute.
        how: More fields of `Skipping`: first, orthogonal, after, prompt, recent, or `options` of
            the method.

    Returns:
        What takes the hooks off again, by `remove` or at the end of `with`; its `tally` counts
        what was chosen, and inside `tally.counting()` what was computed.

    Raises:
        UserError: The model or the method is none of these, or they do not fit.
    """
    return sparsified(model, _skipping(method, density, how), calibration)


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
    sparsify: str = "",
    density: float = 0.5,
    skipping: Mapping[str, Any] | None = None,
    detect: Labels | Sequence[str] | None = None,
    trust_remote_code: bool = False,
) -> Evaluation:
    """How good a model is: on text, on tasks, on images; and how far from another one.

    Checkpoints are loaded with transformers, as their users will load them.  Without tasks, images
    and texts to detect, a text is read: perplexity, and with an original KL and top-1 agreement.

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
        sparsify: A sparsifier: the model leaves work out, and is compared with itself as it is.
        density: Fraction of that work to keep.
        skipping: More fields of `Skipping`: first, orthogonal, after, prompt, recent, calibration,
            or `options` of the method.
        detect: Texts to be scored for whether a model wrote them, each as far as `length` tokens:
            texts, or a file of them; with their classes, the scores are judged too.
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
    if skipping and not sparsify:
        raise UserError(
            f"{next(iter(skipping))} says how work is left out, and no sparsifier is named.",
            "Name one, such as wina.",
        )
    left = _skipping(sparsify, density, skipping or {}) if sparsify else None
    put_tasks = wanted if put else None
    asked = Asked(text, samples, length, noise_floor, put_tasks, images, mean, std, left, detect)
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
