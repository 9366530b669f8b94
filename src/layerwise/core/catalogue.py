"""The contract of a method, and the catalogue of methods.

A method is one public function in one file, `layerwise/<verb>/<name>.py`, under its verb's
decorator.  Its positional parameters name the evidence it reads, in the words of EVIDENCE;
its keyword-only parameters are its options.  What the method needs, its command-line flags
and its page in the docs are all read from that signature: nothing is declared twice.
"""

import difflib
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, Literal, ParamSpec, TypeVar, get_args

from layerwise.core.activation import Scheme
from layerwise.core.errors import UserError
from layerwise.core.learning import Learned
from layerwise.core.results import Coded, Quantized

Need = Literal["nothing", "running", "calibration", "labels", "gradients", "models", "clients"]

VERBS = (
    "measure",
    "allocate",
    "quantize",
    "prune",
    "narrow",
    "recover",
    "compensate",
    "sparsify",
    "merge",
    "federate",
)

# Evidence, and what must happen before it can be given to a method.
EVIDENCE: Mapping[str, Need] = MappingProxyType(
    {
        "weight": "nothing",  # (out, in), one linear layer
        "weights": "nothing",  # one tensor per layer, readable more than once
        "shapes": "nothing",  # one tuple per item, the sides of its weight
        "filters": "nothing",  # (in, fan), what makes each channel that the layer reads
        "shifts": "nothing",  # (in,), what is added to each of those channels
        "kept": "nothing",  # (out, in), True where a weight was not pruned
        "approximation": "nothing",  # (out, in), what a transform made of the weight
        "scores": "nothing",  # (items,), from a measure; higher is more important
        "costs": "nothing",  # one (levels,) per item, ascending: bytes or weights kept
        "errors": "nothing",  # one (levels,) per item, the error at each level
        "columns": "nothing",  # (in,), the norm of what each input is multiplied by
        "activations": "running",  # (tokens, in), what the layer reads as the model runs
        "queries": "running",  # (batch, heads, tokens, size), what attention asks with
        "keys": "running",  # (batch, key heads, tokens, size), what it compares them with
        "attentions": "running",  # (batch, heads, tokens, tokens), rows of it sum to 1
        "inputs": "calibration",  # (tokens, in), what the layer or block saw
        "outputs": "calibration",  # (tokens, out), what the layer or block answered
        "norm": "calibration",  # (in,), root of the mean of x^2 over tokens
        "norms": "calibration",  # one (in,) per layer of a block, the norm of what it reads
        "mean": "calibration",  # (in,), mean of x over tokens
        "variance": "calibration",  # (in,), mean of (x - mean)^2 over tokens
        "gram": "calibration",  # (in, in), mean of x x^T over tokens
        "magnitude": "calibration",  # (in,), mean of |x| over tokens
        "peak": "calibration",  # (in,), max of |x| over tokens
        "attention": "calibration",  # (windows, length), what tokens received in all heads
        "slopes": "calibration",  # (windows,), of the loss along a random direction each
        # (tokens, width), what a block answers where the model's embeddings are disturbed.
        "disturbed": "calibration",
        # Of a model and of another: what the other's block answers to the same text; the mean loss
        # of both, (2,); and that of the first, (points,), while a layer alone, or a block and all
        # before it, goes to the other's in even steps.
        "base_outputs": "calibration",
        "base_states": "calibration",  # the same of each block of the other, which may be deeper
        "ends": "calibration",
        "path": "calibration",
        "growing_path": "calibration",
        "deep_path": "calibration",  # the same with all after the block instead
        "random_path": "calibration",  # and with all that come before it in a random order
        # Of a curve that was trained between both: its middle, (out, in); its loss, (points,).
        "bend": "calibration",
        "curve": "calibration",
        # Of a block: what it does to the residual stream, and what hangs on that.
        "positions": "calibration",  # (tokens,), the place in its window of each of `inputs`
        "updates": "calibration",  # one (tokens, width) for each addition to the stream, in order
        # A function of a direction, (tokens, width), to the derivative along it of what the block
        # answers; and what the block is given, what it answers and what each later one does, one
        # (shown, width) each, of the first tokens.
        "jacobian": "calibration",
        "later_states": "calibration",
        # Log-probabilities of the next token, one (windows, length, vocabulary) per batch of the
        # first windows, readable more than once: as the model answers; as it would if its stream
        # ended before the block; without the block; without it for all tokens of a window but the
        # first; without it for the tokens of a window's first half, less its first.
        "answers": "calibration",
        "lens": "calibration",
        "removed": "calibration",
        "skipped": "calibration",
        "frozen": "calibration",
        "ids": "calibration",  # (windows, length), the tokens of those windows
        # (windows, heads, length, length), a block's attention, rows of it sum to 1, on windows of
        # tokens drawn at random, no two alike, and then the same tokens once more.
        "echoes": "calibration",
        # (windows, length - 1), what each token of the block's input brings to the answer.
        "attributions": "calibration",
        # Log-probabilities as above, with one token of the block's input erased.
        "erased": "calibration",
        # (later, windows, length): how far what each later block adds to the stream changes when
        # the block is `skipped` or `frozen`, as a share of what it adds else.
        "skip_effects": "calibration",
        "freeze_effects": "calibration",
        "states": "labels",  # (examples, width), what a block answers at a text's last token
        "labels": "labels",  # (examples,), the class of each text, from 0
        "grad": "gradients",  # (out, in), mean gradient of the loss
        # (answers, features), gradients of some of a model's answers by the weight; of the other's.
        "tangents": "gradients",
        "base_tangents": "gradients",
        # A function of a direction, (out, in): the Hessian of the mean loss by the weight times it.
        "hessian": "gradients",
        "base": "models",  # (...), the common ancestor's tensor
        "models": "models",  # (models, ...), the same tensor of every model
        "shares": "models",  # (models,), how much each model counts
        "cuts": "models",  # (models,), the magnitude from which differences from the base are kept
        "products": "models",  # (models, models), inner products of whole tensors
        "entries": "models",  # (...), where in its whole tensor each entry lies
        "seeds": "models",  # (models,), a number for each model and tensor, of its content
        "networks": "models",  # one mapping of names to tensors for each model
        "origin": "models",  # the common ancestor's tensors by name
        "first": "models",  # which of the models was given first
        "symmetries": "models",  # what can be permuted in a model without changing its function
        "grams": "calibration",  # (models, in, in), what each model's layer reads; None if unknown
        # By tensor of a layer, (models in + 1, ...): mean of x x^T, where x is what it reads of one
        # text in all models, one after the other, and 1.
        "moments": "calibration",
        "fishers": "calibration",  # (models, ...), mean squared gradients of each model's loss
        "loss": "calibration",  # what a model with such tensors loses on a text, a function
        "server": "clients",  # (...), the global model's tensor before the round
        "clients": "clients",  # (clients, ...), the same tensor as each client returned it
        "counts": "clients",  # (clients,), samples that each client learned from
        "state": "clients",  # tensors by name, what the method kept the round before; first none
        "grads": "clients",  # (clients, ...), the gradient of such a tensor at each client
        "place": "clients",  # which of the layers with a mask it is, from the output, of how many
        "proxy": "clients",  # loss on the server's own examples, of such a tensor as `server`
    }
)
# Evidence of another model than the one that is looked at, whatever else it takes to gather it.
PAIRED = frozenset(
    {"base", "base_outputs", "base_states", "base_tangents"}
    | {"ends", "path", "growing_path", "deep_path", "random_path", "bend", "curve"}
)
# What a model of other layers can give, too.
UNLIKE = frozenset({"base_states"})
# Evidence that takes running the whole model many times.
LONG = frozenset({"hessian", "bend", "curve", "attributions"})
# What a text that the model reads can show.
GATHERED = frozenset[Need]({"calibration", "gradients"})
_CHEAPEST_FIRST: tuple[Need, ...] = (
    "nothing",
    "running",
    "calibration",
    "labels",
    "gradients",
    "models",
    "clients",
)

# Options that a plan says for each layer, or a budget for all of them; `fold` says whether
# something that feeds the layer can take its scales.
_PLANNED = frozenset({"bits", "group", "symmetric", "density", "rank", "budget", "fold"})
# Verbs whose work no plan says.
_UNPLANNED = frozenset({"federate", "merge"})

# How the rows of a weight hang together, which tells core how it may cut or stack them:
#   entry        an entry's result depends on that entry of each tensor alone: a tensor may be cut
#                anywhere without changing a bit of the result
#   independent  a row's result depends on that row alone: rows may be streamed in slices, and
#                layers that read the same input stacked, without changing a bit of the result
#   layer        a row's result depends on its whole layer (the default)
#   input        layers that read the same input must be given together, stacked by rows
Rows = Literal["entry", "independent", "layer", "input"]

# What a method is given at once: one layer's tensor, what belongs to a block, or the parameters of
# a whole model, flat and one after the other.
Unit = Literal["layer", "block", "model"]

# What the codes of a quantizer stand for, which tells a format whether it has a place for them:
#   integer   evenly spaced points, code - zero
#   float8    the values of an 8-bit float (E4M3, finite only); the codes are its bit patterns
#   points    points that lie anyhow, the same for a whole layer
#   outliers  evenly spaced points, and entries that are kept beside them: the fraction that there
#             is room for is the method's option `outliers`
#   own       what the method's own class says
Codes = Literal["integer", "float8", "points", "outliers", "own"]
ALL_CODES: frozenset[Codes] = frozenset(get_args(Codes))
# Those that a mask can be laid over: a pruned weight has the code of 0.0.
MASKABLE = frozenset[Codes]({"integer", "float8", "points"})

# Widths of a code that a quantizer has unless it says otherwise.
WIDTHS: Sequence[int] = range(1, 17)

P = ParamSpec("P")
R = TypeVar("R")

_PLUGINS = "layerwise.methods"


class ContractError(TypeError):
    """A function was registered whose signature breaks its verb's contract."""


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method was published; `arxiv` is empty for a baseline without a paper there."""

    title: str
    year: int
    arxiv: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """One inequality a paper reports, restated so that a small machine can check it.

    Reads: on `bench`, at `options`, the method's loss is below that of `beats` by at least
    the fraction `margin`.  `source` is the table or figure of the paper that says so.
    """

    beats: str
    bench: str
    options: Mapping[str, Any]
    margin: float
    source: str


@dataclass(frozen=True)
class Method:
    """One entry of the catalogue."""

    verb: str
    name: str
    run: Callable[..., Any]
    paper: Paper
    claims: tuple[Claim, ...]
    exempt: Mapping[str, str]
    rows: Rows
    unit: Unit
    codes: Codes = "integer"
    widths: Sequence[int] = WIDTHS
    nested: bool = False
    stores: type[Coded] = Quantized
    activates: Scheme | Literal[""] = ""
    learns: Callable[..., Learned] | None = None
    settles: Callable[..., Mapping[str, Any]] | None = None
    fine: bool = False
    across: Callable[[Sequence[Mapping[str, float]]], Mapping[str, float]] | None = None
    begins: Callable[..., Mapping[str, Mapping[str, Any]]] | None = None
    evidence: tuple[str, ...] = field(init=False)
    options: Mapping[str, inspect.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        """Read evidence and options off the signature."""
        parameters = inspect.signature(self.run).parameters.values()
        options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
        object.__setattr__(
            self, "evidence", tuple(p.name for p in parameters if p.name not in options)
        )
        object.__setattr__(self, "options", MappingProxyType(options))

    @property
    def id(self) -> str:
        """`verb/name`, as the command line spells it."""
        return f"{self.verb}/{self.name}"

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.run) or "").partition("\n")[0]

    @property
    def needs(self) -> Need:
        """The dearest evidence the method reads."""
        if PAIRED.intersection(self.evidence):
            return "models"
        return _CHEAPEST_FIRST[max(_CHEAPEST_FIRST.index(EVIDENCE[w]) for w in self.evidence)]

    @property
    def calibrated(self) -> bool:
        """It reads what only a calibration text can show."""
        return any(EVIDENCE[word] in GATHERED for word in self.evidence)

    @property
    def labelled(self) -> bool:
        """It reads what only texts of known classes can show."""
        return any(EVIDENCE[word] == "labels" for word in self.evidence)

    @property
    def own_options(self) -> dict[str, inspect.Parameter]:
        """The options that neither a layer's plan nor a budget sets."""
        planned = frozenset[str]() if self.verb in _UNPLANNED else _PLANNED
        return {name: option for name, option in self.options.items() if name not in planned}

    @property
    def merges(self) -> int | None:
        """How many models it merges, as the shape of `models` says; None for any number."""
        shape = inspect.signature(self.run).parameters.get("models")
        first = getattr(getattr(shape, "annotation", None), "dim_str", "").split(" ")[0]
        return int(first) if first.isdigit() else None

    @property
    def must_fold(self) -> bool:
        """It cannot be used on a layer that nothing feeds which can take its scales."""
        return self.rows == "input" and "fold" not in self.options

    def accepts(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the given options that this method has."""
        return {name: value for name, value in given.items() if name in self.options}


_methods: dict[str, Method] = {}


@dataclass(frozen=True, slots=True)
class Verb(Generic[R]):
    """A decorator that admits functions returning `R` and taking the options in `requires`."""

    name: str
    requires: frozenset[str] = frozenset()

    def __call__(
        self,
        paper: Paper,
        *,
        claims: tuple[Claim, ...] = (),
        exempt: Mapping[str, str] = MappingProxyType({}),
        rows: Rows = "layer",
        unit: Unit = "layer",
        codes: Codes = "integer",
        widths: Sequence[int] = WIDTHS,
        nested: bool = False,
        stores: type[Coded] = Quantized,
        activates: Scheme | Literal[""] = "",
        learns: Callable[..., Learned] | None = None,
        settles: Callable[..., Mapping[str, Any]] | None = None,
        fine: bool = False,
        across: Callable[[Sequence[Mapping[str, float]]], Mapping[str, float]] | None = None,
        begins: Callable[..., Mapping[str, Mapping[str, Any]]] | None = None,
    ) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Enter the decorated function in the catalogue and return it unchanged.

        Args:
            paper: Where the method was published.
            claims: The inequalities that `layerwise claims` checks; baselines have none.
            exempt: Laws this method breaks by design, each with the reason.
            rows: How the rows of a weight hang together; a law holds methods to it.
            unit: What a measure scores, codes are learned for or clients are joined in: one layer,
                one block with all its layers, or the whole model.
            codes: What the codes of a quantizer stand for.
            widths: Bits that a code of a quantizer may have, ascending.
            nested: The correction of a lower rank is the first part of one of a higher rank; an
                allocator's levels for less are for no item higher than those for more.
            stores: What a quantizer returns, which says how its codes are stored.
            activates: How a quantizer rounds the inputs of its layers where the plan does not
                say; some of them may have a scale for each token where others have one for all.
            learns: What makes a layer whose codes are to be learned, from the same arguments.  With
                the unit "block" those of a block are learned together where a model runs block by
                block; the function itself learns those of one layer.
            settles: What a quantizer makes of a plan when the plan is made, for layouts are known
                before weights are read: takes the weight, (out, in), and every option, and returns
                fields of the layer's plan, of which `why` says the reason.
            fine: An allocator by scores sets each item's density by itself, and is offered many.
            across: What a measure says of the whole model: numbers by name, from its records of
                all blocks (or layers) in their order.
            begins: What gives a federation's state before its first round: takes the weights that
                may be masked, by name, what tells the loss over all clients with such weights in
                the model's place, a generator, and those options of the method that it has.

        Raises:
            ContractError: The function's file, name or parameters break the contract.
        """

        def register(run: Callable[P, R]) -> Callable[P, R]:
            name = getattr(run, "__name__", "")
            method = Method(
                self.name,
                name,
                run,
                paper,
                claims=claims,
                exempt=exempt,
                rows=rows,
                unit=unit,
                codes=codes,
                widths=widths,
                nested=nested,
                stores=stores,
                activates=activates,
                learns=learns,
                settles=settles,
                fine=fine,
                across=across,
                begins=begins,
            )
            self._check(method)
            _methods[method.id] = method
            return run

        return register

    def _check(self, method: Method) -> None:
        home = f"layerwise.{self.name}.{method.name}"
        module = method.run.__module__
        if module.startswith("layerwise.") and module != home:
            raise ContractError(f"{method.id} must live in {home}, not {module}")
        if unknown := [word for word in method.evidence if word not in EVIDENCE]:
            raise ContractError(f"{method.id} reads {unknown}; evidence is one of {list(EVIDENCE)}")
        if missing := self.requires - method.options.keys():
            raise ContractError(f"{method.id} must take the options {sorted(missing)}")
        if method.learns and "steps" not in method.options:
            raise ContractError(f"{method.id} learns, and must take the option steps")
        if not method.run.__doc__:
            raise ContractError(f"{method.id} has no docstring")


def get(id: str) -> Method:
    """The method called `verb/name`; imports that method's file and no other.

    Raises:
        UserError: There is no such method; the message names the closest ones.
    """
    verb, _, name = id.partition("/")
    if not name:
        ids = [f"{one}/{known}" for one in VERBS for known in _names(one)]
        close = [known for known in ids if known.endswith(f"/{verb}")]
        raise UserError(
            f"{id!r} is not written as verb/name.",
            f"Write {close[0]}." if close else "`layerwise methods` lists them all.",
        )
    if id not in _methods:
        names = _names(verb)
        if name not in names:
            close = difflib.get_close_matches(name, names) or names
            raise UserError(
                f"there is no method {id!r}.",
                f"Closest: {', '.join(f'{verb}/{n}' for n in close)}. "
                f"`layerwise methods {verb}` lists them all.",
            )
        names[name]()
    return _methods[id]


def methods(verb: str) -> list[Method]:
    """Every method of a verb, by name."""
    return [get(f"{verb}/{name}") for name in _names(verb)]


def _names(verb: str) -> dict[str, Callable[[], object]]:
    """What imports each method.  The folder is the list: there is none to keep in step with it.

    Packages outside join through the entry-point group `layerwise.methods`, with entries
    named `verb/name` that point at the function.
    """
    if verb not in VERBS:
        raise UserError(f"there is no verb {verb!r}.", f"The verbs are {', '.join(VERBS)}.")
    package = importlib.import_module(f"layerwise.{verb}")
    found: dict[str, Callable[[], object]] = {}
    for entry in importlib.metadata.entry_points(group=_PLUGINS):
        entry_verb, _, name = entry.name.partition("/")
        if entry_verb == verb:
            found[name] = entry.load
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        name = module.name.rpartition(".")[2]
        if not name.startswith("_"):
            found[name] = lambda path=module.name: importlib.import_module(path)
    return dict(sorted(found.items()))
