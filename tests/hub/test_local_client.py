"""What an unmodified huggingface_hub sees of the local Hub."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_zoo.hub.local import FolderHub
from hf_zoo.hub.local.store import Store, regular_file

LARGE = 11 << 20  # above the 10 MiB from which files go through LFS whatever their name


@pytest.fixture
def api(local_hub, hub_api):
    return hub_api(local_hub)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "big.txt").write_bytes(b"0123456789abcde\n" * (LARGE // 16))
    (folder / "sub" / "notes.txt").write_text("notes")
    return folder


def paths_sent(hub, method):
    return [request.path for request in hub.requests if request.method == method]


def test_a_folder_comes_back_byte_for_byte(local_hub, api, folder):
    api.create_repo("org/model")
    commit = api.upload_folder(repo_id="org/model", folder_path=folder, commit_message="first")
    got = snapshot_download("org/model", endpoint=local_hub.url)
    assert got.endswith(commit.oid)
    sent = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path, content in sent.items():
        with open(f"{got}/{path}", "rb") as file:
            assert file.read() == content
    listed = {entry.path: entry for entry in api.list_repo_tree("org/model", recursive=True)}
    assert listed["weights.bin"].lfs is not None  # by .gitattributes
    assert listed["big.txt"].lfs.size == (folder / "big.txt").stat().st_size  # by size
    assert listed["sub/notes.txt"].lfs is None
    assert api.verify_repo_checksums("org/model", local_dir=folder).mismatches == []


def test_a_second_push_uploads_nothing(local_hub, api, folder):
    api.create_repo("org/model")
    first = api.upload_folder(repo_id="org/model", folder_path=folder)
    local_hub.requests.clear()
    second = api.upload_folder(repo_id="org/model", folder_path=folder)
    assert second.oid == first.oid
    assert paths_sent(local_hub, "PUT") == []
    assert not [path for path in paths_sent(local_hub, "POST") if "/commit/" in path]


def test_only_what_changed_is_uploaded(local_hub, api, folder):
    api.create_repo("org/model")
    api.upload_folder(repo_id="org/model", folder_path=folder)
    local_hub.requests.clear()
    (folder / "weights.bin").write_bytes(b"other")
    commit = api.upload_folder(repo_id="org/model", folder_path=folder)
    assert len(paths_sent(local_hub, "PUT")) == 1
    expanded = {entry.path: entry for entry in api.list_repo_tree("org/model", expand=True)}
    assert expanded["weights.bin"].last_commit.oid == commit.oid
    assert expanded["config.json"].last_commit.oid != commit.oid


def test_branches_tags_and_short_ids_lead_to_their_commits(local_hub, api):
    api.create_repo("org/model")
    initial = api.list_repo_commits("org/model")[-1]
    assert initial.title == "initial commit"
    commits = {}
    for branch in ("epoch-001", "step/10"):
        api.create_branch("org/model", branch=branch, revision=initial.commit_id)
        commits[branch] = api.upload_file(
            path_or_fileobj=branch.encode(), path_in_repo="which", repo_id="org/model", revision=branch
        ).oid
    api.create_tag("org/model", tag="v1", revision="epoch-001", tag_message="the first")
    for revision, expected in [
        ("epoch-001", "epoch-001"),
        ("step/10", "step/10"),
        ("refs/heads/step/10", "step/10"),
        ("v1", "epoch-001"),
        ("refs/tags/v1", "epoch-001"),
        (commits["step/10"][:10], "step/10"),
    ]:
        path = api.hf_hub_download("org/model", "which", revision=revision)
        with open(path) as file:
            assert file.read() == expected
        assert api.model_info("org/model", revision=revision).sha == commits[expected]
    refs = api.list_repo_refs("org/model", include_pull_requests=True)
    assert {branch.name: branch.target_commit for branch in refs.branches} == {
        "main": initial.commit_id,
        **commits,
    }
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", commits["epoch-001"])]
    api.delete_tag("org/model", tag="v1")
    api.delete_branch("org/model", branch="step/10")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/model", revision="v1")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("org/model", "which", revision="step/10")
    assert api.model_info("org/model", revision=commits["step/10"]).sha == commits["step/10"]


def test_history_is_listed_newest_first_and_can_be_squashed(api):
    api.create_repo("org/model")
    for number in range(3):
        api.upload_file(
            path_or_fileobj=b"%d" % number,
            path_in_repo="n",
            repo_id="org/model",
            commit_message=f"commit {number}",
            commit_description="why",
        )
    commits = api.list_repo_commits("org/model")
    assert [commit.title for commit in commits] == ["commit 2", "commit 1", "commit 0", "initial commit"]
    assert commits[0].message == "why"
    assert commits[0].authors == ["local"]
    assert abs((datetime.now(timezone.utc) - commits[0].created_at).total_seconds()) < 60
    api.super_squash_history("org/model", commit_message="one")
    assert [commit.title for commit in api.list_repo_commits("org/model")] == ["one"]
    assert sorted(api.list_repo_files("org/model")) == [".gitattributes", "n"]


def test_commits_add_copy_and_delete(api):
    api.create_repo("org/model")
    api.create_commit(
        "org/model",
        [CommitOperationAdd(path, content) for path, content in [("a/1", b"1"), ("a/2", b"2"), ("b.bin", b"bbb")]],
        commit_message="add",
    )
    api.create_commit(
        "org/model",
        [
            CommitOperationCopy("b.bin", "c/copy.bin"),
            CommitOperationCopy("a/1", "c/1"),
            CommitOperationDelete("a/", is_folder=True),
            CommitOperationDelete("b.bin"),
        ],
        commit_message="turn round",
    )
    assert sorted(api.list_repo_files("org/model")) == [".gitattributes", "c/1", "c/copy.bin"]
    with open(api.hf_hub_download("org/model", "c/copy.bin"), "rb") as file:
        assert file.read() == b"bbb"
    with pytest.raises(BadRequestError, match="no such file"):
        api.delete_file("a/1", "org/model")
    with pytest.raises(BadRequestError, match="both a file and a folder"):
        api.upload_file(path_or_fileobj=b"", path_in_repo="c", repo_id="org/model")


@pytest.fixture
def careless_disk(monkeypatch):
    """Do not wait for the disk: these tests need many files, not durable ones."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_trees_are_paged(api, careless_disk):
    api.create_repo("org/many", repo_type="dataset")
    operations = [CommitOperationAdd(f"f/{number:05d}.txt", b"%d" % number) for number in range(1203)]
    api.create_commit("org/many", operations, commit_message="many", repo_type="dataset")
    listed = [entry.path for entry in api.list_repo_tree("org/many", "f", repo_type="dataset")]
    assert listed == [f"f/{number:05d}.txt" for number in range(1203)]
    info = api.get_paths_info("org/many", ["f/00007.txt", "f", "missing"], repo_type="dataset", expand=True)
    assert [(entry.path, type(entry).__name__) for entry in info] == [("f/00007.txt", "RepoFile"), ("f", "RepoFolder")]
    assert info[1].last_commit.title == "many"


def test_repos_are_created_moved_hidden_and_deleted(api):
    url = api.create_repo("Org/Model")
    assert (url.repo_id, url.repo_type) == ("Org/Model", "model")
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("org/model")  # ids differ by more than case
    assert caught.value.response.status_code == 409
    assert api.create_repo("Org/Model", exist_ok=True).repo_id == "Org/Model"
    api.create_repo("Org/Model", repo_type="dataset")
    assert api.create_repo("unowned").repo_id == "local/unowned"
    sha = api.model_info("Org/Model").sha
    api.move_repo("Org/Model", "other/name")
    assert api.model_info("other/name").sha == sha
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("Org/Model")
    api.update_repo_settings("other/name", private=True)
    assert api.model_info("other/name").private is True
    api.delete_repo("other/name")
    api.delete_repo("other/name", missing_ok=True)
    with pytest.raises(RepositoryNotFoundError):
        api.delete_repo("other/name")
    assert api.repo_exists("Org/Model", repo_type="dataset")
    assert not api.repo_exists("gpt2")


def test_missing_things_raise_the_clients_own_errors(local_hub, api):
    api.create_repo("org/model")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/model", revision="none")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("org/model", "none.txt")
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/model", "none"))
    with pytest.raises(HfHubHTTPError) as caught:
        api.delete_branch("org/model", branch="main")
    assert caught.value.response.status_code == 403
    with pytest.raises(RevisionNotFoundError):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/model", revision="none")


def test_a_commit_on_a_stale_parent_is_refused(api):
    api.create_repo("org/model")
    parent = api.model_info("org/model").sha
    first = api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id="org/model", parent_commit=parent)
    with pytest.raises(HfHubHTTPError) as caught:
        api.upload_file(path_or_fileobj=b"2", path_in_repo="x", repo_id="org/model", parent_commit=parent)
    assert caught.value.response.status_code == 412
    assert api.model_info("org/model").sha == first.oid


def test_models_are_listed_by_what_their_cards_say(api):
    cards = {
        "zoo/a": "pipeline_tag: fill-mask\ntags: [model-zoo]\ndatasets: [imdb]",
        "zoo/b": "pipeline_tag: text-classification\nbase_model: zoo/a\nlicense: mit",
        "zoo/merge": "base_model: [zoo/a, zoo/b]\nbase_model_relation: merge\ntags: [model-zoo, merge]",
        "other/a": "tags: [model-zoo]",
    }
    for repo_id, card in cards.items():
        api.create_repo(repo_id)
        api.upload_file(path_or_fileobj=f"---\n{card}\n---\n# x\n".encode(), path_in_repo="README.md", repo_id=repo_id)

    def ids(**filters):
        return [model.id for model in api.list_models(**filters)]

    assert ids() == ["other/a", "zoo/merge", "zoo/b", "zoo/a"]  # the latest first
    assert ids(author="zoo", search="E") == ["zoo/merge"]
    assert ids(filter=["model-zoo"], author="zoo") == ["zoo/merge", "zoo/a"]
    assert ids(filter="base_model:merge:zoo/a") == ["zoo/merge"]
    assert ids(filter="base_model:finetune:zoo/a") == ["zoo/b"]
    assert ids(filter="base_model:zoo/a") == ["zoo/merge", "zoo/b"]
    assert ids(trained_dataset="imdb") == ["zoo/a"]
    assert ids(pipeline_tag="text-classification") == ["zoo/b"]
    assert ids(filter="license:mit") == ["zoo/b"]
    assert ids(sort="created_at", limit=2) == ["other/a", "zoo/merge"]
    full = next(iter(api.list_models(author="zoo", search="merge", cardData=True)))
    assert full.card_data.base_model == ["zoo/a", "zoo/b"]
    expanded = api.model_info("zoo/a", expand=["childrenModelCount", "tags"])
    assert (expanded.children_model_count, expanded.sha) == (2, None)
    with pytest.raises(BadRequestError):
        ids(sort="nonsense")


def test_collections(api):
    for name in ("a", "b", "c"):
        api.create_repo(f"org/{name}")
    made = api.create_collection("My Zoo", namespace="org", description="all of it", private=True)
    assert made.slug.startswith("org/my-zoo-")
    assert made.url.endswith(made.slug)
    for name in ("a", "b", "c"):
        made = api.add_collection_item(made.slug, f"org/{name}", "model", note=f"seed: {name}")
    with pytest.raises(HfHubHTTPError) as caught:
        api.add_collection_item(made.slug, "org/a", "model")
    assert caught.value.response.status_code == 409
    assert len(api.add_collection_item(made.slug, "org/a", "model", exists_ok=True).items) == 3
    with pytest.raises(HfHubHTTPError) as caught:
        api.add_collection_item(made.slug, "org/none", "model")
    assert caught.value.response.status_code == 404
    api.update_collection_item(made.slug, made.items[2].item_object_id, position=0, note="first")
    api.delete_collection_item(made.slug, made.items[0].item_object_id)
    shown = api.get_collection(made.slug)
    assert [(item.item_id, item.note) for item in shown.items] == [("org/c", "first"), ("org/b", "seed: b")]
    again = api.create_collection("My Zoo", namespace="org", exists_ok=True)
    assert again.slug == made.slug
    renamed = api.update_collection_metadata(made.slug, title="Our Zoo", private=False)
    assert renamed.slug.startswith("org/our-zoo-")
    assert api.get_collection(made.slug).title == "Our Zoo"  # the old address still leads there
    assert [one.title for one in api.list_collections(owner="org", item="models/org/b")] == ["Our Zoo"]
    assert list(api.list_collections(item="models/org/a")) == []
    api.delete_collection(renamed.slug)
    assert list(api.list_collections(owner="org")) == []


def test_everything_is_there_after_a_restart(tmp_path, hub_api, folder):
    with FolderHub(tmp_path / "hub") as hub:
        api = hub_api(hub)
        api.create_repo("org/model", private=True)
        commit = api.upload_folder(repo_id="org/model", folder_path=folder)
        api.create_tag("org/model", tag="v1", tag_message="one")
        slug = api.create_collection("Zoo", namespace="org").slug
        api.add_collection_item(slug, "org/model", "model")
        before = api.model_info("org/model", files_metadata=True)
    with FolderHub(tmp_path / "hub") as hub:
        api = hub_api(hub)
        assert api.model_info("org/model", files_metadata=True) == before
        assert api.list_repo_refs("org/model").tags[0].target_commit == commit.oid
        assert [item.item_id for item in api.get_collection(slug).items] == ["org/model"]


def test_contents_of_deleted_repos_go_when_the_hub_is_opened_again(tmp_path, hub_api):
    objects = tmp_path / "hub" / "objects"

    def kept():
        return {path.read_bytes() for path in objects.glob("*/*")}

    with FolderHub(tmp_path / "hub") as hub:
        api = hub_api(hub)
        for name, own in (("a", b"only a"), ("b", b"only b")):
            api.create_repo(f"org/{name}")
            api.upload_file(path_or_fileobj=own, path_in_repo="own.txt", repo_id=f"org/{name}")
            api.upload_file(path_or_fileobj=own + b" large", path_in_repo="own.bin", repo_id=f"org/{name}")
            api.upload_file(path_or_fileobj=b"both", path_in_repo="both.bin", repo_id=f"org/{name}")
        assert {b"only a", b"only a large", b"both"} < kept()
        api.delete_repo("org/a")
    with FolderHub(tmp_path / "hub"):
        left = kept()
    assert not left & {b"only a", b"only a large"}
    assert {b"only b", b"only b large", b"both"} < left


def test_many_clients_push_at_once(local_hub, api):
    """Repos of their own, and one that all of them push to; every acknowledged commit is in its history."""
    api.create_repo("org/shared")
    barrier = threading.Barrier(6)

    def push(number):
        api.create_repo(f"org/own-{number}")
        barrier.wait()
        made = []
        for step in range(4):
            content = b"%d %d" % (number, step)
            api.upload_file(path_or_fileobj=content, path_in_repo="own.bin", repo_id=f"org/own-{number}")
            made.append(
                api.upload_file(path_or_fileobj=content, path_in_repo=f"{number}.bin", repo_id="org/shared").oid
            )
        return made

    with ThreadPoolExecutor(6) as pool:
        acknowledged = [oid for made in pool.map(push, range(6)) for oid in made]
    history = api.list_repo_commits("org/shared")
    assert len(history) == 25
    assert set(acknowledged) < {commit.commit_id for commit in history}
    assert len({commit.commit_id for commit in history}) == 25
    assert {f"{number}.bin" for number in range(6)} < set(api.list_repo_files("org/shared"))


def test_of_commits_on_one_parent_exactly_one_wins(api):
    api.create_repo("org/model")
    parent = api.model_info("org/model").sha

    def push(number):
        try:
            return api.upload_file(
                path_or_fileobj=b"%d" % number, path_in_repo="x", repo_id="org/model", parent_commit=parent
            ).oid
        except HfHubHTTPError as error:
            return error.response.status_code

    with ThreadPoolExecutor(5) as pool:
        outcomes = list(pool.map(push, range(5)))
    assert outcomes.count(412) == 4
    assert api.model_info("org/model").sha in outcomes


def test_injected_faults_reach_the_client(local_hub, api):
    api.create_repo("org/model")
    for status in (401, 403, 409):
        local_hub.fail_next(status, method="POST", path="/commit/")
        with pytest.raises(HfHubHTTPError) as caught:
            api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/model")
        assert caught.value.response.status_code == status
    assert api.list_repo_files("org/model") == [".gitattributes"]
    local_hub.fail_next(429, times=1, path="/preupload/", retry_after_seconds=0)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/model")  # the client tries again by itself
    assert [request.status for request in local_hub.requests if "/preupload/" in request.path][-2:] == [429, 200]


def test_300_repos_are_listed_quickly(tmp_path, hub_api, careless_disk):
    card = "---\nlicense: mit\ntags: [model-zoo, merge]\nbase_model: [zoo/a, zoo/b]\n---\n# x\n" + "word " * 2000
    store = Store(tmp_path / "hub")  # filled directly: 300 pushes would only slow the test down
    for number in range(300):
        repo = store.create_repo("model", f"zoo/m{number:03d}", "a", False)
        config = b'{"model_type": "bert", "architectures": ["BertForMaskedLM"]}'
        with store.objects.batch() as batch:
            readme = (card + str(number)).encode()
            changes = [regular_file("README.md", readme, batch), regular_file("config.json", config, batch)]
            batch.keep()
        store.add_commit(repo, "main", changes, author="a", title="push")
    store.close()
    with FolderHub(tmp_path / "hub") as hub:
        api = hub_api(hub)
        for _ in range(2):  # read from the cards, then known
            assert len(list(api.list_models(filter="merge", full=True))) == 300
