"""The snippets on a card: Python that runs as it stands, with the stock Auto classes and no hf_zoo."""

from __future__ import annotations

import json
from typing import Any

from hf_zoo.hub.metadata import is_image_model, pipeline_tag
from hf_zoo.population import Manifest

_TEXT_CLASSIFICATION = """\
import torch
from transformers import {auto_class}, AutoTokenizer

repo = {repo}
tokenizer = AutoTokenizer.from_pretrained(repo)
model = {auto_class}.from_pretrained(repo{options})

inputs = tokenizer({example}, return_tensors="pt")
with torch.inference_mode():
    label = model(**inputs).logits.argmax(-1).item()
print(model.config.id2label[label])
"""

_FILL_MASK = """\
import torch
from transformers import {auto_class}, AutoTokenizer

repo = {repo}
tokenizer = AutoTokenizer.from_pretrained(repo)
model = {auto_class}.from_pretrained(repo{options})

inputs = tokenizer(f"return the {{tokenizer.mask_token}} of the list", return_tensors="pt")
with torch.inference_mode():
    logits = model(**inputs).logits
masked = inputs.input_ids == tokenizer.mask_token_id
print(tokenizer.decode(logits[masked].argmax(-1)))
"""

_TEXT_FEATURES = """\
import torch
from transformers import {auto_class}, AutoTokenizer

repo = {repo}
tokenizer = AutoTokenizer.from_pretrained(repo)
model = {auto_class}.from_pretrained(repo{options})

inputs = tokenizer("A sentence to embed.", return_tensors="pt")
with torch.inference_mode():
    features = model(**inputs).last_hidden_state
"""

_IMAGE_CLASSIFICATION = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto_class}

repo = {repo}
processor = AutoImageProcessor.from_pretrained(repo)
model = {auto_class}.from_pretrained(repo{options})

inputs = processor(Image.open("picture.png").convert({mode}), return_tensors="pt")
with torch.inference_mode():
    label = model(**inputs).logits.argmax(-1).item()
print(model.config.id2label[label])
"""

_IMAGE_FEATURES = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, {auto_class}

repo = {repo}
processor = AutoImageProcessor.from_pretrained(repo)
model = {auto_class}.from_pretrained(repo{options})

inputs = processor(Image.open("picture.png").convert({mode}), return_tensors="pt")
with torch.inference_mode():
    features = model(**inputs)[0]
"""

_SNIPPETS = {
    "text-classification": _TEXT_CLASSIFICATION,
    "fill-mask": _FILL_MASK,
    "image-classification": _IMAGE_CLASSIFICATION,
    "image-feature-extraction": _IMAGE_FEATURES,
}


def usage(manifest: Manifest, repo: str) -> str:
    """Return Python that loads the model and runs it once; an image model reads `picture.png`."""
    snippet = _SNIPPETS.get(
        pipeline_tag(manifest) or "", _IMAGE_FEATURES if is_image_model(manifest) else _TEXT_FEATURES
    )
    return snippet.format(
        auto_class=manifest.auto_class or "AutoModel",
        repo=literal(repo),
        options=_options(manifest),
        mode=_mode(manifest),
        example=_example(manifest),
    )


def revision_usage(manifest: Manifest, repo: str, revision: str) -> str:
    """Return Python that loads one revision of a member."""
    auto_class = manifest.auto_class or "AutoModel"
    chosen = f"revision={literal(revision)}"
    if manifest.library == "peft":  # `revision=` would be looked up in the base model's repo as well
        chosen = f'adapter_kwargs={{"revision": {literal(revision)}}}'
    chosen += _options(manifest)
    load = f"model = {auto_class}.from_pretrained({literal(repo)}, {chosen})"
    return f"from transformers import {auto_class}\n\n{load}\n"


def task_usage(manifest: Manifest, repo: str) -> str:
    """Return Python that loads each task's model of a merge that keeps its heads in sub-folders."""
    auto_class = (
        "AutoModelForImageClassification" if is_image_model(manifest) else "AutoModelForSequenceClassification"
    )
    loads = [
        f"models[{literal(task)}] = {auto_class}.from_pretrained({literal(repo)}, subfolder={literal(task)})\n"
        for task in manifest.tasks
    ]
    return f"from transformers import {auto_class}\n\nmodels = {{}}\n" + "".join(loads)


def population_usage(manifest: Manifest, repo: str) -> str:
    """Return Python that opens the member's whole population through hf_zoo."""
    namespace = repo.partition("/")[0] if "/" in repo else "runs"
    opened = f"population = Population.open({literal(f'{namespace}/{manifest.population}')})"
    return f"from hf_zoo import Population\n\n{opened}\nprint(population.to_dataframe())\n"


def has_own_code(manifest: Manifest) -> bool:
    """Whether the repo ships the code of its model, which the Auto classes run only when told to."""
    return _section(_section(manifest.recipe, "model"), "head").get("type") == "mlp"


def _options(manifest: Manifest) -> str:
    """Return what `from_pretrained` must be told besides the repo, with its leading comma."""
    if has_own_code(manifest):
        return ", trust_remote_code=True"
    labels = manifest.dataset.get("labels")
    # An adapter's repo has no config of its own to tell its labels; it brings a head for them, which need not be as
    # wide as the base's.
    if manifest.library == "peft" and labels:
        named = ", ".join(f"{index}: {literal(label)}" for index, label in enumerate(labels))
        return f", id2label={{{named}}}, ignore_mismatched_sizes=True"
    return ""


def literal(text: str) -> str:
    """Return text as a Python literal in double quotes."""
    return json.dumps(text)


def _mode(manifest: Manifest) -> str:
    """Return PIL's mode for the channels the recipe gives the network, or Python that asks the processor for it."""
    config = _section(_section(manifest.recipe, "model"), "config")
    channels = config.get("num_channels") or _section(config, "model_args").get("in_chans")
    if channels is None:  # taken from the data
        return '"L" if len(processor.image_mean) == 1 else "RGB"'
    return literal("L" if channels == 1 else "RGB")


def _example(manifest: Manifest) -> str:
    """Return the tokenizer's arguments: two texts where the data has pairs."""
    pairs = _section(manifest.recipe, "data").get("text_pair") or manifest.dataset.get("path") == "docs-pairs"
    first = '"A sentence to classify."'
    return f'{first}, "And a second one."' if pairs else first


def _section(content: dict[str, Any], key: str) -> dict[str, Any]:
    section = content.get(key)
    return section if isinstance(section, dict) else {}
