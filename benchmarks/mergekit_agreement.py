"""The same YAML through mergekit and through `hf-zoo merge`, compared tensor by tensor.

Tiny Llamas and BERTs with tokenizers are made, in float32 and in bfloat16: a base, two members near it, and three
models with words of their own. Every YAML is merged by mergekit 0.1.5, which lies in an environment of its own (all of
them in one process, by the function its command calls), and by `hf_zoo.merge`. In float32 the largest difference is
told; in bfloat16 the share of entries more than one unit in the last place apart, once with mergekit computing in
bfloat16 (`dtype: bfloat16`) and once in float32 (`dtype: float32`, `out_dtype: bfloat16`). Draws at random are other
draws; of them the share kept and the length of what was added are told.
`python -m benchmarks.mergekit_agreement --mergekit ENVIRONMENT/bin/mergekit-yaml`
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

KINDS = {"llama": "LlamaForCausalLM", "bert": "BertForSequenceClassification"}
DTYPES = {"float32": "float32", "bfloat16": "bfloat16", "mixed": "bfloat16"}  # how it is run -> how models are saved
NUM_BLOCKS = 4
NOISE = 0.01
WORDS = {
    "one": "the cat sat on the mat and a bird sang to the cat that sat on the mat",
    "two": "merging models is fun and the merged models merge with other models the cat liked",
    "base": "the dog and the cat merge on a mat with the other dog",
}
DRIVER = """
import json, sys, traceback, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for file, folder in json.load(sys.stdin):
    try:
        with open(file) as content:
            merge = MergeConfiguration.model_validate(yaml.safe_load(content))
        run_merge(merge, folder, MergeOptions(quiet=True, write_model_card=False, random_seed=0))
    except Exception:
        print(f"{file}: {traceback.format_exc().splitlines()[-1]}", file=sys.stderr)
"""
GRADIENT: list[dict[str, Any]] = [
    {"weight": [0.3, 0.8]},
    {"weight": [{"filter": "mlp", "value": 0.9}, {"value": 0.5}]},
]
TRIMMED: list[dict[str, Any]] = [{"weight": 0.3, "density": 0.5}, {"weight": 0.6, "density": [0.2, 0.7]}]
WHOLE: list[dict[str, Any]] = [{"weight": 0.3}, {"weight": 0.6}]
CURVE = {"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.4}]}
FIRST: list[dict[str, Any]] = [{}]
BOTH: list[dict[str, Any]] = [{}, {}]


def task_vectors(method: str, members: list[dict[str, Any]], **parameters: Any) -> dict[str, Any]:
    """Return a case that needs a base."""
    return {"merge_method": method, "members": members, "base": "base", "parameters": parameters}


# What stands behind a name: method, parameters of the members, base, parameters of all.
CASES: dict[str, dict[str, Any]] = {
    "linear, gradient and filter": {"merge_method": "linear", "members": GRADIENT},
    "slerp, gradient and filter": task_vectors("slerp", FIRST, **CURVE),
    "nuslerp": {"merge_method": "nuslerp", "members": GRADIENT},
    "nuslerp of task vectors": task_vectors("nuslerp", GRADIENT),
    "nuslerp, rows": {"merge_method": "nuslerp", "members": GRADIENT, "parameters": {"nuslerp_flatten": False}},
    "nuslerp, columns": {
        "merge_method": "nuslerp",
        "members": GRADIENT,
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {"merge_method": "multislerp", "members": GRADIENT},
    "multislerp of task vectors": task_vectors("multislerp", GRADIENT),
    "karcher": {"merge_method": "karcher", "members": BOTH},
    "model_stock": task_vectors("model_stock", BOTH),
    "model_stock, filter_wise": task_vectors("model_stock", BOTH, filter_wise=True),
    "nearswap": task_vectors("nearswap", FIRST, t=[0.001, 0.01]),
    "arcee_fusion": task_vectors("arcee_fusion", FIRST),
    "task_arithmetic, gradient and filter": task_vectors("task_arithmetic", GRADIENT, normalize=True, **{"lambda": 0.7}),
    "ties, gradient": task_vectors("ties", TRIMMED, **{"lambda": 0.7}),
    "breadcrumbs": task_vectors("breadcrumbs", TRIMMED, gamma=0.1),
    "breadcrumbs_ties": task_vectors("breadcrumbs_ties", TRIMMED, gamma=0.1),
    "dare_linear, density 1": task_vectors("dare_linear", WHOLE),
    "dare_ties, density 1": task_vectors("dare_ties", WHOLE),
    "della, density 1": task_vectors("della", WHOLE),
    "della_linear, density 1": task_vectors("della_linear", WHOLE),
    "sce": task_vectors("sce", BOTH, select_topk=0.3),
    "ram": task_vectors("ram", BOTH, epsilon=0.005),
    "ramplus_tl": task_vectors("ramplus_tl", BOTH, epsilon=0.005, r=0.3),
    "passthrough, two slices": {
        "merge_method": "passthrough",
        "slices": [[("one", 0, 3, {})], [("two", 1, 4, {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1}]})]],
    },
    "linear, slices of two sources": {
        "merge_method": "linear",
        "slices": [
            [("one", 0, 3, {"weight": [0, 1]}), ("two", 1, 4, {"weight": 0.3})],
            [("two", 3, 4, {"weight": [0.2, 0.6]}), ("base", 0, 1, {"weight": [0.5, 0.25]})],
        ],
    },
    "linear, tokenizer union": {"merge_method": "linear", "members": WHOLE, "tokenizer": {"source": "union"}},
    "task_arithmetic, tokenizer union": {
        **task_vectors("task_arithmetic", WHOLE),
        "tokenizer": {
            "source": "union",
            "tokens": {"<new>": {"source": {"kind": "model_token", "model": "one", "token": "the"}}},
        },
    },
}  # fmt: skip
DRAWN = {
    f"{method}, density {density}": task_vectors(method, [{"weight": 1.0, "density": density}])
    for method in ("dare_linear", "dare_ties", "della", "della_linear")
    for density in (0.2, 0.5)
}


def main() -> None:
    """Make the models, merge them both ways and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", type=Path, required=True, help="path of mergekit-yaml in its own environment")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/mergekit_agreement"))
    options = parser.parse_args()
    work = options.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    found: dict[str, dict[tuple[str, str], str]] = {name: {} for name in CASES}
    draws: dict[str, dict[str, str]] = {name: {} for name in DRAWN}
    for kind in options.kinds:
        for way, dtype in DTYPES.items():
            models = work / f"{kind}-{dtype}"
            if not models.exists():
                make_models(models, KINDS[kind], dtype)
            cases = CASES | (DRAWN if way == "float32" else {})
            files = {name: write_case(work / f"{kind}-{way}", models, name, case, way) for name, case in cases.items()}
            run_mergekit(options.mergekit, files)
            for name, file in files.items():
                run_ours(file)
                if name in CASES:
                    found[name][kind, way] = compared(file, dtype)
                else:
                    draws[name][kind] = statistics(file, models / "base")
    columns = [(kind, way) for kind in options.kinds for way in DTYPES]
    head = {"float32": "fp32: largest difference", "bfloat16": "bf16: apart", "mixed": "bf16, fp32 inside: apart"}
    print("| merge | " + " | ".join(f"{kind}, {head[way]}" for kind, way in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in found.items():
        print(f"| {name} | " + " | ".join(row[column] for column in columns) + " |")
    print(
        "\n| drawn at random | "
        + " | ".join(f"{kind}: kept, length (mergekit; hf_zoo)" for kind in options.kinds)
        + " |"
    )
    print("|---" * (len(options.kinds) + 1) + "|")
    for name, texts in draws.items():
        print(f"| {name} | " + " | ".join(texts[kind] for kind in options.kinds) + " |")


def make_models(folder: Path, architecture: str, dtype: str) -> None:
    """Save a base and two members near it with one tokenizer, and three with tokenizers of their own."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model_class = getattr(transformers, architecture)
    for own in (False, True):
        start: dict[str, Tensor] = {}
        for seed, name in enumerate(("base", "one", "two")):
            tokenizer = make_tokenizer(architecture, WORDS[name] if own else " ".join(WORDS.values()))
            config = model_class.config_class(
                vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=NUM_BLOCKS,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0,
                tie_word_embeddings="Bert" in architecture,
            )  # fmt: skip
            model = model_class(config)
            generator = torch.Generator().manual_seed(seed + 10 * own)
            for key, parameter in model.named_parameters():
                with torch.no_grad():
                    drawn = torch.randn(parameter.shape, generator=generator)
                    old = start.get(key)
                    near = old is not None and old.shape == drawn.shape
                    parameter.copy_(old + NOISE * drawn if near and old is not None else 0.1 * drawn)
            start = start or {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
            where = folder / (f"own-{name}" if own else name)
            model.to(getattr(torch, dtype)).save_pretrained(where)
            tokenizer.save_pretrained(where)


def make_tokenizer(architecture: str, text: str) -> Any:
    """Train a tokenizer of the kind that goes with a model."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if "Bert" in architecture:
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        vocabulary = {word: number for number, word in enumerate([*special, *sorted(set(text.split()))])}
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=letters, show_progress=False),
    )
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write_case(folder: Path, models: Path, name: str, case: Mapping[str, Any], way: str) -> Path:
    """Write a case's YAML into a folder of its own and return its path."""
    prefix = "own-" if "tokenizer" in case else ""

    def where(model: str) -> str:
        return str(models / (prefix + model))

    content: dict[str, Any] = {"merge_method": case["merge_method"], "parameters": dict(case.get("parameters", {}))}
    if "slices" in case:
        content["slices"] = [
            {"sources": [
                {"model": where(model), "layer_range": [start, stop], "parameters": own}
                for model, start, stop, own in sources
            ]}
            for sources in case["slices"]
        ]  # fmt: skip
    else:
        content["models"] = [
            {"model": where(model), "parameters": own}
            for model, own in zip(("one", "two"), case["members"], strict=False)
        ]
    if "base" in case:
        content["base_model"] = where(case["base"])
    if "tokenizer" in case:
        content["tokenizer"] = json.loads(json.dumps(case["tokenizer"]))
        for override in content["tokenizer"].get("tokens", {}).values():
            override["source"]["model"] = where(override["source"]["model"])
    content |= {"dtype": "float32", "out_dtype": "bfloat16"} if way == "mixed" else {"dtype": way}
    own = folder / "".join(letter if letter.isalnum() else "-" for letter in name)
    own.mkdir(parents=True)
    (own / "merge.yml").write_text(yaml.safe_dump(content))
    return own / "merge.yml"


def run_mergekit(command: Path, files: Mapping[str, Path]) -> None:
    """Merge every file with mergekit, beside it in `theirs`."""
    tasks = json.dumps([[str(file), str(file.parent / "theirs")] for file in files.values()])
    interpreter = command.parent / "python"
    process = subprocess.run(
        [str(interpreter), "-c", DRIVER], input=tasks, text=True, capture_output=True, check=False
    )
    failed = [line for line in process.stderr.splitlines() if "merge.yml: " in line]
    if failed or process.returncode:
        print("\n".join(failed) or process.stderr[-2000:])


def run_ours(file: Path) -> None:
    """Merge a file with `hf-zoo merge`, beside it in `ours`."""
    from hf_zoo.merge import main as merge

    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        status = merge([str(file), "name=ours", f"output={file.parent}", "lineage=ignore"])
    if status != 0:
        print(f"{file}: hf-zoo merge: {told.getvalue().strip().splitlines()[-1]}")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a folder."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def compared(file: Path, dtype: str) -> str:
    """Return how far apart the two merges of a file are."""
    theirs, ours = tensors_of(file.parent / "theirs"), tensors_of(file.parent / "ours")
    if not theirs or not ours:
        return "no merge of " + " and ".join(name for name, one in (("theirs", theirs), ("ours", ours)) if not one)
    if theirs.keys() != ours.keys():
        return f"other tensors: {', '.join(sorted(theirs.keys() ^ ours.keys())[:3])}"
    pairs = [(theirs[name], ours[name]) for name in theirs]
    if "tokenizer:" in file.read_text():
        pairs = [by_token(file, one, two) for one, two in pairs]
    if any(one.shape != two.shape for one, two in pairs):
        return "other shapes"
    if dtype == "float32":
        return f"{max(float((one - two).abs().max()) for one, two in pairs):.1e}"
    apart = sum(int((steps(one) - steps(two)).abs().gt(1).sum()) for one, two in pairs)
    total = sum(one.numel() for one, _ in pairs)
    return f"{100 * apart / total:.3f} %" if apart else "0"


def by_token(file: Path, theirs: Tensor, ours: Tensor) -> tuple[Tensor, Tensor]:
    """Return two tensors, rows of tokens in one order; the tokens may be numbered otherwise."""
    from transformers import AutoTokenizer

    numbers = [AutoTokenizer.from_pretrained(file.parent / name).get_vocab() for name in ("theirs", "ours")]
    if theirs.ndim == 0 or len(ours) != len(numbers[1]):
        return theirs, ours
    if numbers[0].keys() != numbers[1].keys():
        return theirs, ours[:0]  # told as another shape
    places = [torch.tensor([own[token] for token in numbers[0]]) for own in numbers]
    return theirs[places[0]], ours[places[1]]


def steps(values: Tensor) -> Tensor:
    """Number bfloat16 values so that neighbours differ by one, both zeros being 0."""
    bits = values.to(torch.bfloat16).contiguous().view(torch.int16).to(torch.int32)
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def statistics(file: Path, base: Path) -> str:
    """Return the share of entries that left the base and the length of the difference, theirs and ours."""
    root, parts = tensors_of(base), []
    for name in ("theirs", "ours"):
        merged = tensors_of(file.parent / name)
        if not merged:
            parts.append("no merge")
            continue
        differences = torch.cat([(merged[key] - root[key]).flatten().double() for key in root if key in merged])
        parts.append(f"{float((differences != 0).double().mean()):.4f}, {float(differences.norm()):.3f}")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
