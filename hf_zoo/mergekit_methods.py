"""mergekit's methods and hyper-parameters as those of this library that give its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hf_zoo.errors import RecipeError
from hf_zoo.mergekit_values import mapped_value, recipe_value

Values = dict[str, Any]


def recipe_content(translated: Mapping[str, Any], source: str = "mergekit") -> dict[str, Any]:
    """Return what a merge recipe says in place of a translated mergekit YAML.

    Args:
        translated: What `hf_zoo.mergekit.translate` returned.
        source: Its file, for messages.

    Returns:
        `members`, `base`, `method`, `parameters`, `dtype` and `compute_dtype` of a merge recipe; `slices` and
        `tokenizer` as they are, the chat template with the latter.

    Raises:
        RecipeError: If nothing here gives mergekit's numbers; says what to change.
    """
    values: Values = dict(translated["parameters"])
    mistakes: list[str] = []
    method, parameters = _METHODS[translated["method"]](values, translated["base"] is not None, mistakes)
    if mistakes:
        raise RecipeError(source, [f"{translated['method']}: {mistake}" for mistake in mistakes])
    return {
        "members": list(translated["members"]),
        "base": translated["base"],
        "method": method,
        "parameters": {key: recipe_value(value, translated["slices"]) for key, value in parameters.items()},
        "dtype": translated["out_dtype"],
        "compute_dtype": "float64" if translated["dtype"] == "float64" else "float32",
        "slices": translated["slices"],
        "tokenizer": _tokenizer(translated),
    }


def _tokenizer(translated: Mapping[str, Any]) -> Mapping[str, Any] | None:
    template = translated["chat_template"]
    if template is None:
        return translated["tokenizer"]
    return {**(translated["tokenizer"] or {"source": "same"}), "chat_template": template}


def _linear(values: Values, has_base: bool, mistakes: list[str]) -> tuple[str, Values]:
    weights = values["weight"]["members"]
    plain = all(isinstance(weight, float) for weight in weights)
    if values["normalize"] is not True and not (plain and abs(sum(weights) - 1) < 1e-6):
        mistakes.append("weights that are not normalised and do not sum to 1 scale the model: set `normalize: true`")
    return "average", {"weights": values["weight"]}


def _nuslerp(values: Values, has_base: bool, mistakes: list[str]) -> tuple[str, Values]:
    flat, by_columns = values["nuslerp_flatten"], values["nuslerp_row_wise"]
    if not (isinstance(flat, bool) and isinstance(by_columns, bool)):
        mistakes.append("`nuslerp_flatten` and `nuslerp_row_wise` are one value for all tensors here")
    vectors = "tensor" if flat is True else "columns" if by_columns is True else "rows"
    return "nuslerp", {"weights": values["weight"], "vectors": vectors, "task_vectors": has_base}


def _multislerp(values: Values, has_base: bool, mistakes: list[str]) -> tuple[str, Values]:
    normalize = values["normalize_weights"]
    return "multislerp", {"weights": values["weight"], "normalize": normalize, "task_vectors": has_base}


def _model_stock(values: Values, has_base: bool, mistakes: list[str]) -> tuple[str, Values]:
    vectors = mapped_value(values["filter_wise"], lambda rows: "rows" if rows else "tensor")
    return "model_stock", {"vectors": vectors, "clip": False}


def _task_arithmetic(values: Values, has_base: bool, mistakes: list[str]) -> tuple[str, Values]:
    return "task_arithmetic", {
        "weights": values["weight"],
        "scale": values["lambda"],
        "normalize": values["normalize"],
    }


def _task_vectors(method: str, elected: bool, **more: Any) -> Callable[[Values, bool, list[str]], tuple[str, Values]]:
    """Return the reading of a method that trims task vectors and may elect signs."""

    def read(values: Values, has_base: bool, mistakes: list[str]) -> tuple[str, Values]:
        _, parameters = _task_arithmetic(values, has_base, mistakes)
        parameters |= {"density": values["density"], "tie": "positive"} | more
        parameters["election"] = "total" if elected else "none"
        if method in ("dare", "della"):
            parameters["rescale"] = mapped_value(values["rescale"], lambda rescaled: "norm" if rescaled else "none")
        elif values["rescale"] is not False:
            mistakes.append("`rescale` is for methods that drop at random: leave it out")
        if "gamma" in values:
            parameters["gamma"] = values["gamma"]
        if "epsilon" in values:  # half of the paper's and ours
            parameters["epsilon"] = mapped_value(values["epsilon"], lambda epsilon: 2 * epsilon)
        return method, parameters

    return read


def _renamed(method: str, names: Mapping[str, str], **more: Any) -> Callable[..., tuple[str, Values]]:
    """Return the reading of a method whose hyper-parameters are the same but for their names."""

    def read(values: Values, has_base: bool, mistakes: list[str]) -> tuple[str, Values]:
        return method, {names.get(key, key): value for key, value in values.items()} | more

    return read


_METHODS: dict[str, Callable[[Values, bool, list[str]], tuple[str, Values]]] = {
    "linear": _linear,
    "slerp": _renamed("slerp", {}),
    "nuslerp": _nuslerp,
    "multislerp": _multislerp,
    "karcher": _renamed("karcher", {"max_iter": "max_iterations", "tol": "tolerance"}),
    "model_stock": _model_stock,
    "nearswap": _renamed("nearswap", {}),
    "arcee_fusion": _renamed("arcee_fusion", {}),
    "task_arithmetic": _task_arithmetic,
    "ties": _task_vectors("ties", True, trim="tensor"),
    "dare_linear": _task_vectors("dare", False),
    "dare_ties": _task_vectors("dare", True),
    "breadcrumbs": _task_vectors("breadcrumbs", False),
    "breadcrumbs_ties": _task_vectors("breadcrumbs", True),
    "della": _task_vectors("della", True),
    "della_linear": _task_vectors("della", False),
    "sce": _renamed("sce", {}, normalize=True, tie="positive"),
    "ram": _renamed("ram", {}),
    "ramplus_tl": _renamed("ram", {"r": "rescale", "alpha": "limit"}, scope="tensor"),
    "passthrough": _renamed("passthrough", {}),
}
