"""Tiny models of several families, and their Fisher information one example at a time in float64."""

import torch
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

B, L, VOCABULARY, CLASSES = 5, 12, 50, 3
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGE = {"image_size": 32, "num_labels": CLASSES}
TEXT = {"vocab_size": VOCABULARY, "num_labels": CLASSES}


def texts():
    """Return padded token ids: lengths 12, 7, 12, 4, 12."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (B, L), generator=generator)
    mask = torch.ones(B, L, dtype=torch.int64)
    mask[1, 7:] = 0
    mask[3, 4:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def masked():
    batch = texts()
    chosen = torch.zeros(B, L, dtype=torch.bool)
    chosen[:, 1] = chosen[2, 5] = chosen[2, 6] = chosen[4, 10] = True
    return {**batch, "labels": torch.where(chosen, batch["input_ids"], -100)}


def ended():
    """Return texts that all end with T5's end of sequence, at which it classifies."""
    ids = texts()["input_ids"].clamp(min=5)
    ids[:, -1] = 1
    return {"input_ids": ids}


def images():
    generator = torch.Generator().manual_seed(1)
    return {"pixel_values": torch.randn(B, 3, 32, 32, generator=generator, dtype=torch.float64)}


LABELS = torch.tensor([0, 2, 1, 0, 2])
MODELS = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**TEXT, **SMALL)),
    "bert-mlm": lambda: BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **SMALL)),
    "albert": lambda: AlbertForSequenceClassification(AlbertConfig(embedding_size=8, **TEXT, **SMALL)),
    "t5": lambda: T5ForSequenceClassification(
        T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0, pad_token_id=0,
                 eos_token_id=1, **TEXT)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1)
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(patch_size=8, **IMAGE, **SMALL)),
    "swin": lambda: SwinForImageClassification(
        SwinConfig(patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, **IMAGE)
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=CLASSES)
    ),
}  # fmt: skip
BATCHES = {
    "bert": ("sequence_classification", lambda: {**texts(), "labels": LABELS}),
    "bert-mlm": ("masked_lm", masked),
    "albert": ("sequence_classification", lambda: {**texts(), "labels": LABELS}),
    "t5": ("sequence_classification", lambda: {**ended(), "labels": LABELS}),
    "gpt2": ("causal_lm", texts),
    "vit": ("image_classification", lambda: {**images(), "labels": LABELS}),
    "swin": ("image_classification", lambda: {**images(), "labels": LABELS}),
    "resnet": ("image_classification", lambda: {**images(), "labels": LABELS}),
}


def make(name):
    """Return a model in float64 whose every weight is off its initial value, its objective and a batch."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
        for buffer_name, buffer in model.named_buffers():
            if "running" in buffer_name:
                buffer += 0.1 * torch.rand_like(buffer)
    objective, batch = BATCHES[name]
    return model, objective, batch()


def one_by_one(model, objective, batch, kind):
    """Return the diagonal Fisher by one forward pass an example, unpadded, and one backward pass a label."""
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    count = len(next(iter(batch.values())))
    for place in range(count):
        one = {name: value[place : place + 1] for name, value in batch.items()}
        if "attention_mask" in one:
            length = int(one["attention_mask"].sum())
            one = {name: value[:, :length] if value.ndim == 2 else value for name, value in one.items()}
        labels = one.pop("labels", one.get("input_ids"))
        log_p = model(**one).logits[0].log_softmax(-1)
        for weight, log_likelihood in terms(objective, log_p, labels[0], kind):
            gradients = torch.autograd.grad(
                log_likelihood, list(model.parameters()), retain_graph=True, allow_unused=True
            )
            for sums, gradient in zip(total.values(), gradients, strict=True):
                if gradient is not None:
                    sums += weight * gradient**2
    return {name: sums / count for name, sums in total.items()}


def terms(objective, log_p, labels, kind):
    """Yield weight and log-likelihood of each label the expectation is over."""
    if objective == "causal_lm":
        log_p, labels = log_p[:-1], labels[1:]
    elif objective == "masked_lm":
        log_p, labels = log_p[labels != -100], labels[labels != -100]
    if objective.endswith("classification"):
        log_p, labels = log_p[None], labels[None]
    if kind == "empirical":
        yield 1.0, log_p.gather(1, labels[:, None]).sum()
    else:  # independent predictions: the sequence's expectation is the sum of theirs
        for row in log_p:
            for value in row:
                yield float(value.detach().exp()), value


def assert_same(got, expected, tolerance):
    assert set(got) == set(expected)
    for name, value in expected.items():
        # The biases of attention's keys have no gradient but rounding.
        torch.testing.assert_close(
            got[name], value, rtol=tolerance, atol=tolerance * float(value.max()) + 1e-25, msg=name
        )
