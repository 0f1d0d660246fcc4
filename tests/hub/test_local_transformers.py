"""Stock transformers, datasets and peft code against the local Hub, in processes that know only HF_ENDPOINT."""

import os
import sys

PUSH = """
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertTokenizer
torch.manual_seed(0)
config = BertConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
model = AutoModelForSequenceClassification.from_config(config)
model.push_to_hub("zoo/bert-000", commit_message="the trained model")
BertTokenizer(vocab={word: i for i, word in enumerate("[PAD] [UNK] [CLS] [SEP] [MASK] a b c".split())}).push_to_hub(
    "zoo/bert-000"
)
with torch.no_grad():
    model.classifier.weight.fill_(0.25)
model.push_to_hub("zoo/bert-000", revision="epoch-010")
print("pushed")
"""

LOAD = """
import torch
from huggingface_hub import HfApi, get_safetensors_metadata, snapshot_download
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer
last, info = AutoModelForSequenceClassification.from_pretrained("zoo/bert-000", output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
early = AutoModelForSequenceClassification.from_pretrained("zoo/bert-000", revision="epoch-010")
torch.testing.assert_close(early.classifier.weight, torch.full_like(early.classifier.weight, 0.25), rtol=0, atol=0)
assert not torch.equal(last.classifier.weight, early.classifier.weight)
torch.testing.assert_close(AutoModel.from_pretrained("zoo/bert-000").embeddings.word_embeddings.weight,
                           early.bert.embeddings.word_embeddings.weight, rtol=0, atol=0)
assert AutoTokenizer.from_pretrained("zoo/bert-000")("a b").input_ids == [2, 5, 6, 3]
shared = HfApi().model_info("zoo/bert-000")
assert shared.library_name == "transformers" and shared.pipeline_tag == "text-classification", shared
assert shared.safetensors.total == sum(p.numel() for p in last.parameters()), shared.safetensors
assert get_safetensors_metadata("zoo/bert-000").parameter_count == {"F32": shared.safetensors.total}
print("loaded")
"""


def test_stock_auto_classes_push_and_load_every_revision(local_hub, run_with_hub):
    assert "pushed" in run_with_hub(local_hub, PUSH)
    assert "loaded" in run_with_hub(local_hub, LOAD)
    downloads = [request for request in local_hub.requests if request.method == "GET" and "/resolve/" in request.path]
    assert {request.status for request in downloads} <= {200, 206, 404}


DATASETS = """
from datasets import Dataset, load_dataset
Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).push_to_hub("zoo/data")
print(load_dataset("zoo/data", split="train")[1])
"""


def test_a_dataset_comes_back(local_hub, run_with_hub):
    assert "{'text': 'b', 'label': 1}" in run_with_hub(local_hub, DATASETS)


COMMAND_LINE = """
import subprocess, sys
def hf(*words):
    return subprocess.run(["hf", *words], capture_output=True, text=True, check=True).stdout
open("notes.txt", "w").write("notes")
hf("upload", "zoo/cli", "notes.txt", "notes.txt")
print(hf("download", "zoo/cli", "notes.txt"))
print(hf("models", "ls", "--author", "zoo", "--format", "json"))
"""


def test_the_hf_command_line(local_hub, run_with_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    printed = run_with_hub(local_hub, COMMAND_LINE, token="hf_any")
    assert "notes.txt" in printed
    assert "zoo/cli" in printed
