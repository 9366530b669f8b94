"""One function per command: arguments to the library, its answer to the screen."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import layerwise as lw
from layerwise import report
from layerwise.cli.parser import WISHES, named_methods, option_flags
from layerwise.cli.screen import Bars, answer, console
from layerwise.core import catalogue
from layerwise.core.errors import UserError
from layerwise.core.outcome import Report
from layerwise.core.plan import to_yaml
from layerwise.core.written import check_types, read_yaml
from layerwise.flow.planning import Wish

# The measure that is also found at several widths at once.
ERROR = "error"


def inspect(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise inspect`."""
    opened = lw.open(chosen.model)
    measures = [name for name in chosen.measure.split(",") if name]
    widths = _widths("--bits", chosen.bits)
    scores: dict[str, Mapping[str, float]] = {}
    if measures:
        with Bars() as bars:
            looked = lw.measure(
                chosen.model,
                measures,
                **_calibration(chosen),
                **_machine(chosen),
                levels=widths if _compares(measures) else (),
                progress=bars,
                **_grid(chosen),
            )
        scores |= looked.scores
        if ERROR in measures and len(widths) > 1:
            del scores[ERROR]
            for place, bits in enumerate(widths):
                scores[f"{ERROR}_{bits}"] = {n: curve[place] for n, curve in looked.errors.items()}
    console().print(report.structure_table(opened.source, opened.structure, scores))
    if chosen.json:
        _print_json(report.structure_json(opened.source, opened.structure, scores))
    return 0


def _compares(measures: Sequence[str]) -> bool:
    """Whether a measure looks at what a width makes of a layer."""
    return any("approximation" in catalogue.get(f"measure/{m}").evidence for m in measures)


def plan(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise plan`."""
    file = Path(chosen.output)
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
    opened = lw.open(chosen.model)
    with Bars() as bars:
        made = lw.plan(
            chosen.model,
            **_calibration(chosen),
            **_machine(chosen),
            **_wish(chosen, given),
            progress=bars,
        )
    staged = file.with_name(file.name + ".partial")
    staged.write_text(to_yaml(made, chosen.model, opened.structure))
    staged.rename(file)
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


def compress(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise compress`."""
    wanted = chosen.plan or chosen.budget or chosen.bits is not None
    if not wanted and chosen.density == 1 and not chosen.rank:
        raise UserError(
            "nothing was asked for.",
            "Give --plan FILE, --budget 3.5bits, --bits 4, --density 0.5 or --rank 16.",
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
        "proof": chosen.proof,
        "max_memory": chosen.max_memory,
        **_machine(chosen),
    }
    done = _compressed(arguments, restart=chosen.restart)
    if chosen.json:
        _print_json(done.as_json())
    return 0


def _compressed(arguments: Mapping[str, Any], *, restart: bool = False) -> Report:
    """Compress, and show what came of it; the recipe is of use from any directory."""
    recipe = {
        name: os.path.abspath(value)
        if name in ("model", "out", "plan", "calibration", "text") and os.path.exists(value)
        else value
        for name, value in arguments.items()
        if value not in (None, "", {}, False)
    }
    recipe["out"] = os.path.abspath(arguments["out"])
    with Bars() as bars:
        done = lw.compress(**arguments, restart=restart, progress=bars, recipe={"compress": recipe})
    console().print(report.layer_table(done))
    console().print(report.summary(done))
    return done


def evaluate(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise evaluate`."""
    compared = lw.evaluate(
        chosen.model,
        against=chosen.against,
        text=chosen.text,
        samples=chosen.samples,
        length=chosen.length,
        trust_remote_code=chosen.trust_remote_code,
    )
    console().print(report.comparison(compared))
    if chosen.json:
        _print_json(asdict(compared))
    return 0


def run(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    """`layerwise run`."""
    steps = _recipe(Path(chosen.recipe))
    answers: list[Any] = []
    for command, arguments in steps:
        if command == "compress":
            out = {"out": chosen.output} if chosen.output else {}
            answers.append(_compressed(arguments | out).as_json())
        else:
            model = {"model": chosen.output} if chosen.output else {}
            compared = lw.evaluate(**arguments | model)
            console().print(report.comparison(compared))
            answers.append(asdict(compared))
    if chosen.json:
        _print_json(answers)
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
    options: dict[str, dict[str, Any]] = {}
    for id in named_methods(given):
        prefix = id.rpartition("/")[2]
        for name in option_flags(id):
            value = getattr(chosen, f"{prefix}-{name}".replace("-", "_"), None)
            if value is not None:
                options.setdefault(id, {})[name.replace("-", "_")] = value
    return {
        "bits": chosen.bits,
        "budget": chosen.budget,
        "levels": _widths("--levels", chosen.levels),
        **_grid(chosen),
        "density": chosen.density,
        "pruner": chosen.pruner,
        "rank": chosen.rank,
        "compensator": chosen.compensator,
        "allocate": chosen.allocate,
        "measure": chosen.by,
        "format": chosen.format,
        "options": options,
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


def _grid(chosen: argparse.Namespace) -> dict[str, Any]:
    return {"group": chosen.group, "symmetric": chosen.symmetric, "method": chosen.method}


def _calibration(chosen: argparse.Namespace) -> dict[str, Any]:
    return {
        "calibration": chosen.calibration,
        "samples": chosen.samples,
        "length": chosen.length,
    }


def _machine(chosen: argparse.Namespace) -> dict[str, Any]:
    return {"device": chosen.device, "trust_remote_code": chosen.trust_remote_code}


_STEPS = {"compress": lw.compress, "evaluate": lw.evaluate}
_STEPS_ARE = "Steps are `compress:` and `evaluate:`, each with its arguments."


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
    if command == "compress":
        known |= get_type_hints(Wish)
    if unknown := arguments.keys() - known.keys():
        raise UserError(
            f"{file}: {command} has no arguments {sorted(map(str, unknown))}.",
            f"It has {', '.join(sorted(known))}.",
        )
    check_types(f"{file}: {command}", arguments, known)
    for needed in ("model", "out") if command == "compress" else ("model",):
        if needed not in arguments:
            raise UserError(f"{file}: {command} lacks `{needed}`.", f"Add a line `{needed}: …`.")


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, allow_nan=False))
