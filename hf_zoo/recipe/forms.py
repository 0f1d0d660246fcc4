"""The parts of a merge recipe that bring its models to one form: blocks stacked anew, tokens made the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """Blocks of one model.

    Attributes:
        model: The model: one of `members`, or `base`'s.
        layer_range: First block and the one after the last.
    """

    model: str
    layer_range: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SliceSpec:
    """Some blocks of the model to make.

    Attributes:
        sources: Where they come from; several are merged by the recipe's method, as many in each slice.
        base_model: The source that stands for the base in this slice, where it is not `base`.
    """

    sources: tuple[SourceSpec, ...]
    base_model: str | None = None


@dataclass(frozen=True, kw_only=True)
class VocabularySpec:
    """Which tokens the merge knows.

    Attributes:
        source: `same` refuses members with different tokens; `base` takes the base's, or the first member's without
            one; `union` knows all of them; else the member whose tokens count.
        rows: Where the embeddings of tokens a member lacks come from: `base`, else the `average` of the members that
            have them; the `mean` of the member's own rows; `zero`.
        base: A model whose rows and special tokens come first, where the method itself has no base.
        tokens: Token -> `{source: ..., force: true}`, as in mergekit.
        pad_to_multiple_of: Round the number of rows up.
        chat_template: The template of chats (Jinja) the merge's tokenizer gets; `auto` takes the one most models have,
            null keeps the tokenizer's own.
    """

    SHORTHAND: ClassVar[str] = "source"

    source: str = "same"
    rows: Literal["base", "average", "mean", "zero"] = "base"
    base: str | None = None
    tokens: dict[str, Any] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None
    chat_template: str | None = None
