"""Texts: the tokenizer, cutting, masking and padding."""

import hashlib
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from hf_zoo.data.texts import (
    ClassificationCollator,
    MaskedCollator,
    tokenize_documents,
    tokenize_samples,
    train_tokenizer,
)
from hf_zoo.errors import DataError
from hf_zoo.recipe.schema import TokenizerSpec

SENTENCES = (
    "The quick brown fox jumps over the lazy dog.",
    "Every method returns a new list, and the old one is left alone.",
    "If the file does not exist, an error is raised; otherwise it is opened.",
    "Café owners don't mind naïve questions!",
)
CORPUS = [f"{SENTENCES[i % 4]} Number {i} of them is {i * i}." for i in range(200)]
SPEC = TokenizerSpec(vocab_size=300)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, SPEC, max_length=32)


@pytest.fixture(scope="module")
def table(tokenizer):
    return tokenize_documents(CORPUS, tokenizer, 24)


def test_a_saved_tokenizer_loads_with_the_stock_class_and_gives_the_same_ids(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == 32
    for text in (*CORPUS[:8], "unseen words, ZEBRAS & 漢字"):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    pieces = loaded.convert_ids_to_tokens(loaded("Fox, jumps")["input_ids"])
    assert pieces == ["[CLS]", "fox", ",", "jumps", "[SEP]"]


def test_the_vocabulary_has_the_asked_size_and_bert_s_special_tokens(tokenizer):
    assert len(tokenizer) == 300
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]
    assert tokenizer("Café")["input_ids"] == tokenizer("cafe")["input_ids"]
    cased = train_tokenizer(CORPUS, TokenizerSpec(vocab_size=300, lowercase=False), 32)
    assert cased("The")["input_ids"] != cased("the")["input_ids"]


def test_the_vocabulary_is_the_same_in_every_process(tokenizer):
    # Ties between merges are what a randomly seeded hash map breaks differently: this corpus is full of them.
    program = (
        "import hashlib, json, sys; from hf_zoo.data.texts import train_tokenizer; "
        "from hf_zoo.recipe.schema import TokenizerSpec; "
        "vocabulary = train_tokenizer(json.load(sys.stdin), TokenizerSpec(vocab_size=300), 32).get_vocab(); "
        "print(hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest())"
    )
    expected = hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(CORPUS), capture_output=True, text=True, env=os.environ
    )
    assert done.stdout.strip() == expected, done.stderr


def test_a_vocabulary_too_small_for_its_letters_is_refused():
    with pytest.raises(DataError, match="vocab_size is 20, but special tokens and the"):
        train_tokenizer(CORPUS, TokenizerSpec(vocab_size=20), 32)


def test_documents_are_cut_without_losing_a_token(tokenizer):
    documents = [" ".join(CORPUS[:10]), CORPUS[0]]
    table = tokenize_documents(documents, tokenizer, 24)
    whole = tokenizer(documents[0], add_special_tokens=False)["input_ids"]
    pieces = [table[i]["input_ids"].tolist() for i in range(len(table))]
    assert all(piece[0] == tokenizer.cls_token_id and piece[-1] == tokenizer.sep_token_id for piece in pieces)
    assert all(len(piece) == 24 for piece in pieces[: len(whole) // 22])
    joined = [token for piece in pieces for token in piece[1:-1]]
    rest = len(whole) % 22
    kept = whole if rest == 0 or rest >= 8 else whole[:-rest]
    assert joined == kept + tokenizer(documents[1], add_special_tokens=False)["input_ids"]


def test_texts_of_fewer_than_eight_tokens_are_left_out_of_documents_only(tokenizer):
    assert len(tokenize_documents(["the fox", CORPUS[0]], tokenizer, 24)) == 1
    assert len(tokenize_samples(["the fox", CORPUS[0]], None, None, tokenizer, 24)) == 2
    with pytest.raises(DataError, match="no text has 8 tokens"):
        tokenize_documents(["the fox"], tokenizer, 24)


def test_pairs_carry_types_and_labels(tokenizer):
    import numpy as np

    table = tokenize_samples(["the fox"], ["the dog is lazy"], np.array([1]), tokenizer, 32)
    expected = tokenizer("the fox", "the dog is lazy")
    assert table[0]["input_ids"].tolist() == expected["input_ids"]
    assert table[0]["token_type_ids"].tolist() == expected["token_type_ids"]
    assert table[0]["label"] == 1
    assert 1 in expected["token_type_ids"]


def test_masking_has_the_stated_shares(tokenizer, table):
    collator = MaskedCollator(tokenizer, 0.3, seed=1, train=True)
    samples = [table[i] for i in range(len(table))]
    batch = collator(samples)
    original = ClassificationCollator(tokenizer)(samples)["input_ids"]
    chosen = batch["labels"] != -100
    torch.testing.assert_close(batch["labels"][chosen], original[chosen])
    assert torch.equal(batch["input_ids"][~chosen], original[~chosen])
    special = torch.isin(original, torch.tensor(tokenizer.all_special_ids))
    assert not (chosen & special).any()
    assert chosen.any(1).all()

    def within(count, total, probability):  # five standard errors of a binomial
        return abs(count / total - probability) < 5 * math.sqrt(probability * (1 - probability) / total)

    total = int(chosen.sum())
    ordinary = len(tokenizer) - len(tokenizer.all_special_ids)
    assert within(total, int((~special).sum()), 0.3)
    assert within(int((batch["input_ids"][chosen] == tokenizer.mask_token_id).sum()), total, 0.8)
    assert within(int((batch["input_ids"][chosen] == original[chosen]).sum()), total, 0.1 + 0.1 / ordinary)
    assert not torch.isin(batch["input_ids"][chosen], torch.tensor([0, 1, 2, 3])).any()


def test_every_sample_has_a_masked_token_however_small_the_share(tokenizer, table):
    batch = MaskedCollator(tokenizer, 1e-9, seed=1, train=True)([table[i] for i in range(50)])
    assert (batch["labels"] != -100).sum(1).tolist() == [1] * 50
    everything = MaskedCollator(tokenizer, 1.0, seed=1, train=True)([table[0]])
    assert int((everything["labels"] != -100).sum()) == len(table[0]["input_ids"]) - 2


def masked(table, order, collator, **options):
    loader = DataLoader(table, batch_size=len(order) // 2, sampler=order, collate_fn=collator, **options)
    found = {}
    for place, batch in enumerate(loader):
        for row, index in enumerate(order[place * loader.batch_size :][: loader.batch_size]):
            length = int(batch["attention_mask"][row].sum())
            found[index] = (batch["input_ids"][row, :length].tolist(), batch["labels"][row, :length].tolist())
    return found


def test_masks_do_not_depend_on_order_workers_or_batch_size(tokenizer, table):
    collator = MaskedCollator(tokenizer, 0.15, seed=1, train=True)
    order = list(range(16))
    expected = masked(table, order, collator)
    assert masked(table, order[::-1], collator) == expected
    assert masked(table, order, collator, num_workers=2) == expected
    alone = collator([table[5]])
    length = int(alone["attention_mask"].sum())
    assert alone["labels"][0, :length].tolist() == expected[5][1]


def test_masks_change_with_epoch_and_seed_in_training_alone(tokenizer, table):
    train, evaluate = (MaskedCollator(tokenizer, 0.15, seed=1, train=train) for train in (True, False))
    order = list(range(8))
    first, fixed = masked(table, order, train), masked(table, order, evaluate)
    assert masked(table, order, MaskedCollator(tokenizer, 0.15, seed=2, train=True)) != first
    try:
        table.set_epoch(1)
        assert masked(table, order, train) != first
        assert masked(table, order, evaluate) == fixed
    finally:
        table.set_epoch(0)


def test_padding_is_a_multiple_of_eight_within_the_tokenizer_s_limit(tokenizer):
    table = tokenize_samples(
        ["the fox", "the lazy dog is over there", " ".join(CORPUS[:3])], None, None, tokenizer, 30
    )
    collator = ClassificationCollator(tokenizer)
    batch = collator([table[0], table[1]])
    lengths = [len(table[i]["input_ids"]) for i in range(3)]
    assert batch["input_ids"].shape == (2, 8 * math.ceil(max(lengths[:2]) / 8))
    assert batch["attention_mask"].sum(1).tolist() == lengths[:2]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == tokenizer.pad_token_id).all()
    assert lengths[2] == 30
    assert collator([table[2]])["input_ids"].shape == (1, 32)
    tokenizer.model_max_length = 30
    try:
        assert ClassificationCollator(tokenizer)([table[2]])["input_ids"].shape == (1, 30)
    finally:
        tokenizer.model_max_length = 32


@pytest.mark.parametrize(("length", "message"), [(64, "at most 32 tokens"), (9, "at least 10")])
def test_impossible_lengths_are_named(tokenizer, length, message):
    with pytest.raises(DataError, match=message):
        tokenize_documents(CORPUS, tokenizer, length)


def test_an_impossible_share_is_named(tokenizer):
    with pytest.raises(DataError, match=r"mlm_probability lies in \(0, 1\]"):
        MaskedCollator(tokenizer, 0.0, seed=1, train=True)
