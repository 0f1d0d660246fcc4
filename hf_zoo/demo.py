"""`make demo`: the main job on this machine: train, publish to a local Hub, merge, load with stock Auto classes."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hf_zoo.cli import guarded
from hf_zoo.errors import HubError, ZooError

OUTPUT = Path("runs/demo")
NAMESPACE = "org"
POPULATIONS = ("zoo-vit", "zoo-bert", "zoo-bert-tasks")
MERGE = "merge-sst-mnli"

# Run in a process of its own: nothing of hf_zoo is imported there.
CHECK = """
import sys
import torch
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

vit = AutoModel.from_pretrained("org/zoo-vit-042")
early = AutoModelForImageClassification.from_pretrained("org/zoo-vit-042", revision="epoch-001")
print(f'AutoModel.from_pretrained("org/zoo-vit-042")  {type(vit).__name__}, {vit.num_parameters():,} parameters')
print(f'AutoModelForImageClassification.from_pretrained("org/zoo-vit-042", revision="epoch-001")  '
      f'{type(early).__name__}')
trunk = AutoModel.from_pretrained("org/merge-sst-mnli")
print(f'AutoModel.from_pretrained("org/merge-sst-mnli")  {type(trunk).__name__}')
tokenizer = AutoTokenizer.from_pretrained("org/merge-sst-mnli")
for task in ("sst", "mnli"):
    model = AutoModelForSequenceClassification.from_pretrained("org/merge-sst-mnli", subfolder=task)
    with torch.no_grad():
        label = model(**tokenizer("The object is returned.", return_tensors="pt")).logits.argmax().item()
    print(f'AutoModelForSequenceClassification.from_pretrained("org/merge-sst-mnli", subfolder="{task}")  '
          f'"The object is returned." -> {model.config.id2label[label]}')
assert not [name for name in sys.modules if name.startswith("hf_zoo")]
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: _demo(serve="--serve" in arguments or sys.stdout.isatty()))


def _demo(serve: bool) -> int:
    from hf_zoo.hub.local import FolderHub

    started = time.monotonic()
    with FolderHub(OUTPUT / "hub", port=0) as hub:
        # Before anything imports the Hub's client, which reads its environment once.
        os.environ["HF_ENDPOINT"] = hub.url
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ["HF_HOME"] = str((OUTPUT / "hf-home").absolute())
        print(f"A Hub on this machine: {hub.url} (kept in {OUTPUT / 'hub'})")
        _run("pretrain", "recipes/zoo_vit.yaml", "members=0,14,28,42")
        _run("pretrain", "recipes/bert_mlm.yaml", "vary.seed=[0]")
        _run("finetune", "recipes/bert_tasks.yaml", "vary.seed=[0]", f"parent={OUTPUT}/zoo-bert/zoo-bert-000")
        _run("merge", "recipes/merge_tasks.yaml", f"population={OUTPUT}/zoo-bert-tasks")
        print("\n== In a fresh process, without hf_zoo")
        _check()
        print("\n== Everything on the Hub")
        _list_hub()
        print(f"\nDone in {time.monotonic() - started:.0f} s.")
        if not serve:
            print(f"See it again: hf-zoo hub serve {OUTPUT / 'hub'}")
            return 0
        print(f"Look at it in a browser: {hub.url} (Ctrl-C stops it; `make hub` brings it back)")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            return 0


def _run(verb: str, recipe: str, *overrides: str) -> None:
    """Run a verb as the command line does, with the demo's folder and namespace."""
    from importlib import import_module

    common = [f"output={OUTPUT}", f"publish.namespace={NAMESPACE}"]
    command = [recipe, *overrides, *common]
    print(f"\n== python -m hf_zoo.{verb} {shlex.join(command)}", flush=True)
    status = import_module(f"hf_zoo.{verb}").main(command)
    if status:
        raise ZooError(f"demo: hf_zoo.{verb} ended with status {status}, see above")


def _check() -> None:
    # A trunk alone lacks its model's head, which transformers reports at length.
    environment = os.environ | {"TRANSFORMERS_VERBOSITY": "error"}
    result = subprocess.run([sys.executable, "-c", CHECK], check=False, env=environment)
    if result.returncode:
        raise HubError("demo: the models could not be loaded back, see above")


def _list_hub() -> None:
    """Print one row a repo and task, read back from the Hub."""
    from hf_zoo.display import format_table
    from hf_zoo.hub.client import fetch_manifest
    from hf_zoo.population import Population

    results = [
        (member.name, member.manifest.task, member.metrics)
        for name in POPULATIONS
        for member in Population.open(f"{NAMESPACE}/{name}")
    ]
    merge, _ = fetch_manifest(f"{NAMESPACE}/{MERGE}")
    results += [(MERGE, record["task"], record) for record in merge.results if record["model"] == MERGE]
    rows = [
        {"repo": f"{NAMESPACE}/{name}", "task": task, "test accuracy": f"{metrics['test_accuracy']:.3f}"}
        for name, task, metrics in results
    ]
    print(format_table(rows))


if __name__ == "__main__":
    sys.exit(main())
