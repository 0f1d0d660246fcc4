"""Publishing to a real Hub on this machine, and reading it back with and without hf_zoo."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_zoo import parent_of, state_of, write_bert, write_member, write_population

from hf_zoo.errors import HubError, PopulationError
from hf_zoo.hub.contents import folder_files, is_published
from hf_zoo.hub.local import FolderHub
from hf_zoo.hub.publish import publish_member, publish_population, snapshot_manifest
from hf_zoo.population import Manifest, Member, Population
from hf_zoo.publish import main
from hf_zoo.recipe.schema import PublishSpec

SECRET = "hf_" + "s3cretAbCdEfGhIjKlMnOpQrStUvWxYz01"
REVISIONS = ("epoch-000", "epoch-001", "epoch-002")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "bert"
    torch.manual_seed(0)
    write_bert(folder)
    return folder


@pytest.fixture
def zoo(tmp_path, base):
    """Return a population of two finished members in a folder."""
    folder = tmp_path / "runs" / "zoo-t"
    write_population(folder, base)
    return folder


@pytest.fixture
def api(local_hub, hub_api):
    return hub_api(local_hub)


def spec(**changes):
    return PublishSpec(**{"namespace": "org", "workers": 2, **changes})


def api_download(api, repo, revision=None):
    """Return a folder with a repo's files, fetched by the stock client."""
    return Path(api.snapshot_download(repo, revision=revision))


def changing(requests):
    """Return the requests that could change something on the Hub."""
    return [request for request in requests if request.method not in {"GET", "HEAD"}]


def test_a_population_becomes_repos_branches_and_a_collection(api, local_hub, zoo):
    report = publish_population(zoo, spec())

    assert report.repos == ("org/zoo-t-000", "org/zoo-t-001")
    assert len(report.commits) == 2 * (1 + len(REVISIONS)) == len(set(report.commits))
    for repo in report.repos:
        refs = {branch.name: branch.target_commit for branch in api.list_repo_refs(repo).branches}
        assert set(refs) == {"main", *REVISIONS}
        assert refs["main"] in report.commits
        # One commit a revision, after the one every repo is born with.
        for revision in refs:
            assert len(api.list_repo_commits(repo, revision=revision)) == 2
        info = api.model_info(repo)
        assert info.private
        assert {"hf_zoo", "model-zoo", "population:zoo-t", "task:sst"} <= set(info.tags)
        assert info.pipeline_tag == "text-classification"
    collection = api.get_collection(report.collection_slug)
    assert (collection.title, collection.private, collection.owner) == ("zoo-t", True, "org")
    assert [item.item_id for item in collection.items] == list(report.repos)
    assert collection.items[1].note == "seed = 1, training.learning_rate = 0.001"
    assert collection.description.startswith("2 models made with hf_zoo for text classification")
    assert report.url == collection.url


def test_a_repo_is_its_folder_byte_for_byte(api, zoo):
    publish_population(zoo, spec())
    for name in ("zoo-t-000", "zoo-t-001"):
        local = {path: content for path, content in state_of(zoo / name).items() if is_published(path)}
        remote = state_of(api_download(api, f"org/{name}"))
        del remote[".gitattributes"]
        assert remote == local
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "zoo.json"} <= set(remote)
        assert {"results.jsonl", "learning_curve.png"} <= set(remote)
        assert f"org/{name}".encode() in remote["README.md"]


def test_a_snapshot_is_a_whole_repo_of_its_moment(api, zoo):
    before = Manifest.read(zoo / "zoo-t-000")
    publish_population(zoo, spec())
    files = state_of(api_download(api, "org/zoo-t-000", revision="epoch-001"))
    assert files["model.safetensors"] == (zoo / "zoo-t-000/snapshots/epoch-001/model.safetensors").read_bytes()
    assert files["tokenizer.json"] == (zoo / "zoo-t-000/tokenizer.json").read_bytes()
    then = Manifest.from_dict(json.loads(files["zoo.json"]), "snapshot")
    assert then.sha256 == before.snapshots[1].sha256
    assert [record["epoch"] for record in then.results] == [0, 1]
    assert then.metrics == before.snapshots[1].metrics
    assert then.snapshots == ()
    assert b'revision="epoch-001"' in files["README.md"]
    assert "results.jsonl" not in files


def test_a_second_run_sends_nothing(api, local_hub, zoo):
    first = publish_population(zoo, spec())
    on_disk, collection = state_of(zoo), api.get_collection(first.collection_slug)
    local_hub.requests.clear()

    second = publish_population(zoo, spec())

    assert changing(local_hub.requests) == []
    assert second.commits == ()
    assert second.uploaded_files == 0
    assert second.skipped_files == first.uploaded_files > 0
    assert second.collection_slug == first.collection_slug
    assert state_of(zoo) == on_disk
    assert api.get_collection(first.collection_slug).last_updated == collection.last_updated


def test_only_what_changed_is_sent(api, local_hub, zoo):
    publish_population(zoo, spec())
    (zoo / "zoo-t-001" / "notes.md").write_text("Seen to converge.\n")
    local_hub.requests.clear()
    report = publish_population(zoo, spec())
    assert [(done.repo, done.revision, done.uploaded) for done in report.revisions if done.uploaded] == [
        ("org/zoo-t-001", "main", 1)
    ]
    assert len([request for request in local_hub.requests if "/commit/" in request.path]) == 1
    assert not [request for request in local_hub.requests if request.method == "PUT"]


def test_weights_that_are_gone_here_go_there_too(api, zoo):
    member = zoo / "zoo-t-000"
    publish_population(zoo, spec())
    api.upload_file(path_or_fileobj=b"mine", path_in_repo="mine.txt", repo_id="org/zoo-t-000")
    (member / "model.safetensors").rename(member / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(load_file(member / "model-00001-of-00001.safetensors"), "model-00001-of-00001.safetensors")
    (member / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    publish_population(zoo, spec())
    files = set(api.list_repo_files("org/zoo-t-000"))
    assert "model.safetensors" not in files
    assert {"model-00001-of-00001.safetensors", "model.safetensors.index.json", "mine.txt"} <= files


def test_what_only_training_needs_stays_here(api, zoo):
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


def test_a_token_in_a_file_stops_everything(api, local_hub, zoo, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    (zoo / "zoo-t-000" / "notes.txt").write_text("export HF_TOKEN=a-token-of-another-form")
    with pytest.raises(HubError, match=r"notes\.txt: holds a token") as caught:
        publish_member(zoo / "zoo-t-000", "org", spec())
    assert "a-token-of" not in str(caught.value)
    assert changing(local_hub.requests) == []


def test_somebody_elses_token_is_a_token_too(api, local_hub, zoo):
    config = json.loads((zoo / "zoo-t-000" / "config.json").read_text())
    (zoo / "zoo-t-000" / "config.json").write_text(json.dumps(config | {"hub_token": SECRET}))
    with pytest.raises(HubError, match="holds a token") as caught:
        publish_member(zoo / "zoo-t-000", "org", spec())
    assert SECRET not in str(caught.value)
    assert changing(local_hub.requests) == []


def test_a_token_across_two_pieces_of_a_file_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_zoo.hub.contents.CHUNK_BYTES", 64)
    (tmp_path / "long.txt").write_text("x" * 50 + SECRET + "y" * 50)
    with pytest.raises(HubError, match="holds a token"):
        folder_files(tmp_path)


def test_the_token_used_is_in_no_file_and_no_message(tmp_path, hub_api, base, monkeypatch):
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


def test_a_link_out_of_the_folder_is_refused(api, local_hub, zoo, tmp_path):
    (tmp_path / "private.txt").write_text("secret")
    (zoo / "zoo-t-000" / "vocab.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(HubError, match="link out of its folder"):
        publish_member(zoo / "zoo-t-000", "org", spec())
    assert changing(local_hub.requests) == []


def test_changed_weights_are_refused(api, local_hub, zoo):
    weights = zoo / "zoo-t-000" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(HubError, match="truncated or changed"):
        publish_member(zoo / "zoo-t-000", "org", spec())
    shutil.rmtree(zoo / "zoo-t-001" / "snapshots" / "epoch-001")
    with pytest.raises(HubError, match=r"epoch-001: no such folder"):
        publish_member(zoo / "zoo-t-001", "org", spec())
    assert changing(local_hub.requests) == []


@pytest.mark.parametrize("name", ["zoo--t", "zoo t", ".zoo", "zoo..t", "z" * 95, "zoo.git", "zoo/t"])
def test_a_name_the_hub_would_refuse_is_refused_before_anything_is_sent(api, local_hub, zoo, name):
    manifest = Manifest.read(zoo / "zoo-t-000")
    manifest.replace(name=name).write(zoo / "zoo-t-000")
    with pytest.raises(HubError, match=r"Hub accepts|not a name"):
        publish_member(zoo / "zoo-t-000", "org", spec())
    with pytest.raises(HubError, match=r"Hub accepts|not a name"):
        publish_population(zoo, spec())
    assert local_hub.requests == []


def test_no_namespace_and_unfinished_members(api, local_hub, zoo):
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
def test_what_the_hub_refuses_is_said_and_a_second_run_goes_on(api, local_hub, zoo, status, method, path, said):
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


def test_a_connection_lost_while_uploading_leaves_nothing_half_visible(api, local_hub, zoo):
    local_hub.fail_next(method="PUT", cut_after=100)  # tried again by the client itself
    local_hub.fail_next(method="POST", path="/commit/main", cut_after=10)
    with pytest.raises(HubError, match="No answer while pushing main of org/zoo-t-000"):
        publish_member(zoo / "zoo-t-000", "org", spec())
    assert api.list_repo_files("org/zoo-t-000") == [".gitattributes"]
    report = publish_member(zoo / "zoo-t-000", "org", spec())
    assert [done.revision for done in report.revisions if done.uploaded] == ["main"]


def test_a_hub_that_is_gone_is_said(tmp_path, hub_api, zoo):
    with FolderHub(tmp_path / "gone") as hub:
        hub_api(hub)
    with pytest.raises(HubError, match=r"No answer while looking up .* at http://127.*HF_ENDPOINT"):
        publish_member(zoo / "zoo-t-000", "org", spec())


def test_a_killed_run_is_continued(api, local_hub, hub_environment, tmp_path, base):
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
        assert (
            state_of(api_download(api, repo))["model.safetensors"]
            == (folder / name / "model.safetensors").read_bytes()
        )
        for branch in api.list_repo_refs(repo).branches:
            assert len(api.list_repo_commits(repo, revision=branch.name)) == 2
    assert len(api.get_collection(report.collection_slug).items) == 12


def test_foreign_namespaces_and_missing_tokens_are_said(tmp_path, hub_api, zoo, monkeypatch):
    with FolderHub(tmp_path / "hub", tokens={SECRET: "alice"}) as hub:
        hub_api(hub, SECRET)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        with pytest.raises(HubError, match=r"answered 401 .*Set HF_TOKEN"):
            publish_member(zoo / "zoo-t-000", "alice", spec())
        monkeypatch.setenv("HF_TOKEN", SECRET)
        with pytest.raises(HubError, match=r"answered 403 .*org/zoo-t-000.*namespace it can write to"):
            publish_member(zoo / "zoo-t-000", "org", spec())
        assert publish_member(zoo / "zoo-t-000", "alice", spec()).repos == ("alice/zoo-t-000",)


def test_one_failure_does_not_stop_the_others(api, local_hub, zoo):
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


def test_failures_with_the_same_words_are_said_once(api, local_hub, tmp_path, base):
    write_population(tmp_path / "zoo-m", base, num_members=8, num_epochs=0)
    local_hub.fail_next(403, method="POST", path="/api/repos/create", times=8)
    with pytest.raises(HubError) as caught:
        publish_population(tmp_path / "zoo-m", spec())
    assert str(caught.value).count("answered 403") == 1
    assert "zoo-m-004 and 3 more" in str(caught.value) or " and 3 more" in str(caught.value)


def test_twenty_members_at_once(api, local_hub, tmp_path, base):
    folder = tmp_path / "zoo-many"
    write_population(folder, base, num_members=20, num_epochs=0)
    seen = set()

    def progress(name, done, total):
        seen.add(name)
        assert done == len(seen)
        assert total == 20

    report = publish_population(folder, spec(workers=8), progress)
    assert len(report.repos) == len(seen) == 20
    assert len(report.commits) == 40
    for index, repo in enumerate(report.repos):
        expected = (folder / f"zoo-many-{index:03d}" / "model.safetensors").read_bytes()
        assert state_of(api_download(api, repo))["model.safetensors"] == expected
    assert len(api.get_collection(report.collection_slug).items) == 20


def test_parents_become_repos_at_a_commit(api, tmp_path, base):
    [parent] = write_population(tmp_path / "zoo-p", base, num_members=1)
    children = tmp_path / "zoo-c"
    write_member(children / "zoo-c-000", base, "zoo-c", parents=[parent_of(parent)])
    write_member(children / "zoo-c-001", base, "zoo-c", parents=[parent_of(parent, "epoch-001")])
    strange = parent_of(parent.replace(sha256="f" * 64, snapshots=()))
    write_member(children / "zoo-c-002", base, "zoo-c", parents=[strange])

    publish_member(children / "zoo-c-000", "org", spec())
    unpublished = Manifest.read(children / "zoo-c-000")
    assert unpublished.parents == (parent_of(parent),)

    published = publish_population(tmp_path / "zoo-p", spec())
    commits = {done.revision: done.commit for done in published.revisions}
    for name in ("zoo-c-000", "zoo-c-001", "zoo-c-002"):
        publish_member(children / name, "org", spec())
    for name, revision in (("zoo-c-000", "main"), ("zoo-c-001", "epoch-001")):
        member = Member.open(f"org/{name}")
        [entry] = member.manifest.parents
        assert (entry.repo, entry.revision) == ("org/zoo-p-000", commits[revision])
        assert member.manifest == Manifest.read(children / name)
        assert "base_model:finetune:org/zoo-p-000" in api.model_info(f"org/{name}").tags
    # Other weights under the same name are another model.
    assert Member.open("org/zoo-c-002").manifest.parents == (strange,)


def test_parents_within_a_population_go_first(api, tmp_path, base):
    folder = tmp_path / "zoo-f"
    manifests = write_population(folder, base, num_members=3, num_epochs=0)
    manifests[0].replace(parents=(parent_of(manifests[2]),)).write(folder / "zoo-f-000")
    manifests[2].replace(parents=(parent_of(manifests[1]),)).write(folder / "zoo-f-002")
    report = publish_population(folder, spec(workers=4))
    commits = {done.repo: done.commit for done in report.revisions if done.revision == "main"}
    assert [(p.repo, p.revision) for p in Member.open("org/zoo-f-000").manifest.parents] == [
        ("org/zoo-f-002", commits["org/zoo-f-002"])
    ]
    assert [(p.repo, p.revision) for p in Member.open("org/zoo-f-002").manifest.parents] == [
        ("org/zoo-f-001", commits["org/zoo-f-001"])
    ]


def test_an_adapter_names_its_base_as_the_hub_knows_it(api, local_hub, tmp_path, base):
    [parent] = write_population(tmp_path / "zoo-p", base, num_members=1, num_epochs=0)
    folder = tmp_path / "zoo-a-000"
    write_member(folder, base, "zoo-a", num_epochs=0, parents=[parent_of(parent)], library="peft")
    for place in (folder, folder / "snapshots/epoch-000"):
        (place / "model.safetensors").rename(place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "zoo-p")}))
    with pytest.raises(HubError, match="its adapter needs zoo-p-000, which is not on the Hub"):
        publish_member(folder, "org", spec())
    assert changing(local_hub.requests) == []
    published = publish_population(tmp_path / "zoo-p", spec())
    publish_member(folder, "org", spec())
    for revision in ("main", "epoch-000"):
        config = json.loads(state_of(api_download(api, "org/zoo-a-000", revision=revision))["adapter_config.json"])
        assert config == {"base_model_name_or_path": "org/zoo-p-000", "revision": published.revisions[-1].commit}
    local_hub.requests.clear()
    publish_member(folder, "org", spec())
    assert changing(local_hub.requests) == []


def test_a_merge_is_published_with_a_sub_folder_a_task(api, local_hub, tmp_path, base):
    members = write_population(tmp_path / "zoo-t", base)
    publish_population(tmp_path / "zoo-t", spec())
    folder = tmp_path / "merge-sst"
    write_member(
        folder, base, "zoo-t", num_epochs=0, kind="merge", tasks=("sst",), task=None, objective=None, snapshots=(),
        parents=[parent_of(member).__class__(**{**vars(parent_of(member)), "role": "member"}) for member in members],
        method={"name": "average", "parameters": {}}, auto_class="AutoModel", results=(), factors={},
    )  # fmt: skip
    shutil.rmtree(folder / "snapshots")
    (folder / "sst").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, folder / "sst" / name)
    report = publish_member(folder, None, spec())
    assert [done.revision for done in report.revisions] == ["main"]
    assert "sst/model.safetensors" in api.list_repo_files("org/merge-sst")
    tags = set(api.model_info("org/merge-sst").tags)
    assert {"merge", "average", "base_model:merge:org/zoo-t-000", "base_model:merge:org/zoo-t-001"} <= tags
    notes = {item.item_id: item.note for item in api.get_collection(report.collection_slug).items}
    assert notes["org/merge-sst"] == "average of zoo-t-000, zoo-t-001"
    # The merge belongs to the population's page, not to its members.
    assert [member.name for member in Population.open("org/zoo-t")] == ["zoo-t-000", "zoo-t-001"]


def test_public_and_without_snapshots(api, zoo):
    report = publish_population(
        zoo, spec(private=False, snapshots=False, license="mit", language=("en",), collection="A b")
    )
    info = api.model_info("org/zoo-t-000")
    assert not info.private
    assert [branch.name for branch in api.list_repo_refs("org/zoo-t-000").branches] == ["main"]
    assert {"license:mit", "en"} <= set(info.tags)
    collection = api.get_collection(report.collection_slug)
    assert (collection.title, collection.private) == ("A b", False)
    assert b"revisions of this repo" not in state_of(api_download(api, "org/zoo-t-000"))["README.md"]


def test_populations_and_members_open_from_the_hub(api, zoo):
    publish_population(zoo, spec())
    population = Population.open("org/zoo-t")
    assert [member.repo for member in population] == ["org/zoo-t-000", "org/zoo-t-001"]
    assert population.where(seed=1).members[0].metrics == Manifest.read(zoo / "zoo-t-001").metrics
    member = Member.open("org/zoo-t-001")
    for revision in (None, "epoch-001"):
        place = zoo / "zoo-t-001" / (f"snapshots/{revision}" if revision else "")
        expected = load_file(place / "model.safetensors")
        model = member.load(revision)
        assert type(model).__name__ == "BertForSequenceClassification"
        torch.testing.assert_close(
            dict(model.state_dict())["classifier.weight"], expected["classifier.weight"], rtol=0, atol=0
        )
    assert Member.open("org/zoo-t-001@epoch-001").manifest == snapshot_manifest(
        Manifest.read(zoo / "zoo-t-001"), Manifest.read(zoo / "zoo-t-001").snapshots[1]
    )


def test_stock_auto_classes_load_a_revision_in_a_process_without_hf_zoo(api, local_hub, run_with_hub, zoo):
    publish_population(zoo, spec())
    card = (zoo / "zoo-t-001" / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    said = run_with_hub(
        local_hub,
        f"{snippet}\n"
        "import sys, torch\n"
        "from transformers import AutoModel, AutoTokenizer\n"
        'last, early = AutoModel.from_pretrained(repo), AutoModel.from_pretrained(repo, revision="epoch-001")\n'
        'AutoTokenizer.from_pretrained(repo, revision="epoch-001")\n'
        "assert not [name for name in sys.modules if name.startswith('hf_zoo')]\n"
        'print(early.state_dict()["embeddings.word_embeddings.weight"].numpy().tobytes().hex())\n',
    ).split()  # fmt: skip
    weights = load_file(zoo / "zoo-t-001/snapshots/epoch-001/model.safetensors")
    assert said[0] in {"negative", "positive"}
    assert said[1] == weights["bert.embeddings.word_embeddings.weight"].numpy().tobytes().hex()


def test_the_verb(api, local_hub, zoo, capsys):
    assert main([str(zoo), "namespace=org", "private=false", "workers=2"]) == 0
    said = capsys.readouterr().out
    assert "org/zoo-t-000" in said
    assert f"{local_hub.url}/collections/org/zoo-t-" in said
    assert not api.model_info("org/zoo-t-000").private
    assert main([str(zoo / "zoo-t-000"), "publish.namespace=org"]) == 0
    assert "0 commits, 0 files sent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ZOO", "namespace=org", "privat=false"], "private"),
        (["ZOO", "namespace=org", "workers=many"], "workers"),
        (["ZOO"], "nobody to publish for"),
        (["namespace=org"], "expected one folder"),
        (["ZOO", "--force", "namespace=org"], "--force: unknown flag"),
        (["ZOO/zoo-t-000/snapshots", "namespace=org"], "neither a population"),
    ],
)
def test_mistakes_on_the_command_line_are_one_message(api, local_hub, zoo, capsys, arguments, said):
    assert main([argument.replace("ZOO", str(zoo)) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert local_hub.requests == []


def test_a_folder_without_manifest_is_said(api, tmp_path):
    with pytest.raises(PopulationError, match=r"no zoo\.json"):
        publish_member(tmp_path, "org", spec())
