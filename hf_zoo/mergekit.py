"""mergekit's YAML read into plain data of a merge here.

The meaning is that of mergekit 0.1.5. A value is looked for at a source, then its slice, then the whole file; of a
list of filters the first counts whose text stands anywhere in the tensor's name. A list of numbers is a gradient over
the blocks of a slice: block i of n gets the value at i / (n - 1), the only block of a slice the last value, and what
lies outside the blocks the first. Nothing of mergekit's is imported, and every default is written out, so that ours,
which are the papers', do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_zoo.errors import RecipeError, nearest
from hf_zoo.mergekit_values import value_of_slices
from hf_zoo.recipe.reading import ReadingError, read_yaml

REQUIRED: Any = object()
DTYPES = ("float16", "bfloat16", "float32", "float64")
_TOP = ("merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype", "tokenizer",
        "tokenizer_source", "chat_template")  # fmt: skip
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class _Terms:
    """What a method of mergekit takes: name -> kind and default, for the whole merge and for each member."""

    base: Literal["required", "optional", "none"]
    shared: Mapping[str, tuple[type, Any]] = field(default_factory=dict)
    of_members: Mapping[str, tuple[type, Any]] = field(default_factory=dict)
    members: tuple[int, int | None] = (1, None)  # without the base


def _task_vectors(normalize: bool, rescale: bool, **more: tuple[type, Any]) -> _Terms:
    shared = {"normalize": (bool, normalize), "rescale": (bool, rescale), "lambda": (float, 1.0)}
    return _Terms("required", shared, {"weight": (float, REQUIRED), "density": (float, 1.0), **more})


METHODS: dict[str, _Terms] = {
    "linear": _Terms("none", {"normalize": (bool, True)}, {"weight": (float, REQUIRED)}),
    "slerp": _Terms("required", {"t": (float, REQUIRED)}, members=(1, 1)),
    "nuslerp": _Terms(
        "optional",
        {"nuslerp_row_wise": (bool, False), "nuslerp_flatten": (bool, True)},
        {"weight": (float, REQUIRED)},
        (2, 2),
    ),
    "multislerp": _Terms(
        "optional", {"normalize_weights": (bool, True), "eps": (float, 1e-8)}, {"weight": (float, REQUIRED)}
    ),
    "karcher": _Terms("none", {"max_iter": (int, 10), "tol": (float, 1e-5)}),
    "model_stock": _Terms("required", {"filter_wise": (bool, False)}, members=(2, None)),
    "nearswap": _Terms("required", {"t": (float, REQUIRED)}, members=(1, 1)),
    "arcee_fusion": _Terms("required", members=(1, 1)),
    "task_arithmetic": _task_vectors(False, False),
    "ties": _task_vectors(True, False),
    "dare_linear": _task_vectors(False, True),
    "dare_ties": _task_vectors(False, True),
    "breadcrumbs": _task_vectors(False, False, gamma=(float, 0.01)),
    "breadcrumbs_ties": _task_vectors(False, False, gamma=(float, 0.01)),
    "della": _task_vectors(True, True, epsilon=(float, 0.15)),
    "della_linear": _task_vectors(False, True, epsilon=(float, 0.15)),
    "sce": _Terms("required", {"select_topk": (float, 1.0)}),
    "ram": _Terms("required", {"epsilon": (float, 1e-5)}),
    "ramplus_tl": _Terms("required", {"r": (float, 0.1), "alpha": (float, 0.2), "epsilon": (float, 1e-5)}),
    "passthrough": _Terms("none", {}, {"scale": (float, 1.0)}, (1, 1)),
}
BASE_FIRST = ("slerp", "nearswap")  # from the base, the first member here, to the other
# Say how to compute, not what.
_NO_EFFECT = {"int8_mask": "how mergekit stores a mask; it changes no value here"}


def is_mergekit(content: Any) -> bool:
    """Whether the content of a YAML file is a merge in mergekit's form."""
    return isinstance(content, Mapping) and "merge_method" in content


def read_mergekit(path: str | Path) -> dict[str, Any]:
    """Read a merge in mergekit's YAML; see `translate`.

    Raises:
        RecipeError: If it cannot be read, or anything in it is unknown or of a wrong kind; names all of it.
    """
    try:
        content = read_yaml(Path(path).read_text(encoding="utf-8"))
    except ReadingError as error:
        raise RecipeError(str(path), error.mistakes) from error
    except OSError as error:
        raise RecipeError(str(path), [f"cannot be read: {error}"]) from error
    return translate(content, str(path))


def translate(content: Any, source: str = "mergekit") -> dict[str, Any]:
    """Turn the content of a mergekit YAML into a merge's plain data.

    Args:
        content: The content.
        source: Its file, for messages.

    Returns:
        `method`: mergekit's name of it. `members`: the models to merge, without the base, unless the method has none
        (then the base is a member like the others) or walks from it (`BASE_FIRST`: then it comes first). `base`: the
        base, or null. `parameters`: name -> value, with mergekit's names and defaults. `slices`: the slices with their
        sources in the members' order, or null. `dtype`: the type tensors are read in, `out_dtype`: the type written;
        null keeps the members'. `tokenizer`: null, or `source`, `base` (whose rows come first), `tokens` and
        `pad_to_multiple_of`. `chat_template`: as written. `notes`: what was left out, and why that changes nothing.

        A value is a scalar, `{"layers": [...]}` (a gradient), `{"filters": [[text, value], ...]}` (`*` fits all),
        `{"slices": [...]}` with a value a slice, or `{"members": [...]}` with a value a member.

    Raises:
        RecipeError: If anything is unknown, missing or of a wrong kind; names all of it.
    """
    reader = _Reader(content if isinstance(content, Mapping) else {})
    if not isinstance(content, Mapping):
        reader.wrong("", f"expected a mapping with `merge_method`, got {_shown(content)}")
    translated = reader.translate() if not reader.mistakes else {}
    if reader.mistakes:
        raise RecipeError(source, reader.mistakes)
    return translated


class _Reader:
    """Translate, and collect what is wrong."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.mistakes: list[str] = []
        self.notes: list[str] = []

    def wrong(self, path: str, message: str) -> None:
        self.mistakes.append(f"{path}: {message}" if path else message)

    def translate(self) -> dict[str, Any]:
        self._check_keys(self.content, _TOP, "")
        name = self.content.get("merge_method")
        if name not in METHODS:
            known = ", ".join(METHODS)
            self.wrong("merge_method", f"unknown {name!r}{nearest(str(name), list(METHODS))}: known are {known}")
            return {}
        terms, base = METHODS[str(name)], self._model(self.content.get("base_model"), "base_model")
        inputs = self._inputs()
        if inputs is None:
            return {}
        models, slices = inputs
        if slices is None:
            slices = [{"sources": models, "parameters": None}]
        arranged = [self._arranged(str(name), terms, base, one, models is not None) for one in slices]
        if self.mistakes:
            return {}
        parameters = self._parameters(terms, [columns for columns, _ in arranged], slices)
        dtype, out_dtype = (self._dtype(key) for key in ("dtype", "out_dtype"))
        own = [one for columns, _ in arranged for one in columns]
        return {
            "method": name,
            "members": list(dict.fromkeys(one["model"] for one in own)),
            "base": base if terms.base != "none" and name not in BASE_FIRST else None,
            "parameters": parameters,
            "dtype": dtype,
            "out_dtype": out_dtype or dtype,
            "slices": None if models is not None else [self._slice(columns, own) for columns, own in arranged],
            "tokenizer": self._tokenizer(base),
            "chat_template": self.content.get("chat_template"),
            "notes": list(dict.fromkeys(self.notes)),
        }

    def _inputs(self) -> tuple[list[dict[str, Any]] | None, list[dict[str, Any]] | None] | None:
        """Return the models or the slices, as written, their names read."""
        given = [key for key in ("models", "slices", "modules") if self.content.get(key)]
        if len(given) != 1:
            self.wrong("", f"expected one of `models`, `slices` and `modules`, got {', '.join(given) or 'none'}")
            return None
        key, content = given[0], self.content
        if key == "modules":
            modules = content["modules"]
            if not isinstance(modules, Mapping) or len(modules) != 1:
                self.wrong("modules", "several modules are merged one after another: give each a recipe of its own")
                return None
            ((module, content),) = modules.items()
            self._check_keys(content, ("models", "slices"), f"modules.{module}")
            key = "models" if content.get("models") else "slices"
        entries = content.get(key)
        if not isinstance(entries, list):
            self.wrong(key, f"expected a list, got {_shown(entries)}")
            return None
        if key == "models":
            return [self._entry(entry, f"models[{i}]", ()) for i, entry in enumerate(entries)], None
        return None, [self._output_slice(entry, f"slices[{i}]") for i, entry in enumerate(entries)]

    def _output_slice(self, entry: Any, path: str) -> dict[str, Any]:
        self._check_keys(entry, ("sources", "parameters", "base_model"), path)
        sources = entry.get("sources") if isinstance(entry, Mapping) else None
        if not isinstance(sources, list) or not sources:
            self.wrong(f"{path}.sources", f"expected a list of models with `layer_range`, got {_shown(sources)}")
            return {"sources": [], "parameters": None, "base_model": None}
        return {
            "sources": [self._entry(one, f"{path}.sources[{i}]", ("layer_range",)) for i, one in enumerate(sources)],
            "parameters": self._section(entry.get("parameters"), f"{path}.parameters"),
            "base_model": self._model(entry.get("base_model"), f"{path}.base_model"),
        }

    def _entry(self, entry: Any, path: str, more: Sequence[str]) -> dict[str, Any]:
        self._check_keys(entry, ("model", "parameters", *more), path)
        entry = entry if isinstance(entry, Mapping) else {}
        model = self._model(entry.get("model"), f"{path}.model")
        if model is None and "model" not in entry:
            self.wrong(f"{path}.model", "is missing")
        read = {
            "model": model,
            "parameters": self._section(entry.get("parameters"), f"{path}.parameters"),
            "path": path,
        }
        for key in more:
            span = entry.get(key)
            if not (isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)):
                self.wrong(f"{path}.{key}", f"expected [first, behind the last], got {_shown(span)}")
            read[key] = span
        return read

    def _arranged(
        self, name: str, terms: _Terms, base: str | None, content: Mapping[str, Any], whole: bool
    ) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
        """Return the sources of one slice in the members' order, and the base's."""
        sources = list(content["sources"])
        base = content.get("base_model") or base
        names = [one["model"] for one in sources]
        twice = next((one for one in sources if names.count(one["model"]) > 1), None)
        if twice is not None:
            self.wrong(twice["path"], f"{twice['model']!r} stands there twice: give it once, with its weight")
        own = next((one for one in sources if one["model"] == base), None)
        if own is None and base is not None and whole:
            own = {"model": base, "parameters": None, "path": "base_model"}
            sources.append(own)
        if terms.base == "required" and own is None:
            what = "base_model: is missing" if base is None else f"{base} is none of a slice's sources"
            self.wrong("", f"{what}: {name} merges what the members have learned since")
        if terms.base == "none":
            own = None
        members = [one for one in sources if one is not own]
        fewest, most = terms.members
        if len(members) < fewest or (most is not None and len(members) > most):
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more" if most is None else f"{fewest} to {most}"
            beside = " besides the base" if terms.base != "none" else ""
            self.wrong("", f"{name} merges {wanted} models{beside}, got {len(members)}")
        if name in BASE_FIRST and own is not None:  # t = 0 is the base, wherever it stands in the list
            return [own, *members], None
        return members, own

    def _parameters(
        self, terms: _Terms, columns: Sequence[Sequence[Mapping[str, Any]]], slices: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        whole = self._section(self.content.get("parameters"), "parameters")
        self._check_parameters(terms, whole, "parameters", of_member=True)
        for place, own in enumerate(slices):
            self._check_parameters(terms, own.get("parameters"), f"slices[{place}].parameters", of_member=True)
            for source in own["sources"]:
                self._check_parameters(terms, source["parameters"], f"{source['path']}.parameters", of_member=False)
        parameters: dict[str, Any] = {}
        for name, (kind, default) in terms.shared.items():
            values = [self._value([own.get("parameters"), whole], name, kind, default, name) for own in slices]
            parameters[name] = value_of_slices(values)
        for name, (kind, default) in terms.of_members.items():
            values_of = []
            for place in range(len(columns[0])):
                own_values = [
                    self._value(
                        [members[place]["parameters"], own.get("parameters"), whole],
                        name,
                        kind,
                        default,
                        f"{name} of {members[place]['model']}",
                    )
                    for members, own in zip(columns, slices, strict=True)
                    if place < len(members)
                ]
                values_of.append(value_of_slices(own_values))
            same = all(value == values_of[0] for value in values_of)
            # A weight is always one a member: alone, it would read as a factor of all of them together.
            parameters[name] = values_of[0] if same and name != "weight" else {"members": values_of}
        return parameters

    def _value(
        self, scopes: Sequence[Mapping[str, Any] | None], name: str, kind: type, default: Any, where: str
    ) -> Any:
        """Return a value with every scope's filters, nearest first."""
        filters: list[list[Any]] = []
        for scope in scopes:
            if scope is None or name not in scope:
                continue
            for text, value in self._conditions(scope[name], kind, where):
                filters.append([text, value])
                if text == "*":
                    return value if len(filters) == 1 else {"filters": filters}
        if default is REQUIRED:
            self.wrong(where, "is missing" if not filters else "needs a last entry without `filter`, for all others")
            return None
        return {"filters": [*filters, ["*", default]]} if filters else default

    def _conditions(self, setting: Any, kind: type, where: str) -> list[tuple[str, Any]]:
        entries = [setting] if isinstance(setting, Mapping) else setting
        if not (isinstance(entries, list) and entries and all(isinstance(entry, Mapping) for entry in entries)):
            return [("*", self._leaf(setting, kind, where))]
        conditions = []
        for entry in entries:
            self._check_keys(entry, ("filter", "value"), where)
            text = entry.get("filter")
            conditions.append(("*" if text is None else str(text), self._leaf(entry.get("value"), kind, where)))
        return conditions

    def _leaf(self, setting: Any, kind: type, where: str) -> Any:
        if isinstance(setting, list):
            if not setting or any(isinstance(value, list | Mapping) for value in setting):
                self.wrong(where, f"expected a number, a list of numbers or a list of filters, got {_shown(setting)}")
                return None
            values = [self._scalar(value, kind, where) for value in setting]
            if kind is bool and len(set(values)) > 1:
                self.wrong(where, "a list of true and false steps from block to block: use filters")
            return values[0] if all(value == values[0] for value in values) else {"layers": values}
        return self._scalar(setting, kind, where)

    def _scalar(self, value: Any, kind: type, where: str) -> Any:
        if kind is bool:
            text = str(value).lower()
            if text in _TRUE or text in _FALSE:
                return text in _TRUE
        else:
            try:
                number = float(value) if not isinstance(value, bool) else None
            except (TypeError, ValueError):
                number = None
            if number is not None and (kind is float or number == int(number)):
                return kind(number)
        words = {bool: "true or false", int: "a whole number", float: "a number"}
        self.wrong(where, f"expected {words[kind]}, got {_shown(value)}")
        return None

    def _check_parameters(self, terms: _Terms, section: Mapping[str, Any] | None, path: str, of_member: bool) -> None:
        own = {**terms.shared, **terms.of_members}
        everywhere = {name for one in METHODS.values() for name in (*one.shared, *one.of_members)} | set(_NO_EFFECT)
        for name in section or ():
            if name in _NO_EFFECT:
                self.notes.append(f"{path}.{name}: left out: {_NO_EFFECT[name]}")
            elif name not in everywhere:
                self.wrong(f"{path}.{name}", f"unknown{nearest(name, sorted(everywhere))}")
            elif name not in own:
                self.notes.append(f"{path}.{name}: left out: {self.content['merge_method']} does not take it")
            elif name in terms.shared and not of_member:
                self.notes.append(f"{path}.{name}: left out: it is one for the whole merge, not one a member")

    def _tokenizer(self, base: str | None) -> dict[str, Any] | None:
        short, long = self.content.get("tokenizer_source"), self.content.get("tokenizer")
        if short is not None and long is not None:
            self.wrong("tokenizer", "and `tokenizer_source` are both given: keep one")
        if long is None and short is None:
            return None
        if long is None:
            long = {"source": short}
        self._check_keys(long, ("source", "tokens", "pad_to_multiple_of"), "tokenizer")
        if not isinstance(long, Mapping):
            return None
        tokens = {}
        for token, entry in (long.get("tokens") or {}).items():
            self._check_keys(entry, ("source", "force"), f"tokenizer.tokens.{token}")
            entry = entry if isinstance(entry, Mapping) else {}
            source = entry.get("source")
            if isinstance(source, Mapping) and source.get("kind") in ("zero", "model_token"):
                source = dict(source)
                if "model" in source:
                    source["model"] = self._model(source["model"], f"tokenizer.tokens.{token}.source.model")
            else:
                source = self._model(source, f"tokenizer.tokens.{token}.source")
            tokens[token] = {
                "source": source,
                "force": self._scalar(entry.get("force", False), bool, f"{token}.force"),
            }
        multiple = long.get("pad_to_multiple_of")
        if multiple is not None and (type(multiple) is not int or multiple < 1):
            self.wrong("tokenizer.pad_to_multiple_of", f"expected a whole number from 1, got {_shown(multiple)}")
        source = self._model(long.get("source", "union"), "tokenizer.source")
        return {"source": source, "base": base, "tokens": tokens, "pad_to_multiple_of": multiple}

    def _model(self, reference: Any, path: str) -> str | None:
        """Return a model as it is named here: `WHERE[@REVISION]`."""
        if reference is None:
            return None
        if isinstance(reference, Mapping):
            inner = reference.get("model", reference)
            if reference.get("lora") or reference.get("override_architecture"):
                self.wrong(path, "`lora` and `override_architecture` are not read: name the adapter itself as a model")
                return None
            if isinstance(inner, Mapping) and inner.get("path"):
                return str(inner["path"]) + (f"@{inner['revision']}" if inner.get("revision") else "")
            reference = inner
        if not isinstance(reference, str):
            self.wrong(path, f"expected a folder or org/name, got {_shown(reference)}")
            return None
        if "+" in reference:
            model, _, adapter = reference.partition("+")
            self.wrong(path, f"name the adapter {adapter!r} alone: it knows the model it belongs to ({model})")
            return None
        return reference

    def _slice(self, columns: Sequence[Mapping[str, Any]], base: Mapping[str, Any] | None) -> dict[str, Any]:
        sources = [*columns, *([base] if base is not None else [])]
        content: dict[str, Any] = {
            "sources": [{"model": one["model"], "layer_range": one["layer_range"]} for one in sources]
        }
        return content if base is None else content | {"base_model": base["model"]}

    def _dtype(self, key: str) -> str | None:
        name = self.content.get(key)
        name = name.removeprefix("torch.") if isinstance(name, str) else name
        if name is not None and name not in DTYPES:
            self.wrong(key, f"{name!r}{nearest(str(name), DTYPES)}: expected one of {', '.join(DTYPES)}")
        return name

    def _section(self, value: Any, path: str) -> Mapping[str, Any] | None:
        if value is not None and not isinstance(value, Mapping):
            self.wrong(path, f"expected a mapping, got {_shown(value)}")
            return None
        return value

    def _check_keys(self, value: Any, known: Sequence[str], path: str) -> None:
        if not isinstance(value, Mapping):
            self.wrong(path, f"expected a mapping with {', '.join(known)}, got {_shown(value)}")
            return
        for key in value:
            if key not in known:
                self.wrong(f"{path}.{key}" if path else str(key), f"unknown key{nearest(str(key), known)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
