"""The diagonal Fisher of a BERT of 4 layers x 256 over 2,000 sentences, against one sentence at a time.

The baseline is the loop most people write: one sentence without padding, one forward pass, a backward pass a class (or
one, where a label is drawn or observed), `fisher += gradient ** 2`. A leaner one asks for no `.grad` and squares and
adds in one pass. Both are timed on a subsample, evenly spaced
over the sentences in order of length, and scaled by their numbers; `hf_zoo.curvature` goes through all of them. All
run in the same process, in alternating rounds, and their results on the subsample are compared. Run it with
`OMP_NUM_THREADS=1 python -m benchmarks.fisher`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from hf_zoo.curvature.fisher import DiagonalFisher
from hf_zoo.curvature.likelihoods import Estimator
from hf_zoo.data.draws import Draws
from hf_zoo.data.sources import load_splits
from hf_zoo.data.texts import train_tokenizer
from hf_zoo.recipe.schema import DataSpec, TokenizerSpec

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--loop", type=int, default=200, help="sentences the loop is timed on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--estimators", nargs="*", default=["exact", "sampled", "empirical"])
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    sentences, vocab_size = read_sentences(arguments.sentences)
    sample = np.linspace(0, len(sentences) - 1, arguments.loop).round().astype(int)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocab_size, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )
    model = BertForSequenceClassification(config).eval().to(arguments.device)
    labels = torch.arange(len(sentences)) % 2
    lengths = [len(ids) for ids in sentences]
    print(
        f"{len(sentences)} sentences of {np.mean(lengths):.1f} tokens, {sum(p.numel() for p in model.parameters()):,} "
        f"parameters (vocabulary {vocab_size:,}), torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{arguments.device}"
    )
    rows = {
        "exact": Estimator("exact"),
        "sampled, one draw": Estimator("sampled", seed=1),
        "empirical": Estimator("empirical"),
    }
    for name, estimator in rows.items():
        if estimator.kind in arguments.estimators:
            report(name, model, sentences, labels, estimator, sample, arguments.rounds)
    whole = [timed(lambda: vmapped(model, sentences, labels, sample)) for _ in range(arguments.rounds)]
    print(
        f"| empirical, vmap(grad) of the whole network | | | {statistics.median(whole) * len(sentences) / len(sample):.1f} | | | |"
    )
    estimator = Estimator("sampled", seed=1)
    batched = [
        timed(lambda: ours(model, sentences, labels, estimator, None, per_example=False))
        for _ in range(arguments.rounds)
    ]
    print(f"| sampled, squared batch gradient (per_example=false) | | | {statistics.median(batched):.1f} | | | |")


def report(name, model, sentences, labels, estimator: Estimator, sample: np.ndarray, rounds: int) -> None:
    scale = len(sentences) / len(sample)
    loops, leans, own = [], [], []
    expected: dict[str, Tensor] = {}
    got: dict[str, Tensor] = {}
    for index in range(rounds + 1):  # the first warms up
        seconds = timed(lambda: expected.update(loop(model, sentences, labels, estimator, sample)))
        lean = timed(lambda: loop(model, sentences, labels, estimator, sample, lean=True))
        everything = timed(lambda: ours(model, sentences, labels, estimator, None))
        if index:
            loops.append(seconds * scale)
            leans.append(lean * scale)
            own.append(everything)
    got = ours(model, sentences, labels, estimator, sample)
    # Each tensor's error in the 2-norm, and the worst of them.
    worst = max(
        float((got[key] - expected[key]).norm() / expected[key].norm()) for key in got if expected[key].norm() > 1e-20
    )
    ratios = [a / b for a, b in zip(loops, own, strict=True)]
    leaner = statistics.median(a / b for a, b in zip(leans, own, strict=True))
    print(
        f"| {name} | {statistics.median(loops):.1f} | {statistics.median(leans):.1f} | {statistics.median(own):.1f} | "
        f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}) | {leaner:.1f} | {worst:.0e} |",
        flush=True,
    )


def timed(body) -> float:
    """Return processor seconds on one CPU thread, which others on the machine do not add to; else the time that passed."""
    if torch.cuda.is_available() or torch.get_num_threads() > 1:
        clock = time.perf_counter
    else:
        clock = time.process_time
    started = clock()
    body()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started


def ours(
    model, sentences, labels: Tensor, estimator: Estimator, sample, per_example: bool = True
) -> dict[str, Tensor]:
    chosen = np.arange(len(sentences)) if sample is None else sample  # in order of length already
    fisher = DiagonalFisher(model, "sequence_classification", estimator, per_example=per_example)
    for start in range(0, len(chosen), BATCH):
        indices = chosen[start : start + BATCH]
        fisher.add(padded(sentences, labels, indices), indices)
    return fisher.mean()


def loop(model, sentences, labels: Tensor, estimator: Estimator, sample, lean: bool = False) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    parameters = list(model.parameters())
    for index in sample:
        logits = model(input_ids=torch.tensor(sentences[index], device=device)[None]).logits[0]
        log_p = logits.log_softmax(-1)
        p = log_p.detach().exp()
        if estimator.kind == "exact":
            terms = [(label, float(p[label])) for label in range(len(p))]
        elif estimator.kind == "sampled":
            chance = Draws(estimator.seed, 0, np.array([index])).uniform("fisher/0", 1)[0, 0]
            cumulative = p.double().cumsum(-1)
            terms = [(int((cumulative <= chance * cumulative[-1]).sum()), 1.0)]
        else:
            terms = [(int(labels[index]), 1.0)]
        for place, (label, weight) in enumerate(terms):
            more = place + 1 < len(terms)
            if lean:
                gradients = torch.autograd.grad(log_p[label], parameters, retain_graph=more)
                for sums, gradient in zip(total.values(), gradients, strict=True):
                    sums.addcmul_(gradient, gradient, value=weight)
            else:
                model.zero_grad()
                log_p[label].backward(retain_graph=more)
                for name, parameter in model.named_parameters():
                    total[name] += weight * parameter.grad**2
    model.zero_grad()
    return {name: sums / len(sample) for name, sums in total.items()}


def vmapped(model, sentences, labels: Tensor, sample, chunk: int = 8) -> dict[str, Tensor]:
    """Return the empirical Fisher by vmap(grad) over the whole network, a few sentences at a time."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}

    def log_likelihood(values, ids, mask, label):
        logits = functional_call(model, values, (), {"input_ids": ids[None], "attention_mask": mask}).logits
        return logits.log_softmax(-1)[0].gather(0, label[None])[0]

    for start in range(0, len(sample), chunk):
        batch = padded(sentences, labels, sample[start : start + chunk])
        batch = {name: value.to(next(model.parameters()).device) for name, value in batch.items()}
        # Four-dimensional and additive: the library's own masks depend on the data, which vmap cannot follow.
        mask = (batch["attention_mask"][:, None, None, None, :] == 0) * torch.finfo(torch.float32).min
        with sdpa_kernel(SDPBackend.MATH):
            each = vmap(grad(log_likelihood), (None, 0, 0, 0))(parameters, batch["input_ids"], mask, batch["labels"])
        for name, gradient in each.items():
            total[name] += gradient.square_().sum(0)
    return total


def padded(sentences, labels: Tensor, indices: np.ndarray) -> dict[str, Tensor]:
    longest = max(len(sentences[i]) for i in indices)
    ids = torch.zeros(len(indices), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, index in enumerate(indices):
        ids[row, : len(sentences[index])] = torch.tensor(sentences[index])
        mask[row, : len(sentences[index])] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels[torch.from_numpy(np.asarray(indices))]}


def read_sentences(count: int) -> tuple[list[list[int]], int]:
    """Return tokenised sentences in order of length, of SST-2 where it is at hand, else of the embedded text."""
    if (SHARED / "glue_sst2").is_dir() and (SHARED / "tokenizers" / "bert_uncased").is_dir():
        splits = load_splits(DataSpec(path=str(SHARED / "glue_sst2"), test_split=None, num_train=count))
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "bert_uncased")
        texts = splits.train["sentence"][:]
    else:
        splits = load_splits(DataSpec(path="docs-sentences", num_train=count))
        texts = splits.train["text"][:]
        tokenizer = train_tokenizer(texts, TokenizerSpec(), 128)
    encoded = tokenizer(list(texts), truncation=True, max_length=128)["input_ids"]
    return sorted(encoded, key=len), len(tokenizer)


if __name__ == "__main__":
    main()
