"""Many methods and budgets on one model: one calibration, one table, the best of each size.

All levels of all methods are tried in one walk through the original model and kept as candidates.
A point is then a budget shared out over kept candidates and one run of the held-out text: points
wait for nothing of each other, and may be found in several processes, or on a Ray cluster.
"""

import concurrent.futures
import contextlib
import csv
import io
import json
import multiprocessing
import os
import socket
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from layerwise import export
from layerwise.core import catalogue
from layerwise.core.economy import LAVISH, Economy, memory_limit
from layerwise.core.environment import environment
from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.keeping.cache import Cache
from layerwise.core.keeping.candidates import Candidates
from layerwise.core.keeping.staging import check_target, partial_folder
from layerwise.core.plan import LayerPlan, Plan, to_yaml
from layerwise.core.progress import Progress, Silent
from layerwise.core.reading.checkpoint import open_source
from layerwise.core.reading.structure import structure
from layerwise.core.rewriting.rewriting import Rewriting, notes_of
from layerwise.core.running.carried import shelf
from layerwise.core.telling.forecast import Outlook
from layerwise.core.telling.outcome import Comparison, Sweep, SweepPoint
from layerwise.core.written import rebuilt
from layerwise.flow import market as markets
from layerwise.flow import sensitivity
from layerwise.flow.identity import candidates_of, sweep_identity
from layerwise.flow.planning import looking_for, make_plan
from layerwise.flow.preparing import Prepared, Texts, check, prepare
from layerwise.flow.probing import Probe
from layerwise.flow.promising import comparing, fitting, search_foresight
from layerwise.flow.reporting import SWEEP
from layerwise.flow.rewriting import rewritten
from layerwise.flow.survey import everywhere, survey
from layerwise.flow.wish import Wish
from layerwise.report import html, pareto_svg

POINTS = "points.jsonl"
_PLANS = "plans"
_SECONDS_TO_ANSWER = 10


@dataclass(frozen=True)
class Point:
    """What a point of a sweep is to be: a wish, under a name that says how it differs.

    Attributes:
        method: Quantizer.
        budget: As asked for; the width where every layer gets the same.
        wish: What it is.
    """

    method: str
    budget: str
    wish: Wish

    @property
    def uniform(self) -> bool:
        """Whether every layer gets the same."""
        return not self.wish.shares_bytes

    @property
    def name(self) -> str:
        """What its plan's file is called."""
        kind = "uniform-" if self.uniform else ""
        return f"{self.method}-{kind}{self.budget}".replace("%", "percent").replace("/", "-")


@dataclass(frozen=True)
class Setting:
    """All that finding a point takes, in any process.

    Attributes:
        model: Path, hub id or `builtin:tiny`.
        texts: What to calibrate on and compare on.
        device: Where the block at work is put.
        trust_remote_code: Let the checkpoint bring its own Python.
        cache_folder: Where candidates are.
        cache_bytes: Most that they may take.
        methods: Ids of all methods of the sweep.
        needing: What else cannot do without a calibration text.
        learning: What else reads the calibration text.
        rewriting: What the model becomes first.
        economy: What to hold on disk, and how much to take up at a time.
    """

    model: str
    texts: Texts
    device: str
    trust_remote_code: bool
    cache_folder: str
    cache_bytes: int
    methods: Sequence[str]
    needing: Sequence[str]
    learning: Sequence[str]
    rewriting: Rewriting = field(default_factory=Rewriting)
    economy: Economy = LAVISH

    def prepared(self) -> Prepared:
        """The model, opened, with its texts."""
        how: Any = {"device": self.device, "trust_remote_code": self.trust_remote_code}
        source = rewritten(open_source(self.model), self.rewriting, self.texts, **how)
        made = prepare(
            source,
            structure(source),
            [catalogue.get(id) for id in self.methods],
            self.texts,
            needing=self.needing,
            learning=self.learning,
            **how,
        )
        return self.running(made)

    def running(self, prepared: Prepared) -> Prepared:
        """The same, with as many tokens run at once as the economy allows."""
        runner = prepared.runner
        if runner is None:
            return prepared
        return replace(prepared, runner=runner.running(self.economy.tokens))

    def candidates(self, prepared: Prepared) -> Candidates:
        """What is kept of its layers."""
        return candidates_of(prepared, Cache(Path(self.cache_folder), self.cache_bytes))


@dataclass(frozen=True)
class Found:
    """A point, its plan's file, and how good it is."""

    point: SweepPoint
    name: str
    plan: str
    comparison: Comparison


def points_of(
    wish: Mapping[str, Any], methods: Sequence[str], budgets: Sequence[str], uniform: bool
) -> list[Point]:
    """Every method at every budget and, if `uniform`, at every width for all layers.

    Args:
        wish: Fields of `Wish` that all points share.
        methods: Quantizers.
        budgets: As a wish has them; a bare number is of bits.
        uniform: Add the widths.

    Raises:
        UserError: A method or a budget is not one, or there is none.
    """
    if not methods or not (budgets or uniform):
        raise UserError(
            "a sweep needs methods and budgets.", "Give --methods rtn,gptq --budgets 2.5,3,4."
        )
    points: list[Point] = []
    alike = {name: value for name, value in wish.items() if name != "allow"}
    alike["inputs"] = "original"
    for method in methods:
        catalogue.get(f"quantize/{method}")
        for budget in budgets:
            sized = budget if budget.strip()[-1:].isalpha() or "%" in budget else f"{budget}bits"
            points.append(Point(method, sized, Wish(**wish, method=method, budget=sized)))
        levels = Wish(**wish, budget="1bits").combinations() if uniform else []
        for bits in sorted({level.bits for level in levels if level.bits is not None}):
            even = Wish(**alike, method=method, bits=bits)
            points.append(Point(method, f"{bits}bits", even))
    return points


def sweep(
    setting: Setting,
    points: Sequence[Point],
    out: Path,
    progress: Progress,
    *,
    processes: int = 1,
    ray: str = "",
    max_memory: str = "",
    recipe: Mapping[str, Any],
) -> Sweep:
    """Find every point, and write a directory that tells of them.

    Args:
        setting: The model and what it is seen with.
        points: What is to be found.
        out: Directory to make; a stopped sweep is taken up in `OUT.partial`.
        progress: Is told of the stages.
        processes: Find points in so many processes.
        ray: Find them on the Ray cluster at this address instead; "auto" for the one that is
            there, or one of this machine alone.
        max_memory: The most memory that all processes may hold together, such as "4GiB", or each
            of them on a cluster; "" for no limit.
        recipe: How the sweep was asked for.

    Raises:
        UserError: The output exists, another sweep stopped there, a point cannot be had, or the
            limit of memory cannot be kept.
    """
    begun = time.perf_counter()
    check_target(out)
    if max_memory:
        memory_limit(max_memory)  # what is no amount is refused before anything is read
    prepared = setting.prepared()
    if prepared.runner is None or prepared.heldout is None:
        raise UserError(
            f"{prepared.source.label} is not run, so points cannot be compared.",
            "Give a language model with a tokenizer.",
        )
    _check(prepared, points)
    folder = partial_folder(out)
    done = _taken_up(folder, out, sweep_identity(prepared, [asdict(point) for point in points]))
    missing = [point for point in points if point.name not in done]
    if missing:
        if max_memory:
            economy = _promised(setting, prepared, missing, 1 if ray else processes, max_memory)
            setting = replace(setting, economy=economy)
            prepared = setting.running(prepared)
        _survey(prepared, setting, missing, progress)
        progress.stage("points", len(missing))
    for found in _found(setting, prepared, missing, processes, ray):
        (folder / _PLANS / f"{found.name}.yaml").write_text(found.plan)
        with (folder / POINTS).open("a") as file:
            file.write(json.dumps(asdict(found)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        done[found.name] = found
        progress.step(found.name)
    ordered = [done[point.name] for point in points]
    first = ordered[0].comparison
    return Sweep(
        model=prepared.source.label,
        text=first.text,
        points=_with_front([found.point for found in ordered]),
        original=replace(first, perplexity=first.perplexity_before or 0.0, kl=0.0, top1=1.0),
        format=points[0].wish.format,
        bytes_before=prepared.source.size,
        seconds=time.perf_counter() - begun,
        notes=[*notes_of(prepared.source), *_notes(points), *setting.economy.notes()],
        environment=environment(setting.device),
        recipe=recipe,
    )


def _found(
    setting: Setting, prepared: Prepared, points: Sequence[Point], processes: int, ray: str
) -> Iterable[Found]:
    """Every point, as it is found."""
    if ray and points:
        return _on_ray(setting, points, ray)
    if processes > 1 and points:
        return _in_processes(setting, points, processes)
    return (find(setting, prepared, point) for point in points)


def publish(result: Sweep, out: Path) -> None:
    """Let a sweep's directory appear under its name, whole."""
    folder = partial_folder(out)
    told = {
        SWEEP: (json.dumps(result.as_json(), indent=2) + "\n").encode(),
        "sweep.csv": as_csv(result).encode(),
        "sweep.svg": pareto_svg(result).encode(),
        "sweep.html": html(result).encode(),
        "recipe.yaml": yaml.safe_dump(dict(result.recipe), sort_keys=False).encode(),
    }
    for name, content in told.items():
        (folder / name).write_bytes(content)
    for name in (POINTS, "identity"):
        (folder / name).unlink()
    folder.rename(out)


def as_csv(result: Sweep) -> str:
    """One row per point."""
    written = io.StringIO()
    rows = [asdict(point) for point in result.points]
    writer = csv.DictWriter(written, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def _check(prepared: Prepared, points: Sequence[Point]) -> None:
    """Refuse a point that cannot be had, before any layer is looked at."""
    for point in points:
        wish = point.wish.fitted(prepared.found)
        if point.uniform:
            markets.check_level(prepared, wish, wish.level(wish.bits))
        else:
            wish.allocator()
            markets.check_affordable(wish, prepared, markets.of_bytes(wish, prepared))


def _survey(
    prepared: Prepared, setting: Setting, points: Sequence[Point], progress: Progress
) -> None:
    """Try every level of every point, once, and keep what came of it."""
    survey(
        prepared,
        _every_level(prepared, points),
        options=points[0].wish.options,
        candidates=setting.candidates(prepared),
        economy=setting.economy,
        progress=progress,
    )


def _every_level(prepared: Prepared, points: Sequence[Point]) -> dict[str, list[LayerPlan]]:
    """The levels of all points, by layer."""
    levels: dict[str, dict[LayerPlan, None]] = {name: {} for name in prepared.found.layers}
    for point in points:
        for name, plans in _levels(prepared, point).items():
            levels[name] |= dict.fromkeys(plan.work for plan in plans)
    return {name: list(plans) for name, plans in levels.items()}


def _promised(
    setting: Setting, prepared: Prepared, points: Sequence[Point], processes: int, limit: str
) -> Economy:
    """How a sweep keeps within a limit: all levels are tried first, and then points are found.

    Raises:
        UserError: It cannot; the message names the least that can.
    """
    candidates, levels = setting.candidates(prepared), _every_level(prepared, points)
    wish = points[0].wish.fitted(prepared.found)
    weights = "" if all(point.uniform for point in points) else sensitivity.chosen(wish, prepared)
    assert prepared.heldout is not None
    looking = replace(
        looking_for(prepared, wish, levels, (), weights, candidates),
        together=len(prepared.heldout.ids),
        comparing=comparing(False),
    )
    tried = search_foresight(prepared, replace(looking, gradients=0, graphs=0, apart=0, together=0))
    found = search_foresight(prepared, replace(looking, levels={}))

    def forecast(economy: Economy) -> Outlook:
        first, each = tried.forecast(economy), found.forecast(economy)
        # While other processes find points, this one waits with what it held from the start.
        waiting = min(each.stages.values()) if processes > 1 else 0
        stages = dict(first.stages)
        for stage, held in each.stages.items():
            stages[stage] = max(stages.get(stage, 0), waiting + processes * held)
        return Outlook(max(stages.values()), first.seconds, stages)

    economy, _ = fitting(forecast, found.economies(), limit, "the sweep")
    return economy


def _levels(prepared: Prepared, point: Point) -> Mapping[str, Sequence[LayerPlan]]:
    wish = point.wish.fitted(prepared.found)
    if point.uniform:
        level, found = wish.level(wish.bits), prepared.found
        plans = everywhere(level, found, prepared.source, wish.options)
        return {name: [plan] for name, plan in plans.items()}
    return markets.of_bytes(wish, prepared).by_layer()


def find(setting: Setting, prepared: Prepared, point: Point) -> Found:
    """One point: its plan, and how good the model is under it."""
    begun = time.perf_counter()
    assert prepared.heldout is not None
    candidates = setting.candidates(prepared)
    planned = make_plan(prepared, point.wish, candidates, Silent(), economy=setting.economy)
    plan = replace(planned.plan, inputs="original")
    # On another machine, or in a cache that is too small for all, some are to be made again.
    survey(
        prepared,
        {name: [layer] for name, layer in plan.layers.items() if layer.steps},
        options=plan.options,
        candidates=candidates,
        economy=setting.economy,
        progress=Silent(),
    )
    with shelf(setting.economy.on_disk, candidates.cache.folder) as kept:
        probe = Probe(prepared, plan.format, plan.options, candidates, prepared.heldout.ids, kept)
        seen = probe.compared(plan.layers, prepared.heldout)
    made = SweepPoint(
        method=point.method,
        budget=point.budget,
        bits=_bits(prepared, plan),
        bytes=check(prepared, plan).size,
        kl=seen.kl,
        perplexity=seen.perplexity,
        top1=seen.top1,
        seconds=time.perf_counter() - begun,
        front=False,
        out=f"{_PLANS}/{point.name}.yaml",
        uniform=point.uniform,
    )
    return Found(made, point.name, to_yaml(plan, prepared.source.label, prepared.found), seen)


def _bits(prepared: Prepared, plan: Plan) -> float:
    format, tensors = (
        export.get(plan.format, prepared.source, plan.options),
        prepared.source.tensors,
    )
    layers = prepared.found.layers
    stored = sum(
        format.size(layers[name], one, tensors[layers[name].tensor])
        for name, one in plan.layers.items()
    )
    return 8 * stored / sum(layer.count for layer in layers.values())


def _alone(setting: Setting, point: Point) -> Found:
    """One point in a process of its own."""
    return find(setting, setting.prepared(), point)


def _in_processes(setting: Setting, points: Sequence[Point], number: int) -> Iterator[Found]:
    """Points in so many processes of this machine, each with its share of the cores."""
    share = max(1, (os.cpu_count() or 1) // number)
    with concurrent.futures.ProcessPoolExecutor(
        number,
        multiprocessing.get_context("spawn"),
        initializer=_use_threads,
        initargs=(share,),
    ) as pool:
        waiting = [pool.submit(_alone, setting, point) for point in points]
        for future in concurrent.futures.as_completed(waiting):
            yield future.result()


def _use_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)


def _on_ray(setting: Setting, points: Sequence[Point], address: str) -> Iterator[Found]:
    """Points on a Ray cluster.

    Its machines must see the model and the texts under the same paths.  Candidates that a machine
    does not find in its cache it makes itself.
    """
    ray = need("ray", "a sweep on a Ray cluster")
    with _cluster(ray, address):
        remote = ray.remote(num_cpus=1)(_alone)
        waiting = [remote.remote(setting, point) for point in points]
        while waiting:
            (ready,), waiting = ray.wait(waiting, num_returns=1)
            yield ray.get(ready)


@contextlib.contextmanager
def _cluster(ray: Any, address: str) -> Generator[None]:
    """A connection to a cluster, closed when it was opened here."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address != "auto":
            _knock(address)
        try:
            ray.init(address=address, **quiet)
        except ConnectionError:
            if address != "auto":
                raise
            ray.init(**quiet, include_dashboard=False)
    except Exception as error:  # the package raises no narrower one
        raise UserError(
            f"there is no Ray cluster at {address}: {error}",
            "Start one with `ray start --head`, or give --ray auto.",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """Fail at once where nothing listens: Ray would wait for minutes.

    Raises:
        OSError: Nothing does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        raise OSError("an address is host:port")
    socket.create_connection((host, int(port)), _SECONDS_TO_ANSWER).close()


def _taken_up(folder: Path, out: Path, identity: str) -> dict[str, Found]:
    """The points that a stopped sweep has found already; makes its folder if there is none."""
    mark = folder / "identity"
    if folder.exists() and (not mark.exists() or mark.read_text() != identity):
        raise UserError(
            f"{folder} is of a sweep with other arguments, which stopped.",
            f"Repeat that one, remove {folder}, or choose another -o.",
        )
    (folder / _PLANS).mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        mark.write_text(identity)
    done: dict[str, Found] = {}
    if (folder / POINTS).exists():
        for line in (folder / POINTS).read_text().splitlines():
            with contextlib.suppress(ValueError, UserError):  # a line that was cut short
                found = rebuilt(Found, json.loads(line), str(folder / POINTS))
                done[found.name] = found
    return done


def _with_front(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """The points, marked where no other is both as small and as good."""

    def beaten(one: SweepPoint) -> bool:
        assert one.kl is not None
        return any(
            other.bytes <= one.bytes
            and (other.kl or 0.0) <= one.kl
            and (other.bytes, other.kl) != (one.bytes, one.kl)
            for other in points
        )

    return [replace(one, front=not beaten(one)) for one in points]


def _notes(points: Sequence[Point]) -> list[str]:
    scaling = {
        point.method
        for point in points
        if catalogue.get(f"quantize/{point.method}").rows == "input"
    }
    return [
        f"{name}: measured before its scales move into the layers that feed others, which are "
        "quantized after that when a plan is carried out"
        for name in sorted(scaling)
    ]
