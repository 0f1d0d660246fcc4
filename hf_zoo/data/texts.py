"""Texts: tokenised once into flat arrays, masked and padded batch by batch."""

# N = samples of a table, B = samples of a batch, L = tokens of the longest sample of a batch, T = tokens of a table

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_zoo.data.draws import Draws
from hf_zoo.data.table import EpochTable
from hf_zoo.errors import DataError
from hf_zoo.losses import IGNORED
from hf_zoo.recipe.schema import TokenizerSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_ALPHABET = 1000
MIN_PIECE = 8  # tokens; a shorter text or rest of a text has too little context to predict a masked token from
PAD_MULTIPLE = 8
KEPT_AS_IT_IS, REPLACED_BY_MASK = 0.1, 0.8
_CHUNK = 2048


class TextTable(EpochTable):
    """Tokenised texts in memory: all tokens in one array, and where each sample begins.

    Attributes:
        tokens: Token ids with the special tokens around each sample, int32 (T,).
        offsets: Sample i is `tokens[offsets[i]:offsets[i + 1]]`, int64 (N + 1,).
        types: Token types, 0 or 1, uint8 (T,); null where the tokenizer has none.
        labels: Class indices, int64 (N,); null for texts without labels.
    """

    def __init__(
        self, tokens: Tensor, offsets: Tensor, types: Tensor | None = None, labels: Tensor | None = None
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.offsets = offsets
        self.types = types
        self.labels = labels

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        sample: dict[str, Any] = {"index": index, "epoch": self.epoch, "input_ids": self.tokens[span]}
        if self.types is not None:
            sample["token_type_ids"] = self.types[span]
        if self.labels is not None:
            sample["label"] = int(self.labels[index])
        return sample


def train_tokenizer(texts: Iterable[str], spec: TokenizerSpec, max_length: int) -> PreTrainedTokenizerFast:
    """Train a WordPiece tokenizer with BERT's special tokens; the same texts give the same vocabulary.

    The trainer of `tokenizers` breaks ties between equally frequent merges by the numbers of their parts, and numbers
    the parts inside words in the order of a randomly seeded hash map: its vocabularies differ from run to run. Handing
    it the alphabet in both forms, at the start of a word and inside one, fixes those numbers.

    Args:
        texts: The training texts.
        spec: Size of the vocabulary, and whether it folds case.
        max_length: Longest sequence in tokens the tokenizer will make.

    Raises:
        DataError: If the vocabulary is smaller than the special tokens and the letters.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=spec.lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = list(texts)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    letters = [letter for letter in counts if not letter.isspace()]
    alphabet = sorted(sorted(letters, key=lambda letter: (-counts[letter], letter))[:MAX_ALPHABET])
    smallest = len(SPECIAL_TOKENS) + 2 * len(alphabet)
    if spec.vocab_size < smallest:
        raise DataError(
            f"tokenizer.vocab_size is {spec.vocab_size}, but special tokens and the {len(alphabet)} letters of the "
            f"training text need {smallest}"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=spec.vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=tokenizer.get_vocab(), do_lower_case=spec.lowercase, model_max_length=max_length)


def tokenize_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int) -> TextTable:
    """Tokenise documents for language modelling.

    A document of more than `max_length` tokens, special tokens included, is cut into consecutive pieces of that
    length, each with its own special tokens, so that no token is lost; documents are never joined. Documents and last
    pieces of fewer than 8 tokens are left out.

    Args:
        texts: One document each.
        tokenizer: A fast tokenizer.
        max_length: Longest piece in tokens.

    Raises:
        DataError: If no piece is left, or the tokenizer cannot make sequences that long.
    """
    _check_length(tokenizer, max_length)
    special = tokenizer.num_special_tokens_to_add(pair=False)
    pieces = _Pieces()
    for start in range(0, len(texts), _CHUNK):
        encoded = tokenizer(
            list(texts[start : start + _CHUNK]),
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
            return_attention_mask=False,
        )
        pieces.extend(encoded, keep=lambda ids: len(ids) >= MIN_PIECE + special)
    return pieces.table()


def tokenize_samples(
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    labels: np.ndarray | None,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
) -> TextTable:
    """Tokenise texts, or pairs of texts, for classification: one sample each, cut off at `max_length`.

    Args:
        texts: The texts, or the pairs' first texts, (N,).
        pairs: The pairs' second texts, (N,). Of a pair that is too long, the longer text is cut.
        labels: Class indices, (N,).
        tokenizer: A fast tokenizer.
        max_length: Longest sample in tokens, special tokens included.

    Raises:
        DataError: If the tokenizer cannot make sequences that long.
    """
    _check_length(tokenizer, max_length)
    pieces = _Pieces()
    for start in range(0, len(texts), _CHUNK):
        stop = start + _CHUNK
        second = None if pairs is None else list(pairs[start:stop])
        encoded = tokenizer(
            list(texts[start:stop]), second, truncation=True, max_length=max_length, return_attention_mask=False
        )
        pieces.extend(encoded, keep=lambda ids: True)
    return pieces.table(labels)


class MaskedCollator:
    """Pad a batch and hide some of its tokens, as BERT does (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    Each ordinary token is chosen with the given probability, and at least one of every sample. Of those chosen, 80 %
    become the mask token, 10 % a random ordinary token, and 10 % stay. Every draw depends on the seed, the epoch, the
    sample and the position alone; outside training it is always epoch 0.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, probability: float, seed: int, train: bool) -> None:
        """Keep what a batch needs.

        Args:
            tokenizer: Whose mask and special tokens are used.
            probability: Share of tokens chosen, in (0, 1].
            seed: Seed of every draw.
            train: Whether the draws change from epoch to epoch.

        Raises:
            DataError: If the tokenizer has no mask token, or the probability is none.
        """
        if tokenizer.mask_token_id is None:
            raise DataError(f"masked_lm needs a mask token, and {type(tokenizer).__name__} has none")
        if not 0 < probability <= 1:
            raise DataError(f"objective.mlm_probability lies in (0, 1], got {probability}")
        self.padding = _Padding(tokenizer)
        self.probability = probability
        self.seed = seed
        self.train = train
        self.mask_token = int(tokenizer.mask_token_id)
        self._is_special = torch.zeros(len(tokenizer), dtype=torch.bool)
        self._is_special[list(tokenizer.all_special_ids)] = True
        self._ordinary = torch.nonzero(~self._is_special)[:, 0]

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch.

        Args:
            samples: What a `TextTable` returned for each sample.

        Returns:
            `input_ids`, `attention_mask`, `token_type_ids` where there are any, and `labels`: the original tokens
            where one was chosen, -100 elsewhere. All int64, (B, L).
        """
        batch = self.padding(samples)
        original_BL = batch["input_ids"]
        indices = np.fromiter((sample["index"] for sample in samples), np.int64, len(samples))
        draws = Draws(self.seed, samples[0]["epoch"] if self.train else 0, indices)
        length = original_BL.shape[1]
        chance_BL = torch.from_numpy(draws.uniform("mask/choose", length))
        chance_BL.masked_fill_(self._is_special[original_BL] | (batch["attention_mask"] == 0), 2.0)
        lowest_B1 = chance_BL.min(1, keepdim=True).values
        chosen_BL = (chance_BL < self.probability) | ((chance_BL == lowest_B1) & (lowest_B1 < 2))
        fate_BL = torch.from_numpy(draws.uniform("mask/replace", length))
        place_BL = torch.from_numpy(draws.uniform("mask/token", length)) * len(self._ordinary)
        random_BL = self._ordinary[place_BL.long()]
        replaced_BL = torch.where(fate_BL < 1 - KEPT_AS_IT_IS, random_BL, original_BL)
        replaced_BL = torch.where(fate_BL < REPLACED_BY_MASK, self.mask_token, replaced_BL)
        batch["input_ids"] = torch.where(chosen_BL, replaced_BL, original_BL)
        batch["labels"] = original_BL.masked_fill(~chosen_BL, IGNORED)
        return batch


class ClassificationCollator:
    """Pad a batch to its longest sample, rounded up to a multiple of 8."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Keep the tokenizer's padding."""
        self.padding = _Padding(tokenizer)

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch.

        Args:
            samples: What a `TextTable` returned for each sample.

        Returns:
            `input_ids`, `attention_mask`, `token_type_ids` where there are any, int64 (B, L), and `labels` where
            there are any, int64 (B,).
        """
        batch = self.padding(samples)
        if "label" in samples[0]:
            batch["labels"] = torch.tensor([sample["label"] for sample in samples], dtype=torch.int64)
        return batch


class _Padding:
    """Pad on the right, to a multiple of 8 within what the tokenizer allows."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.pad_token = int(tokenizer.pad_token_id)
        self.longest = tokenizer.model_max_length

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [len(sample["input_ids"]) for sample in samples]
        length = max(lengths)
        length = max(length, min(-(-length // PAD_MULTIPLE) * PAD_MULTIPLE, self.longest))
        shape = (len(samples), length)
        batch = {
            "input_ids": torch.full(shape, self.pad_token),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
        }
        if "token_type_ids" in samples[0]:
            batch["token_type_ids"] = torch.zeros(shape, dtype=torch.int64)
        for row, (sample, count) in enumerate(zip(samples, lengths, strict=True)):
            batch["input_ids"][row, :count] = sample["input_ids"]
            batch["attention_mask"][row, :count] = 1
            if "token_type_ids" in batch:
                batch["token_type_ids"][row, :count] = sample["token_type_ids"]
        return batch


class _Pieces:
    """Collect encoded pieces into flat arrays."""

    def __init__(self) -> None:
        self.tokens: list[np.ndarray] = []
        self.types: list[np.ndarray] = []
        self.lengths: list[int] = []

    def extend(self, encoded: Any, keep: Any) -> None:
        """Take over the pieces of a tokenizer's answer that `keep` accepts."""
        types = encoded.get("token_type_ids")
        for place, ids in enumerate(encoded["input_ids"]):
            if keep(ids):
                self.tokens.append(np.asarray(ids, np.int32))
                self.lengths.append(len(ids))
                if types is not None:
                    self.types.append(np.asarray(types[place], np.uint8))

    def table(self, labels: np.ndarray | None = None) -> TextTable:
        """Return the table of everything collected."""
        if not self.lengths:
            raise DataError(f"no text has {MIN_PIECE} tokens or more: there is nothing to train on")
        offsets = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        return TextTable(
            torch.from_numpy(np.concatenate(self.tokens)),
            torch.from_numpy(offsets),
            torch.from_numpy(np.concatenate(self.types)) if self.types else None,
            None if labels is None else torch.from_numpy(labels),
        )


def _check_length(tokenizer: PreTrainedTokenizerFast, max_length: int) -> None:
    if max_length > tokenizer.model_max_length:
        raise DataError(
            f"data.max_length is {max_length}, but the tokenizer makes at most {tokenizer.model_max_length} tokens"
        )
    if max_length < MIN_PIECE + 2:
        raise DataError(f"data.max_length is {max_length}, it must be at least {MIN_PIECE + 2}")
    if tokenizer.pad_token_id is None:
        raise DataError(f"{type(tokenizer).__name__} has no padding token, which batches of texts need")
