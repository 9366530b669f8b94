"""A tokenizer.json in the words of GGUF: what llama.cpp makes its tokenizer of.

llama.cpp has two that matter here.  `gpt2` merges bytes in the order of a list, after a rule that
it knows by name has split the text.  `llama` merges characters, the pair with the best score first.
It knows no other normalizers: what a tokenizer.json does beyond that (collapse spaces, compose
characters) is lost on llama.cpp.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layerwise.core.errors import UserError
from layerwise.core.extras import need
from layerwise.core.reading.checkpoint import Source
from layerwise.core.written import parse_json

_SPACE = "\u2581"  # a space, in vocabularies that come of SentencePiece
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Rules that split a text into words, by llama.cpp's names for them.
_SPLITS: Mapping[str, str] = {
    _CONTRACTIONS + _WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + _WORDS + r"\p{N}" + _REST: "qwen2",
}
# Files of tokenizers that are read through a tokenizer.json only.
_OTHERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_SPECIAL = ("bos", "eos", "unk", "pad")
# Below any rank: a token that no merge makes.
_UNMERGED = -1e6


def add_tokenizer(writer: Any, source: Source, vocabulary: int) -> None:
    """Write a model's tokenizer, or that it has none.

    Args:
        writer: A `gguf.GGUFWriter`.
        source: The model; its companions are looked through.
        vocabulary: Rows of the embeddings.

    Raises:
        UserError: llama.cpp has no tokenizer like it.
    """
    files = {file.name: file for file in source.companions}
    if "tokenizer.json" not in files:
        if other := next((name for name in _OTHERS if name in files), None):
            raise UserError(
                f"{source.label} has a {other} and no tokenizer.json.",
                "Make one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).",
            )
        writer.add_tokenizer_model("none")
        return
    file = files["tokenizer.json"]
    told = _read(file)
    model: Mapping[str, Any] = told["model"]
    if model.get("type", "BPE") != "BPE":
        raise _unknown(file, f"is a {model.get('type')} tokenizer")
    added = {token["id"]: token for token in told.get("added_tokens") or []}
    tokens = {id: token for token, id in model["vocab"].items()}
    tokens |= {id: token["content"] for id, token in added.items()}
    if max(tokens) >= vocabulary:
        raise UserError(
            f"{file} has a token {max(tokens)}, and the model's embeddings {vocabulary} rows.",
            "Take the tokenizer that belongs to the model.",
        )
    merges = [_pair(merge) for merge in model.get("merges") or []]
    rule = _rule(file, told)
    kinds = need("gguf", "writing GGUF files").TokenType
    spelled: list[str] = []
    types: list[int] = []
    for id in range(vocabulary):
        text = tokens.get(id, f"[PAD{id}]")
        kind = kinds.UNUSED if id not in tokens else kinds.NORMAL
        if text == model.get("unk_token"):
            kind = kinds.UNKNOWN
        elif id in added:
            kind = kinds.CONTROL if added[id]["special"] else kinds.USER_DEFINED
        elif rule is None and model.get("byte_fallback") and _is_byte(text):
            kind = kinds.BYTE
        # Added tokens are found in the text before its spaces are replaced.
        spelled.append(text.replace(_SPACE, " ") if kind == kinds.USER_DEFINED else text)
        types.append(int(kind))
    if rule is None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(spelled)
        writer.add_token_scores(_scores(tokens, merges, vocabulary))
        writer.add_add_space_prefix(_prefixes(told))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(rule)
        writer.add_token_list(spelled)
        writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_token_types(types)
    _add_special(writer, source, files, model, {text: id for id, text in tokens.items()})


def _read(file: Path) -> Mapping[str, Any]:
    try:
        return parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}", "Download it again.") from error


def _unknown(file: Path, problem: str) -> UserError:
    return UserError(
        f"{file} {problem}, which llama.cpp has no word for that is known here.",
        "Known: byte-level BPE as GPT-2, Llama 3, Qwen2 and SmolLM split it, and BPE that comes of "
        "SentencePiece; write --format dense, and use llama.cpp's own converter.",
    )


def _pair(merge: str | list[str]) -> tuple[str, str]:
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first, second


def _steps(part: Mapping[str, Any] | None, inside: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, one after the other."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [step for each in part[inside] for step in _steps(each, inside)]


def _rule(file: Path, told: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a text is split before bytes are merged; None for `llama`."""
    steps = _steps(told.get("pre_tokenizer"), "pretokenizers")
    *before, last = steps or [{"type": ""}]
    if last["type"] != "ByteLevel":
        if not _from_sentencepiece(told, steps):
            raise _unknown(file, "neither merges bytes nor writes spaces as SentencePiece does")
        return None
    if not told["model"].get("merges"):
        raise _unknown(file, "merges nothing")
    kinds = [step["type"] for step in before]
    own = last.get("use_regex", True)
    if own and not before:
        found = "gpt-2"
    elif own and kinds == ["Digits"] and before[0]["individual_digits"]:
        found = "smollm"
    elif not own and kinds == ["Split"] and before[0]["behavior"] == "Isolated":
        found = _SPLITS.get(before[0]["pattern"].get("Regex", ""), "")
    else:
        found = ""
    if not found or last.get("add_prefix_space"):
        raise _unknown(file, f"splits a text by a rule of its own ({kinds or 'ByteLevel'})")
    return found


def _from_sentencepiece(told: Mapping[str, Any], splits: Iterable[Mapping[str, Any]]) -> bool:
    normalizers = _steps(told.get("normalizer"), "normalizers")
    replaced = any(step.get("content") == _SPACE for step in normalizers)
    # After spaces are replaced there is none to split at.
    kinds = {step["type"] for step in splits}
    return kinds == {"Metaspace"} or (replaced and kinds <= {"Metaspace", "Split"})


def _prefixes(told: Mapping[str, Any]) -> bool:
    """Whether a text gets a space before it."""
    normalizers = _steps(told.get("normalizer"), "normalizers")
    splits = _steps(told.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Prepend" for step in normalizers) or any(
        step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
        for step in splits
    )


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _scores(
    tokens: Mapping[int, str], merges: Iterable[tuple[str, str]], vocabulary: int
) -> list[float]:
    """The earlier the first merge that makes a token, the higher its score."""
    ranks: dict[str, float] = {}
    for rank, (first, second) in enumerate(merges):
        ranks.setdefault(first + second, -float(rank))
    return [ranks.get(tokens.get(id, ""), _UNMERGED) for id in range(vocabulary)]


def _add_special(
    writer: Any,
    source: Source,
    files: Mapping[str, Path],
    model: Mapping[str, Any],
    ids: Mapping[str, int],
) -> None:
    """Ids of special tokens, which of them frame a text, and the template of chats."""
    named = _read(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    chosen: dict[str, int] = {}
    for kind in _SPECIAL:
        token = named.get(f"{kind}_token") or (model.get("unk_token") if kind == "unk" else None)
        token = token["content"] if isinstance(token, dict) else token
        given = source.config.get(f"{kind}_token_id")
        given = given[0] if isinstance(given, list) and given else given
        id = ids.get(token, given) if isinstance(token, str) else given
        if isinstance(id, int) and id >= 0:
            chosen[kind] = id
            getattr(writer, f"add_{kind}_token_id")(id)
    reader = need("tokenizers", "writing GGUF files").Tokenizer.from_file(
        str(files["tokenizer.json"])
    )
    plain, framed = (reader.encode("a", add_special_tokens=added).ids for added in (False, True))
    start = len(framed) > len(plain) and framed[0] == chosen.get("bos")
    end = len(framed) > len(plain) + start and framed[-1] == chosen.get("eos")
    writer.add_add_bos_token(start)
    writer.add_add_eos_token(end)
    template: Any = named.get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].read_text(encoding="utf-8")
    if template:
        writer.add_chat_template(template)
