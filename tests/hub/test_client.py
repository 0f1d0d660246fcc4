"""Reading from a Hub, and every failure of one as a message that says what to do."""

import shutil
import socket

import httpx2
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session
from tiny_zoo import state_of, write_bert, write_population

from hf_zoo.errors import HubError, PopulationError
from hf_zoo.hub.client import (
    check_repo_name,
    fetch_manifest,
    fetch_repo,
    hide_token,
    hub_errors,
    list_members,
)
from hf_zoo.hub.local import FolderHub
from hf_zoo.hub.publish import publish_population
from hf_zoo.population import Manifest, Member, Population
from hf_zoo.recipe.schema import PublishSpec


@pytest.fixture
def api(local_hub, hub_api):
    return hub_api(local_hub)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Return a population of three finished members in a folder."""
    torch.manual_seed(0)
    write_bert(base := tmp_path_factory.mktemp("base") / "bert")
    write_population(folder := tmp_path_factory.mktemp("runs") / "zoo-r", base, num_members=3, num_epochs=1)
    return folder


@pytest.fixture
def report(api, zoo):
    return publish_population(zoo, PublishSpec(namespace="org"))


def test_a_manifest_comes_with_its_commit(report, zoo):
    commits = {(done.repo, done.revision): done.commit for done in report.revisions}
    manifest, commit = fetch_manifest("org/zoo-r-001")
    assert manifest == Manifest.read(zoo / "zoo-r-001")
    assert commit == commits["org/zoo-r-001", "main"]
    for revision in ("epoch-001", commits["org/zoo-r-001", "epoch-001"]):
        manifest, commit = fetch_manifest("org/zoo-r-001", revision)
        assert manifest.sha256 == Manifest.read(zoo / "zoo-r-001").snapshots[1].sha256
        assert commit == commits["org/zoo-r-001", "epoch-001"]


def test_a_repo_is_fetched_once(report, local_hub, zoo):
    folder = fetch_repo("org/zoo-r-000", "epoch-000")
    assert (
        state_of(folder)["model.safetensors"] == (zoo / "zoo-r-000/snapshots/epoch-000/model.safetensors").read_bytes()
    )
    local_hub.requests.clear()
    assert fetch_repo("org/zoo-r-000", "epoch-000") == folder
    assert not [request for request in local_hub.requests if "/resolve/" in request.path]


def test_the_members_of_a_population_are_listed(report, api):
    assert list_members("org/zoo-r") == ["org/zoo-r-000", "org/zoo-r-001", "org/zoo-r-002"]
    assert len(Population.open("org/zoo-r").where(seed=[0, 2])) == 2
    api.create_repo("org/stranger")
    assert len(list_members("org/zoo-r")) == 3


def test_an_unknown_population_names_those_there_are(report, api, local_hub):
    with pytest.raises(PopulationError, match=r"org has no population 'zoo-x' at .*mean 'zoo-r'.*it has zoo-r"):
        Population.open("org/zoo-x")
    with pytest.raises(PopulationError, match="it has none that this token may see"):
        Population.open("nobody/zoo-r")
    local_hub.requests.clear()
    for where in ("zoo-r", "a/b/c", "org/", "../x/y", "org/zoo r"):
        with pytest.raises(PopulationError, match="no such folder"):
            Population.open(where)
    assert local_hub.requests == []


def test_what_is_not_there_is_said(report, api):
    with pytest.raises(HubError, match=r"answered 404 while reading org/zoo-r-007 at http://.*private repo"):
        Member.open("org/zoo-r-007")
    with pytest.raises(HubError, match=r"org/zoo-r-000: no revision 'epoch-01' \(did you mean .*it has epoch"):
        Member.open("org/zoo-r-000@epoch-01")
    with pytest.raises(HubError, match="no revision 'epoch-009'"):
        fetch_repo("org/zoo-r-000", "epoch-009")
    api.create_repo("org/stranger")
    with pytest.raises(PopulationError, match=r"org/stranger: no zoo\.json"):
        Member.open("org/stranger")
    with pytest.raises(PopulationError, match="no such folder, and a repo of a Hub is written"):
        Member.open("runs/zoo-r/zoo-r-000")
    with pytest.raises(HubError, match="not a name a Hub accepts"):
        Member.open("org/zoo--r")


@pytest.mark.parametrize(("status", "advice"), [(401, "Set HF_TOKEN"), (403, "token with write access")])
def test_refusals_of_a_read_say_what_to_do(api, local_hub, status, advice):
    local_hub.fail_next(status, method="HEAD", times=10)
    with pytest.raises(HubError, match=f"answered {status} while reading org/x at {local_hub.url}.*{advice}"):
        fetch_manifest("org/x")


def test_private_members_need_a_token(tmp_path, hub_api, zoo, monkeypatch):
    with FolderHub(tmp_path / "hub", tokens={"a-token-of-alice": "alice,org", "a-token-of-bob": "bob"}) as hub:
        hub_api(hub)
        monkeypatch.setenv("HF_TOKEN", "a-token-of-alice")
        publish_population(zoo, PublishSpec(namespace="org"))
        assert len(Population.open("org/zoo-r")) == 3
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache of others"))
        for token in ("a-token-of-bob", ""):
            monkeypatch.setenv("HF_TOKEN", token)
            with pytest.raises(PopulationError, match="none that this token may see"):
                Population.open("org/zoo-r")
            with pytest.raises(HubError, match=r"answered 40[14] .*HF_TOKEN"):
                Member.open("org/zoo-r-000")


def test_a_hub_that_is_gone_is_said_and_the_cache_still_serves(report, local_hub, zoo):
    Member.open("org/zoo-r-000")
    local_hub.close()
    assert Member.open("org/zoo-r-000").manifest == Manifest.read(zoo / "zoo-r-000")
    with pytest.raises(HubError, match=r"No answer while fetching org/zoo-r-002 at http://127.*HF_ENDPOINT"):
        fetch_repo("org/zoo-r-002")


def test_offline_mode_is_said(api, local_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"offline mode is on .*Unset HF_HUB_OFFLINE"):
        fetch_manifest("org/zoo-r-000")
    with pytest.raises(HubError, match="offline mode is on"):
        list_members("org/zoo-r")
    assert local_hub.requests == []


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (httpx2.ConnectError("[Errno 111] Connection refused"), "No answer while reading org/x at .*refused"),
        (httpx2.ReadTimeout(""), "No answer while reading org/x at .*ReadTimeout"),
        (httpx2.RemoteProtocolError("Server disconnected."), "Server disconnected. Check the network"),
        (OfflineModeIsEnabled("x"), "offline mode"),
        (TimeoutError("timed out"), "timed out"),
        (RuntimeError("Error while uploading 'model.safetensors' to the Hub."), "Failed while .* uploading"),
        (ValueError("Invalid metadata in README.md.\n- license is wrong"), "Failed while .*license is wrong"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ],
)
def test_every_failure_of_the_client_becomes_one_kind(error, said):
    with pytest.raises(HubError, match=said) as caught, hub_errors("reading", "org/x"):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)


def test_the_cause_of_a_failed_upload_decides():
    with pytest.raises(HubError, match="No answer while pushing main of org/x .*reset by peer"):
        with hub_errors("pushing main of", "org/x"):
            raise RuntimeError("Error while uploading") from httpx2.ReadError("Connection reset by peer")


def test_other_mistakes_stay_what_they_are():
    with pytest.raises(KeyError), hub_errors("reading", "org/x"):
        raise KeyError("a bug")


def test_a_token_is_blotted_out(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-alice")
    assert hide_token("Bearer a-token-of-alice is invalid") == "Bearer *** is invalid"
    with pytest.raises(HubError) as caught, hub_errors("reading", "org/x"):
        raise ValueError("a-token-of-alice is invalid")
    assert "alice" not in str(caught.value)


def test_a_silent_hub_is_not_waited_for_without_end(api, monkeypatch):
    monkeypatch.setattr("hf_zoo.hub.client.SILENCE_SECONDS", 0.2)
    get_session().timeout = None
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(HubError, match="No answer while listing"), hub_errors("listing the models of", "org"):
            get_session().get(f"{constants.ENDPOINT}/api/models")
    get_session().timeout = None


@pytest.mark.parametrize("name", ["zoo-vit-042", "a", "A_b.c-d", "z" * 92, "0"])
def test_names_the_hub_accepts(name):
    assert check_repo_name("org", name) == f"org/{name}"


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", ".a", "a.", "a--b", "a..b", "a b", "a/b", "ä", "a.git", "a.ipynb", "a\n", "z" * 93, "a\\b"],
)
def test_names_the_hub_refuses(name):
    with pytest.raises(HubError, match="Hub accepts"):
        check_repo_name("org", name)
    with pytest.raises(HubError, match="Hub accepts"):
        check_repo_name(name, "model")


def test_what_was_pushed_since_is_seen(report, api, zoo, tmp_path):
    before = Member.open("org/zoo-r-000")
    shutil.copytree(zoo, tmp_path / "zoo-r")
    Manifest.read(tmp_path / "zoo-r/zoo-r-000").replace(description="Pushed again.").write(
        tmp_path / "zoo-r/zoo-r-000"
    )
    publish_population(tmp_path / "zoo-r", PublishSpec(namespace="org"))
    after = Member.open("org/zoo-r-000")
    assert after.manifest.description == "Pushed again."
    assert after.commit != before.commit
    assert fetch_manifest("org/zoo-r-000", before.commit)[0] == before.manifest
