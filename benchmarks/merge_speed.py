"""What a merge costs, whole process, against mergekit and against the machine itself.

Models are made in a folder that is kept (`--work`), so that a second run begins at once. Every contender is a process
of its own, started alternately, warm page cache; the times are medians of `--rounds`. The floor reads every input once
and writes the output once (`readinto` a small buffer, `write`), nothing else. Memory is the largest resident set of the
process less that of a process that only imports torch. `PATH=... python -m benchmarks.merge_speed --job bert-fp32
--mergekit ENVIRONMENT/bin/mergekit-yaml`; mergekit 0.1.5 goes into an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

METHODS = {
    "linear": ("average", {}, {"merge_method": "linear"}, {"weight": 1.0}),
    "slerp": ("slerp", {"t": 0.5}, {"merge_method": "slerp", "parameters": {"t": 0.5}}, {}),
    "task arithmetic": ("task_arithmetic", {"scale": 0.5}, {"merge_method": "task_arithmetic"}, {"weight": 0.5}),
    "TIES": (
        "ties",
        {"density": 0.5, "trim": "tensor"},
        {"merge_method": "ties", "parameters": {"normalize": True}},
        {"weight": 1.0, "density": 0.5},
    ),
    "DARE-TIES": (
        "dare",
        {"density": 0.5, "election": "total"},
        {"merge_method": "dare_ties", "parameters": {"normalize": True}},
        {"weight": 1.0, "density": 0.5},
    ),
}
WITH_BASE = {"task arithmetic", "TIES", "DARE-TIES"}
JOBS = {
    "bert-fp32": ("bert", "float32", list(METHODS)),
    "bert-bf16": ("bert", "bfloat16", list(METHODS)),
    "llama-1.2b": ("llama", "bfloat16", ["linear"]),
    "zoo-64": ("zoo", "float32", ["linear"]),
}
NUM_ZOO = 64
LOAD_ALL = """
import sys
import torch
from transformers import AutoModelForSequenceClassification
*members, output = sys.argv[1:]
models = [AutoModelForSequenceClassification.from_pretrained(member) for member in members]
states = [model.state_dict() for model in models]
soup = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
models[0].load_state_dict(soup)
models[0].save_pretrained(output)
"""
LOAD_FILES = """
import sys
import torch
from safetensors.torch import load_file, save_file
*members, output = sys.argv[1:]
states = [load_file(member + "/model.safetensors") for member in members]
soup = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
save_file(soup, output + ".safetensors", metadata={"format": "pt"})
"""
FLOOR = """
import sys
buffer = bytearray(1 << 20)
view = memoryview(buffer)
*inputs, output = sys.argv[1:]
for path in inputs:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
size = __import__("os").path.getsize(inputs[0])
with open(output, "wb", buffering=0) as file:
    done = 0
    while done < size:
        done += file.write(view[: size - done])
"""


def make_models(work: Path, kind: str, dtype: str) -> list[Path]:
    """Make a base and three members near it, with random weights, or find them made."""
    count = NUM_ZOO if kind == "zoo" else 3
    names = ["base", *(f"member-{place}" for place in range(1, count + 1))]
    folders = [work / f"{kind}-{dtype}" / name for name in names]
    if all((folder / "config.json").is_file() for folder in folders):
        return folders
    import torch
    import transformers

    if kind == "bert":
        config, model_class = transformers.BertConfig(), transformers.BertForSequenceClassification
    elif kind == "zoo":  # 20 MB
        small = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
        config, model_class = (
            transformers.BertConfig(vocab_size=6500, **small),
            transformers.BertForSequenceClassification,
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
            num_key_value_heads=4, max_position_embeddings=2048,
        )  # fmt: skip
        model_class = transformers.LlamaForCausalLM
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    model = model_class(config)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed, folder in enumerate(folders):
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator).mul_(0.002 * (seed > 0))
                tensor.copy_(start[name] + noise)
        model.save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    return folders


def run(command: list[str], log: Path) -> tuple[float, float, float]:
    """Run a process and return wall seconds, processor seconds and its largest resident set in MB."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    del before
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def contenders(work: Path, folders: list[Path], method: str, mergekit: str | None) -> dict[str, list[str]]:
    """Return the commands to compare."""
    base, *members = folders
    merged = members[:2] if method == "slerp" else members
    ours, parameters, theirs, each = METHODS[method]
    recipe = {
        "name": "ours", "output": str(work / "out"), "members": [str(path) for path in merged], "method": ours,
        "parameters": parameters, "evaluate": False,
    }  # fmt: skip
    models = [{"model": str(path), "parameters": each} if each else {"model": str(path)} for path in merged]
    config = {**theirs, "models": models, "dtype": json.loads((base / "config.json").read_text())["dtype"]}
    if method in WITH_BASE:
        recipe["base"] = config["base_model"] = str(base)
    if method == "slerp":
        config["base_model"] = str(merged[0])
    (work / "ours.yaml").write_text(yaml.safe_dump(recipe))
    (work / "theirs.yaml").write_text(yaml.safe_dump(config))
    inputs = [str(path / "model.safetensors") for path in (folders if method in WITH_BASE else merged)]
    commands = {
        "floor": [sys.executable, "-S", "-c", FLOOR, *inputs, str(work / "out" / "floor.bin")],
        "import torch": [sys.executable, "-c", "import torch"],
        "hf_zoo": [sys.executable, "-m", "hf_zoo.merge", str(work / "ours.yaml")],
    }
    if len(merged) > 3:
        paths = [str(path) for path in merged]
        commands["load all models"] = [sys.executable, "-c", LOAD_ALL, *paths, str(work / "out" / "all")]
        commands["load all files"] = [sys.executable, "-c", LOAD_FILES, *paths, str(work / "out" / "all")]
    elif mergekit is not None:
        commands["mergekit"] = [mergekit, str(work / "theirs.yaml"), str(work / "out" / "theirs")]
    return commands


def compare(work: Path, commands: dict[str, list[str]], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Run every contender `rounds` times, alternating, and return medians of its wall, processor time and memory."""
    measured: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for _ in range(rounds + 1):  # the first round fills the page cache
        for name, command in commands.items():
            shutil.rmtree(work / "out", ignore_errors=True)
            (work / "out").mkdir()
            measured[name].append(run(command, work / f"{name.replace(' ', '_')}.log"))
    return {
        name: tuple(statistics.median(one[i] for one in runs[1:]) for i in range(3)) for name, runs in measured.items()
    }


def main() -> None:
    """Measure a job and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--job", choices=JOBS, default="bert-fp32")
    parser.add_argument("--methods", nargs="*", default=None)
    parser.add_argument("--mergekit", default=None, help="path of mergekit-yaml in its own environment")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/merge"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    kind, dtype, methods = JOBS[options.job]
    work = options.work.absolute()
    folders = make_models(work, kind, dtype)
    print(
        "| method | floor | import torch | hf_zoo | mergekit | ratio | hf_zoo over `import torch`, MB | mergekit, MB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for method in options.methods or methods:
        found = compare(work, contenders(work, folders, method, options.mergekit), options.rounds)
        floor, torch_alone, ours = found["floor"], found["import torch"], found["hf_zoo"]
        theirs = found.get("mergekit") or found.get("load all models")
        print(
            f"| {method} | {floor[0]:.2f} | {torch_alone[0]:.2f} | {ours[0]:.2f} (processor {ours[1]:.2f}) | "
            + (f"{theirs[0]:.2f} | {ours[0] / theirs[0]:.3f} | " if theirs else "- | - | ")
            + f"{ours[2] - torch_alone[2]:.0f} | "
            + (f"{theirs[2] - torch_alone[2]:.0f} |" if theirs else "- |"),
            flush=True,
        )
        if "load all files" in found:
            print(
                f"load all files: {found['load all files'][0]:.2f} s, {found['load all files'][2] - torch_alone[2]:.0f} MB"
            )


if __name__ == "__main__":
    main()
