"""Gram matrices against X^T X of inputs computed apart."""

import pytest
import torch
from oracles import make, texts
from torch import nn

from hf_zoo.curvature.gram import GramMatrices, gram_matrices
from hf_zoo.errors import ModelError


def test_a_text_models_matrices_leave_padding_out():
    model, _, batch = make("bert")
    gram, rows = gram_matrices(model, [batch], dtype=torch.float64)
    shown = batch["attention_mask"].bool()
    with torch.no_grad():
        x = model.bert.embeddings(input_ids=batch["input_ids"])[shown]
        pooled = model(**batch, output_hidden_states=True).hidden_states[-1][:, 0]
    for part in ("query", "key", "value"):
        name = f"bert.encoder.layer.0.attention.self.{part}.weight"
        assert rows[name] == len(x) == 12 + 7 + 12 + 4 + 12
        torch.testing.assert_close(gram[name], x.T @ x / len(x), rtol=1e-12, atol=1e-14)
    # The pooler reads an example a row: none of these is padding.
    assert rows["bert.pooler.dense.weight"] == rows["classifier.weight"] == 5
    torch.testing.assert_close(gram["bert.pooler.dense.weight"], pooled.T @ pooled / 5, rtol=1e-12, atol=1e-14)
    linear = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(gram) == linear


def test_batches_add_up():
    model, _, batch = make("bert")
    whole, rows = gram_matrices(model, [batch], dtype=torch.float64)
    parts = [{key: value[span] for key, value in batch.items()} for span in (slice(0, 2), slice(2, 5))]
    got, counted = gram_matrices(model, parts, dtype=torch.float64)
    assert counted == rows
    for name, value in whole.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-13)
    single, _ = gram_matrices(model, parts)
    assert {value.dtype for value in single.values()} == {torch.float32}
    for name, value in whole.items():
        assert float((single[name] - value).norm()) <= 1e-5 * float(value.norm())


def test_patches_are_rows():
    model, _, batch = make("vit")
    gram, rows = gram_matrices(model, [batch], dtype=torch.float64)
    assert rows["classifier.weight"] == 5
    assert rows[next(name for name in rows if "q_proj" in name)] == 5 * (1 + 16)
    assert all(torch.equal(value, value.T) or torch.allclose(value, value.T) for value in gram.values())


def test_a_layer_called_twice_counts_both_calls():
    model, _, batch = make("albert")
    _, rows = gram_matrices(model, [batch], dtype=torch.float64)
    tokens = int(batch["attention_mask"].sum())
    shared = next(name for name in rows if name.endswith("attention.query.weight"))
    assert rows[shared] == 2 * tokens
    assert rows["albert.encoder.embedding_hidden_mapping_in.weight"] == tokens


def test_a_head_tied_to_the_table_has_its_matrix_under_the_tables_name():
    model, _, batch = make("bert-mlm")
    gram, rows = gram_matrices(model, [batch], dtype=torch.float64)
    assert gram["bert.embeddings.word_embeddings.weight"].shape == (16, 16)
    assert rows["bert.embeddings.word_embeddings.weight"] == int(texts()["attention_mask"].sum())


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ModelError, match="no linear layer"):
        GramMatrices(nn.Conv2d(3, 4, 1))
