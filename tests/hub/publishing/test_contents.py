"""What of a folder goes to a Hub, and what never does."""

import json
import shutil

import pytest
from tiny_zoo import state_of, write_population

from hf_zoo.errors import HubError
from hf_zoo.hub.contents import folder_files, is_published
from hf_zoo.hub.local import FolderHub
from hf_zoo.hub.publish import publish_member, publish_population

SECRET = "hf_" + "s3cretAbCdEfGhIjKlMnOpQrStUvWxYz01"
REVISIONS = ("epoch-000", "epoch-001", "epoch-002")


def test_what_only_training_needs_stays_here(api, zoo, spec):
    member = zoo / "zoo-t-000"
    for name in ("training_args.bin", "optimizer.pt", "optimizer.safetensors", "rng_state_0.pth", "scheduler.pt",
                 "trainer_state.json", ".env", "pytorch_model.bin", "checkpoint-10/model.safetensors",
                 "snapshots/epoch-001/optimizer.pt", "__pycache__/x.py"):  # fmt: skip
        (member / name).parent.mkdir(exist_ok=True)
        (member / name).write_bytes(b"x")
    report = publish_population(zoo, spec())
    for revision in ("main", *REVISIONS):
        files = set(api.list_repo_files("org/zoo-t-000", revision=revision))
        assert not [path for path in files if "/" in path]
        assert {path.rpartition(".")[2] for path in files} <= {
            "json",
            "jsonl",
            "safetensors",
            "md",
            "png",
            "gitattributes",
        }
        assert [path for path in files if path.endswith(".safetensors")] == ["model.safetensors"]
        assert not [path for path in files if "train" in path]
    assert "zoo-t-000/training_args.bin" in report.left_out


@pytest.mark.parametrize(
    ("path", "published"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("mnli/model.safetensors", True),
        ("statistics/fisher.safetensors", True),
        ("modeling_zoo.py", True),
        ("vocab.txt", True),
        ("snapshots/epoch-001/model.safetensors", False),
        (".training/checkpoint-3/model.safetensors", False),
        (".cache/x.json", False),
        ("mnli/.hidden/x.json", False),
        ("training_args.json", False),
        ("training_args.bin", False),
        ("optimizer.safetensors", False),
        ("weights.pkl", False),
        ("population.json", False),
        ("id_rsa", False),
    ],
)
def test_what_belongs_into_a_repo(path, published):
    assert is_published(path) is published


def test_a_token_in_a_file_stops_everything(api, local_hub, zoo, monkeypatch, spec, changes):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    (zoo / "zoo-t-000" / "notes.txt").write_text("export HF_TOKEN=a-token-of-another-form")
    with pytest.raises(HubError, match=r"notes\.txt: holds a token") as caught:
        publish_member(zoo / "zoo-t-000", "org", spec())
    assert "a-token-of" not in str(caught.value)
    assert changes() == []


def test_somebody_elses_token_is_a_token_too(api, local_hub, zoo, spec, changes):
    config = json.loads((zoo / "zoo-t-000" / "config.json").read_text())
    (zoo / "zoo-t-000" / "config.json").write_text(json.dumps(config | {"hub_token": SECRET}))
    with pytest.raises(HubError, match="holds a token") as caught:
        publish_member(zoo / "zoo-t-000", "org", spec())
    assert SECRET not in str(caught.value)
    assert changes() == []


def test_a_token_across_two_pieces_of_a_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_zoo.hub.contents.CHUNK_BYTES", 64)
    (tmp_path / "long.txt").write_text("x" * 50 + SECRET + "y" * 50)
    with pytest.raises(HubError, match="holds a token"):
        folder_files(tmp_path)


def test_the_token_used_is_in_no_file_and_no_message(tmp_path, hub_api, base, monkeypatch, spec):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    folder = tmp_path / "zoo-t"
    write_population(folder, base, num_members=1)
    with FolderHub(tmp_path / "hub", tokens={SECRET: "alice,org"}) as hub:
        api = hub_api(hub, SECRET)
        publish_population(folder, spec())
        stored = b"".join(state_of(tmp_path / "hub").values())
        assert SECRET.encode() not in stored
        assert SECRET.encode() not in b"".join(state_of(folder).values())
        assert api.model_info("org/zoo-t-000").private
        hub.fail_next(500, path="/refs")
        with pytest.raises(HubError) as caught:
            publish_population(folder, spec())
        assert SECRET not in str(caught.value)


def test_a_link_out_of_the_folder_is_refused(api, local_hub, zoo, tmp_path, spec, changes):
    (tmp_path / "private.txt").write_text("secret")
    (zoo / "zoo-t-000" / "vocab.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(HubError, match="link out of its folder"):
        publish_member(zoo / "zoo-t-000", "org", spec())
    assert changes() == []


def test_changed_weights_are_refused(api, local_hub, zoo, spec, changes):
    weights = zoo / "zoo-t-000" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(HubError, match="truncated or changed"):
        publish_member(zoo / "zoo-t-000", "org", spec())
    shutil.rmtree(zoo / "zoo-t-001" / "snapshots" / "epoch-001")
    with pytest.raises(HubError, match=r"epoch-001: no such folder"):
        publish_member(zoo / "zoo-t-001", "org", spec())
    assert changes() == []
