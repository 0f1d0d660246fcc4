"""Gram matrices against X^T X of inputs computed apart."""

import pytest
import torch
from oracles import make, texts
from torch import nn

from hf_zoo.checkpoint import CheckpointReader
from hf_zoo.curvature.gram import GramMatrices, gram_matrices
from hf_zoo.curvature.saved import gram_on_disk
from hf_zoo.errors import ModelError
from hf_zoo.linear_layers import linear_layers
from hf_zoo.methods.regmean import input_axes


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


def test_weights_stored_as_inputs_by_outputs_have_their_matrices_too():
    model, _, batch = make("gpt2")
    gram, rows = gram_matrices(model, [batch], dtype=torch.float64)
    shown = batch["attention_mask"].bool()
    block = model.transformer.h[0]
    with torch.no_grad():
        ids = batch["input_ids"]
        x = model.transformer.wte(ids) + model.transformer.wpe(torch.arange(ids.shape[1]))
        x = block.ln_1(x)[shown]
    name = "transformer.h.0.attn.c_attn.weight"
    assert rows[name] == len(x)
    torch.testing.assert_close(gram[name], x.T @ x / len(x), rtol=1e-12, atol=1e-14)
    width = model.config.n_embd
    sizes = {"attn.c_attn": width, "attn.c_proj": width, "mlp.c_fc": width, "mlp.c_proj": 4 * width}
    found = {name.removeprefix("transformer.h.0.").removesuffix(".weight"): len(gram[name]) for name in gram}
    assert sizes.items() <= found.items()
    assert not {"transformer.wpe.weight", "transformer.h.0.ln_1.weight"} & set(gram)
    # what is saved fits the weights, and tells which of their sides the inputs are
    on_disk, _, left_out = gram_on_disk(model, gram, rows)
    assert not left_out
    axes = input_axes(CheckpointReader.of(model.state_dict(), "model"), CheckpointReader.of(on_disk, "gram"))
    assert {axis for name, axis in axes.items() if ".h." in name} == {0}
    assert axes["transformer.wte.weight"] == 1


def test_linear_layers_are_known_by_what_they_compute():
    class Product(nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 6))
            self.answer = answer

        def forward(self, x):
            return self.answer(x, self.weight)

    model = nn.ModuleDict({
        "linear": nn.Linear(4, 6),
        "in_by_out": Product(lambda x, w: x @ w),
        "out_by_in": Product(lambda x, w: x @ w.T),
        "bent": Product(lambda x, w: (x @ w).relu()),
        "scaled": Product(lambda x, w: 2 * (x @ w)),
        "pair": Product(lambda x, w: (x @ w, x)),
        "table": nn.Embedding(4, 6),
        "inside": nn.Sequential(nn.Linear(6, 4)),
    }).train()
    assert linear_layers(model) == {"linear": 1, "in_by_out": 0, "out_by_in": 1, "inside.0": 1}
    assert all(module.training for module in model.modules())
    assert not model["in_by_out"].weight.any()


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ModelError, match="no linear layer"):
        GramMatrices(nn.Conv2d(3, 4, 1))
