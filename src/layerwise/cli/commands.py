"""One function per command: arguments to the library, its answer to the screen."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import layerwise as lw
from layerwise import api, report
from layerwise.cli.parser import LOCAL, WISHES, named_methods, option_flags
from layerwise.cli.screen import Bars, answer, console
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.core.plan import to_yaml
from layerwise.core.telling.inspection import Inspection
from layerwise.core.telling.merged import Merge
from layerwise.core.telling.outcome import Report, Sweep
from layerwise.core.written import bytes_of, check_types, read_yaml
from layerwise.flow import reporting
from layerwise.flow.wish import Wish

# What the flags of `inspect` say of a level, beside its width and grid.
_LEVEL = ("method", "density", "pruner", "rank", "compensator")


def inspect(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise inspect`."""
    picture = None if chosen.output is None else _new_file(chosen.output)
    opened = lw.open(chosen.model)
    measures = [name for name in chosen.measure.split(",") if name]
    found = Inspection(opened.source.label, {})
    if measures or chosen.truth:
        with Bars() as bars:
            found = lw.inspect(
                chosen.model,
                measures,
                truth=chosen.truth,
                against=chosen.against,
                **_calibration(chosen),
                text=chosen.text,
                text_samples=chosen.text_samples,
                labels=chosen.labels,
                label_examples=chosen.label_examples,
                levels=_widths("--bits", chosen.bits) if chosen.bits else (),
                **_cache(chosen),
                **_machine(chosen),
                progress=bars,
                **_grid(chosen),
                **{name: getattr(chosen, name) for name in _LEVEL},
                options=_own_options(chosen, given),
            )
    console().print(report.structure_table(opened.source, opened.structure, found))
    if found.columns:
        console().print(report.agreement_table(found))
    if picture is not None:
        _write_new(picture, report.inspection_svg(found))
        console().print(f"in pictures: {picture}", markup=False, soft_wrap=True)
    if chosen.json:
        _print_json(report.structure_json(opened.source, opened.structure, found))
    return 0


def plan(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise plan`."""
    file = _new_file(chosen.output)
    opened = lw.open(chosen.model)
    with Bars() as bars:
        made = lw.plan(
            chosen.model,
            **_calibration(chosen),
            **_machine(chosen),
            **_wish(chosen, given),
            text=chosen.text,
            text_samples=chosen.text_samples,
            max_memory=chosen.max_memory,
            **_cache(chosen),
            progress=bars,
        )
    _write_new(file, to_yaml(made, chosen.model, opened.structure))
    foreseen = lw.forecast(
        chosen.model,
        made,
        **_calibration(chosen),
        **_machine(chosen),
        proof="none",
        max_memory=chosen.max_memory,
    )
    console().print(report.plan_table(opened.source, opened.structure, made))
    console().print(report.forecast_line(foreseen))
    if chosen.json:
        layers = {name: asdict(layer) for name, layer in made.layers.items()}
        _print_json(
            {
                "plan": str(file),
                "layers": layers,
                "left": dict(opened.structure.left),
                "forecast": dict(foreseen.as_json()),
            }
        )
    return 0


def _new_file(name: str) -> Path:
    """A file that is not there and can be made."""
    file = Path(name)
    if file.exists():
        raise UserError(
            f"{file} exists already, and nothing is ever overwritten.", "Choose another -o."
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        file.unlink()
    except OSError as error:
        raise UserError(
            f"{file} cannot be written: {error.strerror}.", "Choose another -o."
        ) from error
    return file


def _write_new(file: Path, content: str) -> None:
    """Write a file that is there only once it is whole."""
    staged = file.with_name(file.name + ".partial")
    staged.write_text(content, encoding="utf-8")
    staged.rename(file)


def compress(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise compress`."""
    sized = chosen.budget or chosen.max_kl is not None
    wanted = chosen.plan or sized or chosen.bits is not None
    removed = chosen.density != 1 or chosen.pattern or chosen.narrow or chosen.drop_blocks
    if not wanted and not removed and not chosen.rank:
        raise UserError(
            "nothing was asked for.",
            "Give --plan FILE, --budget 3.5bits, --bits 4, --density 0.5, --pattern 2:4, "
            "--narrow flap --keep 0.8, --drop-blocks 1 or --rank 16.",
        )
    if chosen.plan:
        _refuse_wishes(given)
    arguments = {
        "model": chosen.model,
        "out": chosen.output,
        **({"plan": chosen.plan} if chosen.plan else _wish(chosen, given)),
        **_calibration(chosen),
        "text": chosen.text,
        "text_samples": chosen.text_samples,
        "noise_floor": chosen.noise_floor,
        "proof": chosen.proof,
        "max_memory": chosen.max_memory,
        "layer_windows": chosen.layer_windows,
        **_cache(chosen),
        **_machine(chosen),
    }
    done = _compressed(arguments, restart=chosen.restart)
    if chosen.json:
        _print_json(done.as_json())
    return 0


def _compressed(arguments: Mapping[str, Any], *, restart: bool = False) -> Report:
    """Compress, and show what came of it; the recipe is of use from any directory."""
    recipe = {"compress": _recorded(arguments)}
    with Bars() as bars:
        done = lw.compress(**arguments, restart=restart, progress=bars, recipe=recipe)
    console().print(report.layer_table(done))
    console().print(report.summary(done))
    page = os.path.join(arguments["out"], "report.html")
    console().print(f"in pictures: {page}", markup=False, soft_wrap=True)
    return done


def _recorded(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments as a recipe has them: paths are absolute, and what was not asked for is not in."""
    paths = ("model", "models", "base", "out", "plan", "calibration", "text", "fit")

    def absolute(value: Any) -> Any:
        if isinstance(value, list):
            return [absolute(one) for one in value]
        return os.path.abspath(value) if os.path.exists(value) else value

    recipe = {
        name: absolute(value) if name in paths else value
        for name, value in arguments.items()
        if value is not None and value not in ("", {}, [])
    }
    return recipe | {"out": os.path.abspath(arguments["out"])}


def sweep(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise sweep`."""
    arguments = {
        "model": chosen.model,
        "out": chosen.output,
        "methods": [name for name in chosen.methods.split(",") if name],
        "budgets": [size for size in chosen.budgets.split(",") if size],
        "uniform": chosen.uniform,
        **_shared(chosen),
        **_calibration(chosen),
        "text": chosen.text,
        "text_samples": chosen.text_samples,
        "processes": chosen.processes,
        "ray": chosen.ray,
        "max_memory": chosen.max_memory,
        **_cache(chosen),
        **_machine(chosen),
    }
    found = _swept(arguments)
    if chosen.json:
        _print_json(found.as_json())
    return 0


def _swept(arguments: Mapping[str, Any]) -> Sweep:
    """Sweep, and show what came of it."""
    with Bars() as bars:
        found = lw.sweep(**arguments, progress=bars, recipe={"sweep": _recorded(arguments)})
    console().print(report.sweep_table(found))
    page = os.path.join(arguments["out"], "sweep.html")
    console().print(f"in pictures: {page}", markup=False, soft_wrap=True)
    return found


def merge(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise merge`."""
    arguments: dict[str, Any] = {
        "models": chosen.models,
        "out": chosen.output,
        "base": chosen.base,
        "method": chosen.method,
        "weights": _curves(chosen.weights),
        "options": next(iter(_own_options(chosen, given).values()), {}),
        "plan": chosen.plan,
        "dtype": chosen.dtype,
        "missing": chosen.missing,
        "align": chosen.align,
        "calibration": chosen.calibration,
        "samples": chosen.samples,
        "length": chosen.length,
        "text": chosen.text,
        "text_samples": chosen.text_samples,
        "fit": chosen.fit,
        "fit_evaluations": chosen.fit_evaluations,
        "trust_remote_code": chosen.trust_remote_code,
    }
    done = _merged(arguments, restart=chosen.restart)
    if chosen.json:
        _print_json(done.as_json())
    return 0


def signature(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise signature`."""
    made = lw.signature(
        chosen.start,
        chosen.clean,
        chosen.changed,
        chosen.output,
        layers=chosen.layers,
        pattern=chosen.tensors,
        bits=chosen.bits,
    )
    console().print(report.signature_table(made))
    if chosen.json:
        told = {"file": made.label, "bytes": made.size, "bits": made.bits}
        _print_json({**told, "tensors": list(made.tensors), "apart": dict(made.apart)})
    return 0


def _merged(arguments: Mapping[str, Any], *, restart: bool = False) -> Merge:
    """Merge, and show what came of it."""
    recipe = {"merge": _recorded(arguments)}
    with Bars() as bars:
        done = lw.merge(**arguments, restart=restart, progress=bars, recipe=recipe)
    console().print(report.merge_table(done))
    return done


def _curves(text: str) -> list[float | list[float]] | None:
    """`0.7,0.3`, or `0/0.5/1,1/0` with values over depth."""
    if not text:
        return None
    try:
        curves = [[float(one) for one in part.split("/")] for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"--weights {text} is not a list of numbers.", "Write 0.7,0.3, or 0/1,1/0 over depth."
        ) from None
    return [curve if len(curve) > 1 else curve[0] for curve in curves]


def evaluate(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise evaluate`."""
    seen = lw.evaluate(
        chosen.model,
        against=chosen.against,
        text=chosen.text,
        samples=chosen.samples,
        length=chosen.length,
        noise_floor=chosen.noise_floor,
        tasks=chosen.tasks,
        limit=chosen.limit,
        num_fewshot=chosen.num_fewshot,
        batch_size=chosen.batch_size,
        include_path=chosen.include_path,
        cache=not chosen.no_cache,
        images=chosen.images,
        mean=_numbers("--mean", chosen.mean),
        std=_numbers("--std", chosen.std),
        sparsify=chosen.sparsify,
        density=chosen.density,
        skipping=_skipping(chosen, given),
        detect=chosen.detect,
        trust_remote_code=chosen.trust_remote_code,
    )
    console().print(report.evaluation(seen))
    if chosen.json:
        _print_json(seen.as_json())
    return 0


def _skipping(chosen: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    """What is said of the work that is left out, beside how much of it."""
    after = _numbers("--after", chosen.after)
    said: dict[str, Any] = {
        "first": chosen.first,
        "orthogonal": chosen.orthogonal,
        "allocate": chosen.allocate,
        "after": None if after is None else [int(number) for number in after],
        "prompt": chosen.prompt,
        "recent": chosen.recent,
        "calibration": chosen.calibration,
        "options": _own_options(chosen, given).get(f"sparsify/{chosen.sparsify}"),
    }
    return {name: value for name, value in said.items() if value is not None}


def ensemble(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise ensemble`."""
    with Bars() as bars:
        seen = lw.ensemble(
            chosen.models,
            text=chosen.text,
            samples=chosen.samples,
            length=chosen.length,
            weights=_numbers("--weights", chosen.weights),
            prompt=chosen.prompt,
            count=chosen.count,
            temperature=chosen.temperature,
            seed=chosen.seed,
            trust_remote_code=chosen.trust_remote_code,
            progress=bars,
        )
    console().print(report.byte_vote(seen))
    if chosen.json:
        _print_json(seen.as_json())
    return 0


def federate(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise federate`."""
    options = _own_options(chosen, given)
    with Bars() as bars:
        done = lw.federate(
            chosen.study,
            chosen.output,
            method=chosen.method,
            options=options.get(f"federate/{chosen.method}"),
            clients=chosen.clients,
            alpha=chosen.alpha,
            fraction=chosen.fraction,
            rounds=chosen.rounds,
            network=chosen.network,
            proxy=chosen.proxy,
            faults=_faults(chosen.fault),
            seed=chosen.seed,
            restart=chosen.restart,
            progress=bars,
            **{name: getattr(chosen, name) for name, _, _ in LOCAL},
        )
    console().print(report.federation_table(done))
    if chosen.json:
        _print_json(done.as_json())
    return 0


def _faults(given: Sequence[str]) -> dict[int, str]:
    """`0=noise` and the like, by client."""
    try:
        pairs = [text.split("=", 1) for text in given]
        return {int(client): fault for client, fault in pairs}
    except ValueError:
        raise UserError(
            f"--fault {' '.join(given)} is not understood.", "Write --fault 0=noise."
        ) from None


def run(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise run`."""
    steps = _recipe(Path(chosen.recipe))
    answers: list[Any] = []
    for command, arguments in steps:
        if command == "compress":
            out = {"out": chosen.output} if chosen.output else {}
            answers.append(_compressed(arguments | out).as_json())
        elif command == "sweep":
            out = {"out": chosen.output} if chosen.output else {}
            answers.append(_swept(arguments | out).as_json())
        elif command == "merge":
            out = {"out": chosen.output} if chosen.output else {}
            answers.append(_merged(arguments | out).as_json())
        else:
            model = {"model": chosen.output} if chosen.output else {}
            seen = lw.evaluate(**arguments | model)
            console().print(report.evaluation(seen))
            answers.append(seen.as_json())
    if chosen.json:
        _print_json(answers)
    return 0


def render(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise report`."""
    page = reporting.render(chosen.place, chosen.output)
    console().print(f"wrote {page}", markup=False, soft_wrap=True)
    if chosen.json:
        _print_json({"page": str(page)})
    return 0


def methods(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise methods`."""
    verbs = [chosen.verb] if chosen.verb else list(catalogue.VERBS)
    found = [
        method
        for verb in verbs
        for method in catalogue.methods(verb)
        if chosen.needs in (None, method.needs)
    ]
    if chosen.json:
        _print_json(
            [
                {"id": m.id, "needs": m.needs, "reads": list(m.evidence), "summary": m.summary}
                for m in found
            ]
        )
        return 0
    answer().print(report.methods_table(found))
    return 0


def show(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise show`."""
    method = catalogue.get(chosen.method)
    if chosen.json:
        _print_json({"id": method.id, "page": report.page(method)})
    else:
        print(report.page(method))
    return 0


def check(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise check`."""
    from layerwise.testing.check import BROKEN, verdicts

    found = verdicts(catalogue.get(chosen.method))
    for name, verdict in found.items():
        (console() if chosen.json else answer()).print(f"{name:40}{verdict}", markup=False)
    if chosen.json:
        _print_json(found)
    return int(any(verdict.startswith(BROKEN) for verdict in found.values()))


def claims(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise claims`."""
    from layerwise.testing.claims import check_claims

    ids = [chosen.method] if chosen.method else []
    with Bars() as bars:
        verdicts = check_claims(ids, bars)
    console().print(report.claims_table(verdicts))
    if chosen.json:
        _print_json([asdict(verdict) for verdict in verdicts])
    return 0


def _wish(chosen: argparse.Namespace, given: Sequence[str]) -> dict[str, Any]:
    return {
        "bits": chosen.bits,
        "budget": chosen.budget,
        "max_kl": chosen.max_kl,
        "method": chosen.method,
        **_shared(chosen),
        "recover": chosen.recover,
        "tune": tuple(part for part in chosen.tune.split(",") if part),
        "options": _own_options(chosen, given),
    }


def _own_options(chosen: argparse.Namespace, given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The options that methods were given by flags of their own, by method."""
    options: dict[str, dict[str, Any]] = {}
    for id in named_methods(given):
        prefix = id.rpartition("/")[2]
        for name in option_flags(id):
            value = getattr(chosen, f"{prefix}-{name}".replace("-", "_"), None)
            if value is not None:
                options.setdefault(id, {})[name.replace("-", "_")] = value
    return options


def _shared(chosen: argparse.Namespace) -> dict[str, Any]:
    """What every point of a sweep may do, and what one model may."""
    return {
        "allow": _allowed(chosen.allow),
        **_grid(chosen),
        "density": chosen.density,
        "pruner": chosen.pruner,
        "pattern": chosen.pattern,
        "narrow": chosen.narrow,
        "keep": chosen.keep,
        "widths": chosen.widths,
        "drop_blocks": chosen.drop_blocks,
        "drop_by": chosen.drop_by,
        "rank": chosen.rank,
        "compensator": chosen.compensator,
        "activation": chosen.activation,
        "allocate": chosen.allocate,
        "measure": chosen.by,
        "sensitivity": chosen.sensitivity,
        "inputs": chosen.inputs,
        "format": chosen.format,
        "server": chosen.server,
        "rotate": chosen.rotate,
        "rotate_seed": chosen.rotate_seed,
        "scale_keys": chosen.scale_keys,
    }


def _refuse_wishes(given: Sequence[str]) -> None:
    """A plan says everything; a wish beside it would be ignored."""
    made = [
        f"--{id.rpartition('/')[2]}-{name}"
        for id in named_methods(given)
        for name in option_flags(id)
    ]
    wishes = {*WISHES, *made, *(flag.replace("--", "--no-", 1) for flag in made)}
    if typed := [word for word in given if word.partition("=")[0] in wishes]:
        raise UserError(
            f"--plan says what to do, and {typed[0]} says it too.",
            "Leave one out, or change the plan's file.",
        )


def _widths(flag: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} {text} is not a list of widths.", "Write 2,3,4,8.") from None


def _numbers(flag: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(
            f"{flag} {text} is not a list of numbers.", "Write 0.485,0.456,0.406."
        ) from None


def _allowed(given: Sequence[str]) -> dict[str, list[int | float | None]]:
    """`bits=2,3,none` and the like, by what is allowed."""
    allowed: dict[str, list[int | float | None]] = {}
    for text in given:
        name, _, values = text.partition("=")
        if name in allowed:
            raise UserError(f"--allow {name}= is given twice.", "Write all its values in one.")
        try:
            allowed[name] = [_number(part) for part in values.split(",")]
        except ValueError:
            raise UserError(
                f"--allow {text} is not understood.",
                "Write --allow bits=2,3,4,none --allow density=1,0.5 --allow rank=0,16.",
            ) from None
    return allowed


def _number(text: str) -> int | float | None:
    if text.strip() == "none":
        return None
    value = float(text)
    return int(value) if value.is_integer() and "." not in text else value


def _cache(chosen: argparse.Namespace) -> dict[str, Any]:
    return {"cache": not chosen.no_cache, "cache_bytes": bytes_of(chosen.cache_size)}


def _grid(chosen: argparse.Namespace) -> dict[str, Any]:
    return {"group": chosen.group, "symmetric": chosen.symmetric}


def _calibration(chosen: argparse.Namespace) -> dict[str, Any]:
    return {
        "calibration": chosen.calibration,
        "samples": chosen.samples,
        "length": chosen.length,
    }


def _machine(chosen: argparse.Namespace) -> dict[str, Any]:
    return {"device": chosen.device, "trust_remote_code": chosen.trust_remote_code}


_STEPS = {
    "compress": api.compress,
    "sweep": api.sweep,
    "merge": api.merge,
    "evaluate": api.evaluate,
}
_STEPS_ARE = "Steps are `compress:`, `sweep:`, `merge:` and `evaluate:`, each with its arguments."


def _recipe(file: Path) -> list[tuple[str, dict[str, Any]]]:
    content = read_yaml(file, "recipe", "compress writes recipe.yaml.")
    steps: list[tuple[str, dict[str, Any]]] = []
    for command, arguments in content.items() if isinstance(content, dict) else ():
        if command not in _STEPS or not isinstance(arguments, dict):
            raise UserError(f"{file}: {command} is not a step.", _STEPS_ARE)
        _check_arguments(file, command, arguments)
        steps.append((command, arguments))
    if not steps:
        raise UserError(f"{file} is not a recipe.", _STEPS_ARE)
    return steps


def _check_arguments(file: Path, command: str, arguments: Mapping[str, Any]) -> None:
    known = get_type_hints(_STEPS[command])
    for name in ("wish", "progress", "recipe", "return", "restart"):
        known.pop(name, None)
    if command in ("compress", "sweep"):
        known |= get_type_hints(Wish)
    if unknown := arguments.keys() - known.keys():
        raise UserError(
            f"{file}: {command} has no arguments {sorted(map(str, unknown))}.",
            f"It has {', '.join(sorted(known))}.",
        )
    check_types(f"{file}: {command}", arguments, known)
    needs = {"evaluate": ("model",), "merge": ("out",)}
    for needed in needs.get(command, ("model", "out")):
        if needed not in arguments:
            raise UserError(f"{file}: {command} lacks `{needed}`.", f"Add a line `{needed}: …`.")


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, allow_nan=False))
