"""Tokenizers as files: their tokens in order, whether two cut texts alike, and one that knows several' tokens."""

from __future__ import annotations

import copy
import filecmp
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_zoo.errors import MergeError

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
_TOKENIZER_FILES = re.compile(
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.(jinja|json)"
)
# Older ways of writing the same tokens. Beside a new tokenizer.json they would contradict it.
_OLDER_FILES = re.compile(r"vocab.*\.(txt|json)|merges\.txt|added_tokens\.json|.*\.(model|spm|codes)")
_KINDS = ("WordPiece", "WordLevel", "BPE", "Unigram")
# Fields of a tokenizer's model that hold the tokens themselves or only speed it up.
_NOT_COMPARED = frozenset({"vocab", "merges", "unk_id", "cache_capacity"})


@dataclass(frozen=True)
class TokenizerContent:
    """A tokenizer as it lies in a file.

    Attributes:
        source: Whose it is, for messages.
        content: The content of its `tokenizer.json`.
        files: Its files by name.
    """

    source: str
    content: Mapping[str, Any]
    files: Mapping[str, Path]

    @cached_property
    def pieces(self) -> dict[str, int]:
        """Token -> number, without those put on top."""
        vocabulary = self.content["model"]["vocab"]
        if isinstance(vocabulary, list):
            return {piece: number for number, (piece, _) in enumerate(vocabulary)}
        return dict(vocabulary)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Token -> number, in the order of the numbers."""
        added = {entry["content"]: entry["id"] for entry in self.content.get("added_tokens") or ()}
        return dict(sorted({**self.pieces, **added}.items(), key=lambda item: item[1]))

    @cached_property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs a BPE tokenizer joins, in order; nothing for other kinds."""
        return [
            (pair.partition(" ")[0], pair.partition(" ")[2]) if isinstance(pair, str) else (pair[0], pair[1])
            for pair in self.content["model"].get("merges") or ()
        ]

    @property
    def kind(self) -> str:
        """`WordPiece`, `WordLevel`, `BPE` or `Unigram`."""
        model = self.content["model"]
        return str(model.get("type") or ("Unigram" if isinstance(model["vocab"], list) else "BPE"))


def read_tokenizer(folder: Path, source: str) -> TokenizerContent | None:
    """Read a model's tokenizer; null where it has none.

    Args:
        folder: The model's folder.
        source: Whose it is, for messages.

    Raises:
        MergeError: If it is of an older form nothing here can read.
    """
    files = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and (_TOKENIZER_FILES.fullmatch(path.name) or _OLDER_FILES.fullmatch(path.name))
    }
    if TOKENIZER_FILE in files:
        return TokenizerContent(source, json.loads(files[TOKENIZER_FILE].read_text(encoding="utf-8")), files)
    if not any(_OLDER_FILES.fullmatch(name) for name in files):
        return None
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
        raise MergeError(f"{source}: its tokenizer cannot be read: {' '.join(str(error).split())}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # its tokens can be matched all the same, though not joined with others'
        model = {"type": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
        return TokenizerContent(source, {"model": model}, files)
    return TokenizerContent(source, json.loads(backend.to_str()), files)


def hold_same_tokens(one: Path, other: Path) -> bool:
    """Whether the files that hold two models' tokens are there and equal, byte for byte."""
    names = [
        {path.name for path in folder.iterdir() if path.name == TOKENIZER_FILE or _OLDER_FILES.fullmatch(path.name)}
        for folder in (one, other)
    ]
    if not names[0] or names[0] != names[1]:
        return False
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names[0])


def describe_difference(first: TokenizerContent, other: TokenizerContent) -> str | None:
    """Return how two tokenizers' tokens differ, with numbers and the first of them; null where they do not."""
    if first.tokens == other.tokens and first.merges == other.merges and first.kind == other.kind:
        return None
    if first.kind != other.kind:
        return f"one is a {first.kind} tokenizer, the other a {other.kind}"
    parts = [f"{len(first.tokens)} tokens and {len(other.tokens)}"]
    for one, two in ((first, other), (other, first)):
        alone = [token for token in one.tokens if token not in two.tokens]
        if alone:
            parts.append(f"{len(alone)} only in {one.source} ({_listed(alone)})")
    moved = [token for token, number in first.tokens.items() if other.tokens.get(token, number) != number]
    if moved:
        token = moved[0]
        parts.append(
            f"{len(moved)} under another number (first {token!r}: {first.tokens[token]} and {other.tokens[token]})"
        )
    if len(parts) == 1:
        parts.append("the same tokens, joined in another order")
    return "; ".join(parts)


def joined_tokenizer(parts: Sequence[TokenizerContent], more: Iterable[str] = ()) -> dict[str, Any]:
    """Make one tokenizer that knows the tokens of several.

    The first one's tokens keep their numbers, new ones follow in the order of their tokenizers. Pairs BPE joins are
    put behind the first one's. What was put on top in any of them is put on top.

    Args:
        parts: The tokenizers, alike in everything but tokens.
        more: Further tokens to put on top.

    Returns:
        The content of a `tokenizer.json`.

    Raises:
        MergeError: If they cut texts in different ways, so that no one tokenizer could stand for them.
    """
    first, kind = parts[0], parts[0].kind
    for other in parts[1:]:
        _check_alike(first, other)
    content = copy.deepcopy(dict(first.content))
    numbers, pieces, merges = dict(first.tokens), dict(first.pieces), dict.fromkeys(first.merges)
    added = {entry["content"]: entry for entry in content.get("added_tokens") or ()}
    scores = dict(first.content["model"]["vocab"]) if kind == "Unigram" else {}
    free = max(numbers.values(), default=-1) + 1
    for other in parts[1:]:
        for token in other.tokens:
            if token not in numbers:
                numbers[token], free = free, free + 1
            if token in other.pieces:
                pieces.setdefault(token, numbers[token])
        if kind == "Unigram":
            scores = dict(other.content["model"]["vocab"]) | scores
        merges |= dict.fromkeys(other.merges)
        for entry in other.content.get("added_tokens") or ():
            added.setdefault(entry["content"], {**entry, "id": numbers[entry["content"]]})
    for token in more:
        if token not in numbers:
            numbers[token], free = free, free + 1
            added[token] = _put_on_top(token, numbers[token])
    content["added_tokens"] = sorted(added.values(), key=lambda entry: entry["id"])
    if kind == "Unigram":
        content["model"]["vocab"] = _unigram_pieces(first.source, numbers, scores)
    else:
        content["model"]["vocab"] = dict(sorted(pieces.items(), key=lambda item: item[1]))
    if kind == "BPE":
        content["model"]["merges"] = [list(pair) for pair in merges]
    return content


def tokenizer_files(owner: TokenizerContent, content: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a tokenizer made of another one, and check that they load with the very tokens wanted.

    Args:
        owner: The tokenizer whose settings it keeps.
        content: The content of its `tokenizer.json`.

    Returns:
        Name -> content; older forms of the tokens are left out.

    Raises:
        MergeError: If what is loaded of them has other tokens.
    """
    made = TokenizerContent(owner.source, content, {})
    files = {name: path.read_bytes() for name, path in owner.files.items() if not _OLDER_FILES.fullmatch(name)}
    files[TOKENIZER_FILE] = json.dumps(content, ensure_ascii=False, indent=2).encode()
    settings = json.loads(files.get(SETTINGS_FILE, b"{}"))
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in content["added_tokens"]
        }
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    files[SETTINGS_FILE] = (json.dumps(settings, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()
    loaded = _loaded_tokens(files, owner.source)
    wrong = [token for token in made.tokens if loaded.get(token) != made.tokens[token]]
    wrong += [token for token in loaded if token not in made.tokens]
    if wrong:
        raise MergeError(
            f"{owner.source}: a tokenizer with the tokens of all members does not load as it was made: {len(wrong)} "
            f"tokens are others ({_listed(wrong)}). Use the tokens of one of them (`tokenizer: base`)"
        )
    return files


def older_files(owner: TokenizerContent) -> tuple[str, ...]:
    """Return the names of files that hold a tokenizer's tokens in an older form."""
    return tuple(name for name in owner.files if _OLDER_FILES.fullmatch(name))


def _check_alike(first: TokenizerContent, other: TokenizerContent) -> None:
    kinds = [one.kind for one in (first, other)]
    unknown = [kind for kind in kinds if kind not in _KINDS]
    if unknown:
        raise MergeError(f"a {unknown[0]} tokenizer cannot be joined with others: known are {', '.join(_KINDS)}")
    if kinds[0] != kinds[1]:
        raise MergeError(
            f"{first.source} has a {kinds[0]} tokenizer and {other.source} a {kinds[1]}: no tokenizer knows the "
            "tokens of both. Use the tokens of one of them (`tokenizer: base`)"
        )
    differing = [
        part
        for part in ("normalizer", "pre_tokenizer", "decoder")
        if _plain(first.content.get(part)) != _plain(other.content.get(part))
    ]
    models = [first.content["model"], other.content["model"]]
    fields = {key for model in models for key in model if model[key] is not None} - _NOT_COMPARED
    differing += [
        f"model.{key}" for key in sorted(fields) if (models[0].get(key) or None) != (models[1].get(key) or None)
    ]
    if kinds[0] == "Unigram" and _unknown_piece(models[0]) != _unknown_piece(models[1]):
        differing.append("model.unk_id")
    if differing:
        raise MergeError(
            f"the tokenizers of {first.source} and {other.source} cut texts in different ways ({', '.join(differing)} "
            "differ), so no one tokenizer can stand for both. Use the tokens of one of them (`tokenizer: base`)"
        )


def _unigram_pieces(source: str, numbers: Mapping[str, int], scores: Mapping[str, float]) -> list[list[Any]]:
    """Return pieces at their numbers: what stands on top is matched first, so its score does not matter."""
    by_number = {number: token for token, number in numbers.items()}
    if sorted(by_number) != list(range(len(by_number))):
        raise MergeError(
            f"{source}: the numbers of its tokens have gaps, which a Unigram tokenizer with further tokens cannot "
            "have. Use the tokens of one member (`tokenizer: base`)"
        )
    return [[by_number[number], float(scores.get(by_number[number], 0.0))] for number in range(len(by_number))]


def _loaded_tokens(files: Mapping[str, bytes], source: str) -> dict[str, int]:
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            return AutoTokenizer.from_pretrained(folder).get_vocab()
        except (ValueError, OSError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise MergeError(
                f"{source}: a tokenizer with the tokens of all members cannot be made: {reason}"
            ) from error


def _put_on_top(token: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return {"id": number, "content": token, "normalized": True, **flags}


def _unknown_piece(model: Mapping[str, Any]) -> str | None:
    return None if model.get("unk_id") is None else str(model["vocab"][model["unk_id"]][0])


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _listed(tokens: Sequence[str]) -> str:
    return ", ".join(map(repr, tokens[:3])) + (", ..." if len(tokens) > 3 else "")
