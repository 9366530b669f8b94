"""What can be typed: every command, its flags, its help and its examples."""

import argparse
import inspect
import textwrap
from collections.abc import Sequence
from typing import Any

from layerwise.core.errors import UserError

MODEL_HELP = "model directory, one .safetensors file, hub id, or builtin:tiny"
NEEDS = ("nothing", "running", "calibration", "labels", "gradients", "models", "clients")
TEXT_HELP = "text file, JSON list of strings, hub data set, or builtin"


class Parser(argparse.ArgumentParser):
    """Says what went wrong as every other mistake is said; takes no abbreviated flags."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """Raise a `UserError`."""
        raise UserError(f"{message}.", f"Try `{self.prog} --help`.")


def build(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; methods named in `arguments` add their own flags."""
    parser = Parser(
        prog="layerwise",
        description="Measure, budget and rewrite the weights of trained networks, layer by layer.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_examples(
            "layerwise inspect builtin:tiny",
            "layerwise compress builtin:tiny -o small --budget 3.5bits --method gptq",
            "layerwise evaluate small --against builtin:tiny",
        ),
    )
    parser.add_argument("--version", action="store_true", help="print the version")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    for add in (
        *(_inspect, _plan, _compress, _sweep, _merge, _signature, _evaluate, _ensemble),
        *(_federate, _run, _report),
        *(_methods, _show, _check, _claims),
    ):
        add(commands)
    if (command := next(iter(arguments), "")) in _WITH_OPTIONS:
        _own_flags(commands.choices[command], arguments)
    return parser


def _own_flags(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> None:
    """The flags of methods that the command line names."""
    for id in named_methods(arguments):
        if options := option_flags(id):
            section = parser.add_argument_group(f"options of {id}")
            for name, option in options.items():
                section.add_argument(f"--{id.rpartition('/')[2]}-{name}", **_flag(option))


def _command(commands: Any, name: str, line: str, *examples: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=line,
        description=line[0].upper() + line[1:] + ".",
        epilog=_examples(*examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", action="store_true", help="one JSON document on stdout")
    return made


def _examples(*lines: str) -> str:
    return "examples:\n" + textwrap.indent("\n".join(lines), "  ")


def _inspect(commands: Any) -> None:
    made = _command(
        commands,
        "inspect",
        "show a model's layers, what is left alone, measures, and what each layer brings alone",
        "layerwise inspect builtin:tiny",
        "layerwise inspect MODEL --measure lim,zd,error --bits 2,3,4,8 --calibration text.txt",
        "layerwise inspect MODEL --measure all --truth --bits 3 --group 32 --calibration text.txt",
        "layerwise inspect MODEL --measure all --truth --density 0.5 --pruner wanda \\",
        "    --calibration text.txt -o layers.svg",
        "layerwise inspect TUNED --measure rotation,alignment --against BASE --calibration t.txt",
        "layerwise inspect MODEL --measure concept_depth --labels reviews.tsv",
    )
    made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    made.add_argument(
        "--measure",
        default="",
        metavar="NAMES",
        help="measures, comma separated; all: those that the model and the texts allow",
    )
    made.add_argument(
        "--truth",
        action="store_true",
        help="measure the KL that each layer brings when it alone becomes what the first width, "
        "--density and --rank make of it",
    )
    made.add_argument(
        "--against",
        metavar="BASE",
        help="another model of the same layers, such as the one it was made from",
    )
    made.add_argument(
        "-o", "--output", metavar="FILE", help="picture to write (SVG): layers, and how all agree"
    )
    level = made.add_argument_group("what is tried on each layer")
    level.add_argument(
        "--bits", default="", metavar="WIDTHS", help="widths (4, unless weights are to go)"
    )
    _grid(level)
    _method(level)
    _sparsity(level)
    _rank(level)
    _calibration(made)
    probed = made.add_argument_group("labelled texts, for probes")
    probed.add_argument(
        "--labels", metavar="FILE", help="lines of text, tab, label; JSON lines; or a directory"
    )
    probed.add_argument("--label-examples", type=int, default=1000, help="texts of it (1000)")
    text = made.add_argument_group("text for --truth")
    text.add_argument("--text", metavar="TEXT", help=f"text to compare on: {TEXT_HELP}")
    text.add_argument("--text-samples", type=int, default=16, help="windows of it (16)")
    _cache(made)
    _machine(made)


def _plan(commands: Any) -> None:
    made = _command(
        commands,
        "plan",
        "decide what every layer gets, and write it as a file to edit",
        "layerwise plan builtin:tiny --budget 3.5bits --method gptq -o plan.yaml",
        "layerwise plan MODEL --budget 40% --calibration text.txt -o plan.yaml",
    )
    made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    made.add_argument("-o", "--output", required=True, metavar="FILE", help="plan to write")
    _wish(made)
    _calibration(made)
    _proof_text(made.add_argument_group("text for --max-kl"))
    _cache(made)
    _machine(made)
    _memory(made)


def _compress(commands: Any) -> None:
    made = _command(
        commands,
        "compress",
        "write a smaller model, load it back, compare it, report",
        "layerwise compress builtin:tiny -o small --bits 4 --group 32 --symmetric",
        "layerwise compress MODEL -o OUT --budget 3.5bits --method gptq --calibration text.txt \\",
        "    --group 32 --symmetric --format compressed-tensors",
        "layerwise compress MODEL -o OUT --pruner sparsegpt --pattern 2:4 --calibration text.txt",
        "layerwise compress MODEL -o OUT --narrow flap --keep 0.8 --calibration text.txt",
        "layerwise compress MODEL -o OUT --plan plan.yaml --calibration text.txt",
    )
    made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    made.add_argument("-o", "--output", required=True, metavar="OUT", help="directory to make")
    made.add_argument("--plan", metavar="FILE", help="carry out this plan")
    _wish(made)
    _calibration(made)
    proof = made.add_argument_group("proof")
    _proof_text(proof)
    _noise_floor(proof)
    proof.add_argument(
        "--proof",
        choices=("auto", "logits", "none"),
        default="auto",
        help="load the files back and compare logits; auto: if the model can run",
    )
    proof.add_argument(
        "--layer-windows",
        type=int,
        default=4,
        help="windows on which each layer's own KL is measured, after a budget; 0: none (4)",
    )
    _cache(made)
    made.add_argument("--restart", action="store_true", help="throw a stopped run away")
    _machine(made)
    _memory(made)


def _sweep(commands: Any) -> None:
    made = _command(
        commands,
        "sweep",
        "try methods and budgets on one calibration; a table, the Pareto front, a plan for each",
        "layerwise sweep builtin:tiny --methods rtn,gptq --budgets 2.5,3,4 -o tried",
        "layerwise sweep MODEL --methods rtn,gptq,awq --budgets 2,2.5,3,4 --uniform -o tried \\",
        "    --calibration text.txt --allow density=1,0.5 --format layerwise --processes 2",
        "layerwise compress MODEL --plan tried/plans/gptq-3bits.yaml --calibration text.txt -o OUT",
    )
    made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    made.add_argument("-o", "--output", required=True, metavar="DIR", help="directory to make")
    made.add_argument("--methods", required=True, metavar="NAMES", help="quantizers")
    made.add_argument(
        "--budgets", default="", metavar="SIZES", help="as compress takes them; numbers are bits"
    )
    made.add_argument("--uniform", action="store_true", help="add each width for all layers alike")
    how = made.add_argument_group("what every point may do")
    _grid(how)
    _levels(how)
    _calibration(made)
    _proof_text(made.add_argument_group("text to compare on"))
    where = made.add_argument_group("where points are found")
    where.add_argument("--processes", type=int, default=1, help="of this machine (1)")
    where.add_argument(
        "--ray", default="", metavar="ADDRESS", help="a Ray cluster; auto starts one if none is"
    )
    _cache(made)
    _machine(made)
    _memory(made)


def _merge(commands: Any) -> None:
    made = _command(
        commands,
        "merge",
        "make several models into one, and say how good each is",
        "layerwise merge A B -o OUT --weights 0.7,0.3",
        "layerwise merge A B --base Z --method ties --ties-density 0.2 -o OUT --text heldout.txt",
        "layerwise merge A B --base Z --method task_arithmetic --fit text.txt -o OUT",
        "layerwise merge recipe.yml -o OUT      # a recipe of mergekit's, or merge.yaml",
    )
    made.add_argument(
        "models", nargs="*", metavar="MODEL", help=f"{MODEL_HELP}; or one recipe (.yml, .yaml)"
    )
    made.add_argument("-o", "--output", required=True, metavar="OUT", help="directory to make")
    made.add_argument("--base", metavar="MODEL", help="what the models were tuned from")
    made.add_argument("--method", default="", metavar="NAME", help="what merges them (linear)")
    made.add_argument(
        "--weights",
        default="",
        metavar="NUMBERS",
        help="how much each model counts, comma separated; 0/0.5/1 runs over the depth (1 each)",
    )
    made.add_argument("--plan", metavar="FILE", help="weights and options by pattern of tensors")
    made.add_argument(
        "--dtype",
        default="",
        metavar="NAME",
        help="store floats as float32, float16 or bfloat16 (as the models do)",
    )
    made.add_argument(
        "--missing",
        choices=("refuse", "keep", "base"),
        default="refuse",
        help="a tensor that some models lack: refuse it, make it of those that have it, or take "
        "the base's for the others (refuse)",
    )
    made.add_argument(
        "--align",
        action="store_true",
        help="match rows of embeddings by token, where models have different tokenizers",
    )
    text = made.add_argument_group("texts")
    text.add_argument(
        "--calibration",
        action="append",
        metavar="TEXT",
        help=f"{TEXT_HELP}: what evidence is gathered on; once, or once for each model",
    )
    text.add_argument("--samples", type=int, default=64, help="windows of each (64)")
    text.add_argument("--length", type=int, default=256, help="tokens per window (256)")
    text.add_argument(
        "--text",
        action="append",
        metavar="TEXT",
        help="compare every model and the result on it; may be given again",
    )
    text.add_argument("--text-samples", type=int, default=32, help="windows of each (32)")
    text.add_argument(
        "--fit", metavar="TEXT", help="find weights for each group of layers on half of it"
    )
    text.add_argument(
        "--fit-evaluations", type=int, default=200, help="most models tried for that (200)"
    )
    made.add_argument("--restart", action="store_true", help="throw a stopped run away")
    made.add_argument("--trust-remote-code", action="store_true", help="run the models' own code")


def _signature(commands: Any) -> None:
    made = _command(
        commands,
        "signature",
        "keep what one kind of data taught a model's first layers as a small file",
        "layerwise signature START CLEAN NOISY -o noise.safetensors --layers 1 --bits 8",
        "layerwise merge noise.safetensors blur.safetensors --base TARGET -o OUT \\",
        "    --method task_arithmetic --task_arithmetic-scale 1 --weights 0.5,0.5",
    )
    made.add_argument("start", metavar="START", help="what both others were tuned from")
    made.add_argument("clean", metavar="CLEAN", help="tuned to clean data")
    made.add_argument("changed", metavar="CHANGED", help="tuned to corrupted data")
    made.add_argument("-o", "--output", required=True, metavar="FILE", help="*.safetensors")
    made.add_argument(
        "--layers", type=int, default=0, help="layers kept, from the shallowest (half of them)"
    )
    made.add_argument(
        "--tensors", default="", metavar="PATTERN", help="which tensors are kept instead: conv1.*"
    )
    made.add_argument(
        "--bits", type=int, default=0, help="round each tensor to so many bits (not rounded)"
    )


def _evaluate(commands: Any) -> None:
    made = _command(
        commands,
        "evaluate",
        "how good a model is: on text, tasks, images; and how far from the original",
        "layerwise evaluate small --against builtin:tiny",
        "layerwise evaluate MODEL --text heldout.txt --samples 128 --length 256",
        "layerwise evaluate MODEL --tasks arc_easy,hellaswag --limit 100 --against BASE",
        "layerwise evaluate CLASSIFIER --images test.npz --against BASE",
        "layerwise evaluate MODEL --text heldout.txt --sparsify wina --density 0.65",
        "layerwise evaluate MODEL --sparsify think --density 0.6 --prompt 0.75",
        "layerwise evaluate MODEL --detect essays.jsonl --length 256",
    )
    made.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    made.add_argument("--against", metavar="BASE", help="the model it was made from")
    text = made.add_argument_group("text")
    text.add_argument(
        "--text",
        metavar="TEXT",
        help=f"{TEXT_HELP} (builtin, unless tasks or images are asked for)",
    )
    text.add_argument("--samples", type=int, default=128, help="windows (128)")
    text.add_argument("--length", type=int, default=256, help="tokens per window (256)")
    _noise_floor(text)
    tasks = made.add_argument_group("tasks, with the extra `tasks`")
    tasks.add_argument("--tasks", default="", metavar="NAMES", help="of lm-eval, comma separated")
    tasks.add_argument("--limit", type=int, help="first items of each task (all)")
    tasks.add_argument("--num-fewshot", type=int, help="solved examples before each (the task's)")
    tasks.add_argument("--batch-size", type=int, default=8, help="items at once (8)")
    tasks.add_argument("--include-path", metavar="DIR", help="YAML files of more tasks")
    tasks.add_argument(
        "--no-cache", action="store_true", help="take no results of earlier runs, and keep none"
    )
    images = made.add_argument_group("images, with the extra `images`")
    images.add_argument(
        "--images", metavar="IMAGES", help=".npz file with x and y, or a folder of class folders"
    )
    images.add_argument("--mean", metavar="NUMBERS", help="of each channel (the model's own)")
    images.add_argument("--std", metavar="NUMBERS", help="of each channel (the model's own)")
    _sparsify(made)
    detection = made.add_argument_group("did a model write it?")
    detection.add_argument(
        "--detect", metavar="FILE", help="texts to score, as --labels, or a JSON list of strings"
    )
    made.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")


def _sparsify(made: argparse.ArgumentParser) -> None:
    left = made.add_argument_group("work left out while the model runs; it is its own original")
    left.add_argument("--sparsify", default="", metavar="NAME", help="sparsifier (none)")
    left.add_argument("--density", type=float, default=0.5, help="fraction of work kept (0.5)")
    left.add_argument(
        "--first", type=float, help="part of a text that skips no inputs, from its beginning (0.01)"
    )
    left.add_argument(
        "--orthogonal",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="turn inputs that keys or a gate read, so that its columns are orthogonal",
    )
    left.add_argument(
        "--allocate",
        metavar="NAME",
        help="allocator that shares the density out in each block (none: the same everywhere)",
    )
    left.add_argument(
        "--after", metavar="BLOCKS", help="blocks after which tokens leave, such as 1,3"
    )
    left.add_argument(
        "--prompt",
        type=float,
        help="part of a window whose keys are thinned, or whose tokens are frozen; what follows "
        "is judged (0.5)",
    )
    left.add_argument("--recent", type=int, help="last tokens of a prompt with whole keys (32)")
    left.add_argument(
        "--calibration", metavar="TEXT", help=f"for shortv, and for --allocate: {TEXT_HELP}"
    )


def _ensemble(commands: Any) -> None:
    made = _command(
        commands,
        "ensemble",
        "let language models vote byte by byte, whatever their tokenizers",
        "layerwise ensemble A B --text heldout.txt --samples 16 --length 256",
        "layerwise ensemble A B --prompt 'Once upon a ti' --count 80",
    )
    made.add_argument("models", nargs="+", metavar="MODEL", help=MODEL_HELP)
    made.add_argument("--text", metavar="TEXT", help=f"{TEXT_HELP} (builtin, without a prompt)")
    made.add_argument("--samples", type=int, default=8, help="windows (8)")
    made.add_argument("--length", type=int, default=256, help="bytes per window (256)")
    made.add_argument("--weights", metavar="NUMBERS", help="what each model counts (alike)")
    made.add_argument("--prompt", default="", help="what to continue; it may end inside a word")
    made.add_argument("--count", type=int, default=64, help="bytes that continue it (64)")
    made.add_argument(
        "--temperature", type=float, default=0.0, help="of bytes; 0 takes the likeliest (0)"
    )
    made.add_argument("--seed", type=int, default=0, help="of what is drawn (0)")
    made.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")


def _federate(commands: Any) -> None:
    made = _command(
        commands,
        "federate",
        "train a small model at clients that keep their samples, and join them round by round",
        "layerwise federate digits --method l_dawa --alpha 0.1 --fault 0=noise",
        "layerwise federate cifar10 --network cnn --learning contrastive --method l_dawa -o OUT",
    )
    made.add_argument("study", metavar="STUDY", help="digits, mnist or cifar10")
    made.add_argument("-o", "--output", metavar="OUT", help="directory to make of the model")
    made.add_argument("--method", default="fedavg", metavar="NAME", help="what joins (fedavg)")
    who = made.add_argument_group("clients")
    who.add_argument("--clients", type=int, default=10, help="how many share the samples (10)")
    who.add_argument(
        "--alpha", type=float, default=0.5, help="how evenly they share each class (0.5)"
    )
    who.add_argument("--fraction", type=float, default=1.0, help="share that a round asks (1)")
    who.add_argument(
        "--fault",
        action="append",
        default=[],
        metavar="CLIENT=WHAT",
        help="a client that sends nan, shape (a wrong one), nothing or noise; may be repeated",
    )
    made.add_argument("--rounds", type=int, default=15, help="how many (15)")
    made.add_argument("--network", default="mlp", help="mlp, or cnn with batch norms (mlp)")
    made.add_argument(
        "--proxy", type=int, default=100, help="samples that the server holds back (100)"
    )
    made.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    local = made.add_argument_group("how clients learn")
    for name, default, words in LOCAL:
        flag, kind = f"--{name.replace('_', '-')}", type(default)
        said = f"{words} ({default})"
        local.add_argument(flag, type=kind, default=default, metavar=kind.__name__, help=said)
    made.add_argument("--restart", action="store_true", help="throw a stopped run away")


# What `flow/locally.py` takes; a test keeps the two in step.
LOCAL: Sequence[tuple[str, Any, str]] = (
    ("epochs", 5, "passes over a client's samples in a round"),
    ("batch", 32, "samples in a step"),
    ("rate", 0.05, "learning rate of the first round"),
    ("decay", 1.0, "factor of the rate from round to round"),
    ("momentum", 0.9, "of the descent, new every round"),
    ("weight_decay", 0.0, "of the descent"),
    ("proximal", 0.0, "mu of FedProx, which holds clients near the global model"),
    ("learning", "supervised", "supervised, or contrastive: without labels"),
    ("temperature", 0.5, "of contrastive learning"),
)


def _run(commands: Any) -> None:
    made = _command(
        commands,
        "run",
        "do what a recipe says; compress writes one beside its output",
        "layerwise run recipe.yaml",
        "layerwise run small/recipe.yaml -o again",
    )
    made.add_argument("recipe", metavar="RECIPE", help="YAML file")
    made.add_argument("-o", "--output", metavar="OUT", help="directory to make instead of its own")


def _report(commands: Any) -> None:
    made = _command(
        commands,
        "report",
        "draw the page of a finished run or sweep again, as one HTML file",
        "layerwise report small -o small.html",
        "layerwise report old/report.json",
    )
    made.add_argument(
        "place", metavar="PATH", help="a run's or sweep's directory, or its JSON file"
    )
    made.add_argument(
        "-o", "--output", metavar="FILE", help="page to write (beside the JSON file, of its name)"
    )
    # `report` is already the name of the room that draws it.
    made.set_defaults(command="render")


def _methods(commands: Any) -> None:
    made = _command(
        commands,
        "methods",
        "list the methods",
        "layerwise methods",
        "layerwise methods quantize --needs nothing",
    )
    made.add_argument("verb", nargs="?", metavar="VERB", help="only those of a verb")
    made.add_argument("--needs", choices=NEEDS)


def _show(commands: Any) -> None:
    made = _command(
        commands,
        "show",
        "print a method's page: idea, equations, options, claims",
        "layerwise show quantize/gptq",
    )
    made.add_argument("method", metavar="VERB/NAME")


def _check(commands: Any) -> None:
    made = _command(
        commands, "check", "run the laws of a method's verb on it", "layerwise check quantize/gptq"
    )
    made.add_argument("method", metavar="VERB/NAME")


def _claims(commands: Any) -> None:
    made = _command(
        commands,
        "claims",
        "check what papers claim, on models that are here",
        "layerwise claims",
        "layerwise claims quantize/gptq",
    )
    made.add_argument("method", nargs="?", metavar="VERB/NAME")


def _grid(parser: Any) -> None:
    parser.add_argument(
        "--group",
        type=int,
        help="inputs that share a scale; 0: a row (the largest up to 128 that fits all layers)",
    )
    parser.add_argument(
        "--symmetric",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="store no zero points (as the format has it; with them if it may)",
    )


def _wish(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("what to do")
    size = how.add_mutually_exclusive_group()
    size.add_argument("--bits", type=int, help="the same width for every layer")
    size.add_argument(
        "--budget",
        default="",
        metavar="SIZE",
        help="3.5bits stored per weight, 40%% of the files, or 1.2GiB: a level for each layer",
    )
    size.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="the smallest model whose KL on the text it is compared on is not above this",
    )
    _grid(how)
    _method(how)
    _levels(how)
    how.add_argument(
        "--tune",
        default="",
        metavar="WHAT",
        help="tune once layers are done, on the calibration text: norms (statistics of batch "
        "norms), bias, or norms,bias (nothing)",
    )
    how.add_argument(
        "--recover",
        default="none",
        metavar="NAME",
        help="learn pruned layers anew, block by block, on the calibration text: masklora (none)",
    )


def _method(parser: Any) -> None:
    parser.add_argument("--method", default="rtn", metavar="NAME", help="quantizer (rtn)")


def _sparsity(how: Any) -> None:
    how.add_argument("--density", type=float, default=1.0, help="fraction of weights kept (1)")
    how.add_argument("--pruner", default="magnitude", metavar="NAME", help="pruner (magnitude)")


def _rank(how: Any) -> None:
    how.add_argument("--rank", type=int, default=0, help="rank of a correction (0: none)")
    how.add_argument("--compensator", default="svd", metavar="NAME", help="compensator (svd)")


def _levels(how: Any) -> None:
    how.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="WHAT=VALUES",
        help="what a budget chooses among: bits=2,3,4,8,none density=1,0.5 rank=0,16; may be "
        "given for each (bits=2,3,4,8)",
    )
    how.add_argument(
        "--sensitivity",
        choices=("error", "energy", "fisher", "kl", "hessian"),
        default="",
        help="how a budget weighs layers: by the share of each output that is lost, by how much "
        "of it, by gradients of the answer, by the KL each brings, or by what all bring together "
        "to second order (fisher, or error where the model does not run)",
    )
    how.add_argument(
        "--inputs",
        choices=("original", "transformed"),
        default="",
        help="what calibration shows methods: the original model's activations, or those after "
        "earlier blocks were transformed (original for a budget, transformed otherwise)",
    )
    _sparsity(how)
    how.add_argument(
        "--pattern",
        default="",
        metavar="N:M",
        help="keep n of every m inputs of a row, such as 2:4; says the density, too",
    )
    how.add_argument(
        "--narrow",
        default="",
        metavar="NAME",
        help="take out whole heads and channels first, as flap says; the model is smaller then",
    )
    how.add_argument(
        "--keep", type=float, default=1.0, help="fraction of the weights of layers that stays then"
    )
    how.add_argument(
        "--widths",
        choices=("shared", "own"),
        default="shared",
        help="whether all blocks keep as many units, or each its own number, as zeros (shared)",
    )
    how.add_argument(
        "--drop-blocks", type=int, default=0, metavar="N", help="take out so many blocks first"
    )
    how.add_argument(
        "--drop-by",
        default="lim",
        metavar="MEASURE",
        help="the measure of blocks by which the least important go (lim)",
    )
    how.add_argument(
        "--activation",
        default="",
        metavar="SCHEME",
        help="round the inputs of layers when the model runs: int8, int4 or fp8, with a scale for "
        "each token, or int8-static, int4-static, fp8-static with one for all",
    )
    _rank(how)
    how.add_argument(
        "--allocate",
        default="",
        metavar="NAME",
        help="allocator of a budget (knapsack), or of a density (none: the same everywhere)",
    )
    how.add_argument(
        "--by",
        default="lim",
        metavar="MEASURE",
        help="what an allocator by scores reads (lim)",
    )
    how.add_argument(
        "--rotate",
        choices=("none", "hadamard", "orthogonal"),
        default="none",
        help="turn the residual stream and each head's values first, which spreads outliers and "
        "leaves the model's function as it was (none)",
    )
    how.add_argument(
        "--rotate-seed", type=int, default=0, help="what is random in that rotation (0)"
    )
    how.add_argument(
        "--scale-keys",
        action="store_true",
        help="even out the pairs of keys that rotary embeddings turn, for a cache of rounded keys",
    )
    how.add_argument(
        "--format",
        default="",
        metavar="NAME",
        help="dense, compressed-tensors, gguf, gptq or layerwise (dense, or what --server loads)",
    )
    how.add_argument(
        "--server",
        default="",
        metavar="NAME",
        help="what is to load it: vllm, transformers or llama.cpp; its rules are checked first",
    )


def _noise_floor(parser: Any) -> None:
    parser.add_argument(
        "--noise-floor",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare the original in bfloat16 with itself: what a KL is to be measured against",
    )


def _calibration(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("calibration")
    text.add_argument("--calibration", metavar="TEXT", help=TEXT_HELP)
    text.add_argument("--samples", type=int, default=64, help="windows (64)")
    text.add_argument("--length", type=int, default=256, help="tokens per window (256)")


def _cache(parser: argparse.ArgumentParser) -> None:
    kept = parser.add_argument_group("cache")
    kept.add_argument(
        "--no-cache", action="store_true", help="keep nothing of what layers become for other runs"
    )
    kept.add_argument(
        "--cache-size", default="20GB", metavar="SIZE", help="most that is kept (20GB)"
    )


def _proof_text(parser: Any) -> None:
    parser.add_argument("--text", metavar="TEXT", help=f"text to compare on: {TEXT_HELP}")
    parser.add_argument("--text-samples", type=int, default=32, help="windows of it (32)")


def _machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")


def _memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-memory",
        default="",
        metavar="SIZE",
        help="most memory to hold, such as 4GiB: kept, or refused before work starts (no limit)",
    )


_NAMING = {
    "--method": "quantize",
    "--pruner": "prune",
    "--compensator": "compensate",
    "--narrow": "narrow",
    "--recover": "recover",
    "--drop-by": "measure",
    "--allocate": "allocate",
    "--by": "measure",
    "--sparsify": "sparsify",
    "--measure": "measure",  # several, with commas
}
# Commands that take the options of methods which they name.
_WITH_OPTIONS = frozenset({"inspect", "plan", "compress", "merge", "evaluate", "federate"})
# Commands that are a verb.
_VERBS = frozenset({"federate", "merge"})
# What a plan says for every layer, and so cannot be asked for beside one.
WISHES = (
    "--bits", "--budget", "--max-kl", "--allow", "--sensitivity", "--inputs", "--group",
    "--symmetric", "--no-symmetric", "--method", "--density", "--pruner", "--rank",
    "--compensator", "--activation", "--allocate", "--by", "--format", "--server",
    "--rotate", "--rotate-seed", "--scale-keys", "--tune", "--pattern", "--narrow", "--keep",
    "--widths", "--drop-blocks", "--drop-by", "--recover",
)  # fmt: skip


def named_methods(arguments: Sequence[str]) -> list[str]:
    """Ids of the methods that a command line names."""
    found: list[str] = []
    naming = {**_NAMING, "--method": verb_of_method(arguments)}
    for position, word in enumerate(arguments):
        flag, equals, value = word.partition("=")
        if flag in naming:
            value = value if equals else next(iter(arguments[position + 1 : position + 2]), "")
            names = [name for name in value.split(",") if name not in ("", "all", "none")]
            found += [f"{naming[flag]}/{name}" for name in names]
    return list(dict.fromkeys(found))


def verb_of_method(arguments: Sequence[str]) -> str:
    """The verb that `--method` names a method of: the command's own, where it has one."""
    command = next(iter(arguments), "")
    return command if command in _VERBS else _NAMING["--method"]


def option_flags(id: str) -> dict[str, inspect.Parameter]:
    """The options that a method takes beyond those of a plan, by the name of their flag."""
    from layerwise.core import catalogue

    method = catalogue.get(id)
    # What a plan sets for compression is a merge's own.
    own = method.options if method.verb == "merge" else method.own_options
    return {name.replace("_", "-"): option for name, option in own.items()}


def _flag(option: inspect.Parameter) -> dict[str, Any]:
    default = option.default
    if isinstance(default, bool):
        return {"action": argparse.BooleanOptionalAction, "default": None, "help": f"({default})"}
    kind = type(default) if default is not None else str
    if default is inspect.Parameter.empty:
        kind = str
    return {"type": kind, "default": None, "help": f"({default})", "metavar": kind.__name__}
