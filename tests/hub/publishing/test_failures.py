"""A Hub that refuses, breaks off or is gone: said clearly, nothing half visible, continued by a second run."""

import shutil
import subprocess
import sys
import time

import pytest
from tiny_zoo import state_of, write_population

from hf_zoo.errors import HubError, PopulationError
from hf_zoo.hub.local import FolderHub
from hf_zoo.hub.publish import publish_member, publish_population
from hf_zoo.population import Manifest

SECRET = "hf_" + "s3cretAbCdEfGhIjKlMnOpQrStUvWxYz01"
REVISIONS = ("epoch-000", "epoch-001", "epoch-002")


@pytest.mark.parametrize("name", ["zoo--t", "zoo t", ".zoo", "zoo..t", "z" * 95, "zoo.git", "zoo/t"])
def test_a_name_the_hub_would_refuse_is_refused_before_anything_is_sent(api, local_hub, zoo, name, spec):
    manifest = Manifest.read(zoo / "zoo-t-000")
    manifest.replace(name=name).write(zoo / "zoo-t-000")
    with pytest.raises(HubError, match=r"Hub accepts|not a name"):
        publish_member(zoo / "zoo-t-000", "org", spec())
    with pytest.raises(HubError, match=r"Hub accepts|not a name"):
        publish_population(zoo, spec())
    assert local_hub.requests == []


def test_no_namespace_and_unfinished_members(api, local_hub, zoo, spec):
    with pytest.raises(HubError, match="nobody to publish for"):
        publish_population(zoo, spec(namespace=None))
    Manifest.read(zoo / "zoo-t-001").replace(status="training").write(zoo / "zoo-t-001")
    with pytest.raises(HubError, match="only finished models"):
        publish_member(zoo / "zoo-t-001", "org", spec())
    assert local_hub.requests == []
    report = publish_population(zoo, spec())
    assert report.repos == ("org/zoo-t-000",)
    assert report.waiting == ("zoo-t-001",)
    shutil.rmtree(zoo / "zoo-t-000")
    with pytest.raises(HubError, match="none of its 2 members has finished"):
        publish_population(zoo, spec())


@pytest.mark.parametrize(
    ("status", "method", "path", "said"),
    [
        (401, "POST", "/api/repos/create", "answered 401 while creating org/zoo-t-000 .*HF_TOKEN"),
        (403, "POST", "/api/repos/create", "answered 403 while creating .*namespace it can write to"),
        (409, "POST", "/commit/main", "answered 409 while pushing main of .*run the same command again"),
        (412, "POST", "/commit/main", "answered 412 while pushing main of .*changed in the meantime"),
        (429, "POST", "/commit/epoch-001", "answered 429 while pushing epoch-001 of .*wait"),
        (500, "POST", "/commit/main", "answered 500 while pushing main of .*has trouble"),
        (500, "GET", "/refs", "answered 500 while looking up org/zoo-t-000"),
    ],
)
def test_what_the_hub_refuses_is_said_and_a_second_run_goes_on(api, local_hub, zoo, status, method, path, said, spec):
    member = zoo / "zoo-t-000"
    local_hub.fail_next(status, method=method, path=path)
    with pytest.raises(HubError, match=said) as caught:
        publish_member(member, "org", spec())
    assert local_hub.url in str(caught.value)
    if api.repo_exists("org/zoo-t-000"):
        # Nothing half visible: `main` holds what a new repo holds, a branch all of its files or none.
        assert api.list_repo_files("org/zoo-t-000") == [".gitattributes"]
        for branch in api.list_repo_refs("org/zoo-t-000").branches:
            assert len(api.list_repo_files("org/zoo-t-000", revision=branch.name)) in {1, 7}
    done = len([r for r in local_hub.requests if "/commit/" in r.path and r.status == 200])
    report = publish_member(member, "org", spec())
    assert len(report.commits) == 1 + len(REVISIONS) - done
    assert "README.md" in api.list_repo_files("org/zoo-t-000")


def test_a_connection_lost_while_uploading_leaves_nothing_half_visible(api, local_hub, zoo, spec):
    local_hub.fail_next(method="PUT", cut_after=100)  # tried again by the client itself
    local_hub.fail_next(method="POST", path="/commit/main", cut_after=10)
    with pytest.raises(HubError, match="No answer while pushing main of org/zoo-t-000"):
        publish_member(zoo / "zoo-t-000", "org", spec())
    assert api.list_repo_files("org/zoo-t-000") == [".gitattributes"]
    report = publish_member(zoo / "zoo-t-000", "org", spec())
    assert [done.revision for done in report.revisions if done.uploaded] == ["main"]


def test_a_hub_that_is_gone_is_said(tmp_path, hub_api, zoo, spec):
    with FolderHub(tmp_path / "gone") as hub:
        hub_api(hub)
    with pytest.raises(HubError, match=r"No answer while looking up .* at http://127.*HF_ENDPOINT"):
        publish_member(zoo / "zoo-t-000", "org", spec())


def test_a_killed_run_is_continued(api, local_hub, hub_environment, tmp_path, base, spec, download):
    folder = tmp_path / "zoo-k"
    write_population(folder, base, num_members=12, num_epochs=1)
    command = [sys.executable, "-m", "hf_zoo.publish", str(folder), "namespace=org", "workers=2"]
    running = subprocess.Popen(command, env=hub_environment(local_hub), stderr=subprocess.DEVNULL)
    try:
        while sum("/commit/" in request.path for request in list(local_hub.requests)) < 7:
            assert running.poll() is None
            time.sleep(0.01)
    finally:
        running.kill()
        running.wait()
    before = {model.id for model in api.list_models(author="org", filter="population:zoo-k")}
    assert 0 < len(before) < 12
    for repo in before:  # what is listed as a member is a whole member
        assert len(api.list_repo_refs(repo).branches) == 3
        assert len(api.list_repo_files(repo)) == 9

    report = publish_population(folder, spec())

    assert len(report.repos) == 12
    assert len(report.commits) < 36 - 3 * len(before) + 1
    for name, repo in zip([f"zoo-k-{index:03d}" for index in range(12)], report.repos, strict=True):
        assert state_of(download(repo))["model.safetensors"] == (folder / name / "model.safetensors").read_bytes()
        for branch in api.list_repo_refs(repo).branches:
            assert len(api.list_repo_commits(repo, revision=branch.name)) == 2
    assert len(api.get_collection(report.collection_slug).items) == 12


def test_foreign_namespaces_and_missing_tokens_are_said(tmp_path, hub_api, zoo, monkeypatch, spec):
    with FolderHub(tmp_path / "hub", tokens={SECRET: "alice"}) as hub:
        hub_api(hub, SECRET)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        with pytest.raises(HubError, match=r"answered 401 .*Set HF_TOKEN"):
            publish_member(zoo / "zoo-t-000", "alice", spec())
        monkeypatch.setenv("HF_TOKEN", SECRET)
        with pytest.raises(HubError, match=r"answered 403 .*org/zoo-t-000.*namespace it can write to"):
            publish_member(zoo / "zoo-t-000", "org", spec())
        assert publish_member(zoo / "zoo-t-000", "alice", spec()).repos == ("alice/zoo-t-000",)


def test_one_failure_does_not_stop_the_others(api, local_hub, zoo, spec):
    local_hub.fail_next(500, method="POST", path="zoo-t-000/commit/epoch-001")
    with pytest.raises(HubError) as caught:
        publish_population(zoo, spec())
    assert "1 not published, 1 of 2 members are" in str(caught.value)
    assert "zoo-t-000: The Hub answered 500" in str(caught.value)
    assert "README.md" in api.list_repo_files("org/zoo-t-001")
    report = publish_population(zoo, spec())
    assert [(done.repo, done.revision) for done in report.revisions if done.uploaded] == [
        ("org/zoo-t-000", revision) for revision in ("epoch-001", "epoch-002", "main")
    ]
    assert [item.item_id for item in api.get_collection(report.collection_slug).items] == [
        "org/zoo-t-001",
        "org/zoo-t-000",
    ]


def test_failures_with_the_same_words_are_said_once(api, local_hub, tmp_path, base, spec):
    write_population(tmp_path / "zoo-m", base, num_members=8, num_epochs=0)
    local_hub.fail_next(403, method="POST", path="/api/repos/create", times=8)
    with pytest.raises(HubError) as caught:
        publish_population(tmp_path / "zoo-m", spec())
    assert str(caught.value).count("answered 403") == 1
    assert "zoo-m-004 and 3 more" in str(caught.value) or " and 3 more" in str(caught.value)


def test_a_folder_without_manifest_is_said(api, tmp_path, spec):
    with pytest.raises(PopulationError, match=r"no zoo\.json"):
        publish_member(tmp_path, "org", spec())
