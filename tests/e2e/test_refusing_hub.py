"""A Hub that refuses, breaks off or is gone, as `hf-zoo publish` says it; and a second run that makes it good."""

import pytest
from commands import tree, verb
from huggingface_hub import HfApi, constants

from hf_zoo.hub.local import FolderHub

WEIGHTS = ("model.safetensors", "results.jsonl", "config.json")
NAMES = ("zoo-vit-000", "zoo-vit-001")


@pytest.fixture
def client(monkeypatch, tmp_path):
    """Point this process's client at a Hub: `client(hub)`."""

    def point(hub):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        return HfApi(endpoint=hub.url, token=False)

    return point


def failure(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("error: ") == 1
    assert "Traceback" not in err
    return err.partition("error: ")[2]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"status": 401, "method": "POST", "path": "/api/repos/create"}, "HF_TOKEN"),
        ({"status": 403, "method": "POST", "path": "/api/repos/create"}, "namespace it can write to"),
        ({"status": 409, "method": "POST", "path": "/commit/main"}, "run the same command again"),
        ({"status": 429, "method": "POST", "path": "/commit/epoch-001"}, "wait"),
        ({"status": 500, "method": "POST", "path": "/commit/main"}, "run the same command again later"),
        ({"method": "POST", "path": "/commit/main", "cut_after": 10}, "No answer while pushing main"),
        ({"status": 500, "method": "POST", "path": "/api/collections"}, "zoo-vit"),
    ],
    ids=["401", "403", "409", "429", "500", "gone", "collection"],
)
def test_a_hub_that_refuses_loses_nothing(work, tmp_path, client, capsys, fault, said):
    before = tree(work)
    capsys.readouterr()
    with FolderHub(tmp_path / "hub") as hub:
        api = client(hub)
        hub.fail_next(**fault)
        assert verb("publish", "runs/zoo-vit", "namespace=org", "workers=1") == 2
        message = failure(capsys)
        assert said in message
        assert str(fault.get("status", "")) in message
        for repo in api.list_models(author="org"):  # listed as a member: whole
            files = api.list_repo_files(repo.id)
            assert files == [".gitattributes"] or set(WEIGHTS) <= set(files)
        assert verb("publish", "runs/zoo-vit", "namespace=org") == 0
        assert verb("publish", "runs/zoo-vit", "namespace=org") == 0
        assert "0 commits, 0 files sent" in capsys.readouterr().out
        assert [repo.id for repo in api.list_models(author="org", filter="population:zoo-vit")] != []
        assert sorted(
            item.item_id for item in api.get_collection(next(iter(api.list_collections(owner="org"))).slug).items
        ) == [f"org/{name}" for name in NAMES]
    after = tree(work)
    assert before.keys() <= after.keys()
    assert [path for path in before if path.endswith(WEIGHTS) and after[path] != before[path]] == []


def test_a_hub_that_is_gone_is_said(work, tmp_path, client, capsys):
    with FolderHub(tmp_path / "hub") as hub:
        client(hub)
    capsys.readouterr()
    assert verb("publish", "runs/zoo-vit", "namespace=org") == 2
    message = failure(capsys)
    assert message.count("No answer while looking up") == 1  # the same words for both members are said once
    assert "HF_ENDPOINT" in message


@pytest.mark.parametrize("namespace", ["or/g", "-org", "o--rg", "org.git", ""])
def test_a_name_the_hub_would_refuse_sends_nothing(work, tmp_path, client, capsys, namespace):
    before = tree(work)
    capsys.readouterr()
    with FolderHub(tmp_path / "hub") as hub:
        client(hub)
        assert verb("publish", "runs/zoo-vit", f"namespace={namespace}") == 2
        assert "namespace" in failure(capsys)
        assert hub.requests == []
    assert tree(work) == before


def test_a_missing_folder_is_said(work, tmp_path, client, capsys):
    capsys.readouterr()
    assert verb("publish", "runs/zoo-vti", "namespace=org") == 2
    message = failure(capsys)
    assert "runs/zoo-vti" in message


def test_training_that_cannot_be_published_is_kept(work, tmp_path, client, capsys):
    with FolderHub(tmp_path / "hub") as hub:
        client(hub)
    assert verb("pretrain", "vit.yaml", "name=zoo-new", "publish.namespace=org") == 2
    assert "No answer" in capsys.readouterr().err
    with FolderHub(tmp_path / "hub") as hub:
        api = client(hub)
        assert verb("pretrain", "vit.yaml", "name=zoo-new", "publish.namespace=org") == 0
        assert "model.safetensors" in api.list_repo_files("org/zoo-new-000")
