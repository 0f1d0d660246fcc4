"""Publishing to a real Hub on this machine, and reading it back with and without hf_zoo."""

import json
import re

import torch
from safetensors.torch import load_file
from tiny_zoo import state_of, write_population

from hf_zoo.hub.contents import is_published
from hf_zoo.hub.publish import publish_population, snapshot_manifest
from hf_zoo.population import Manifest, Member, Population

REVISIONS = ("epoch-000", "epoch-001", "epoch-002")


def test_a_population_becomes_repos_branches_and_a_collection(api, local_hub, zoo, spec):
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


def test_a_repo_is_its_folder_byte_for_byte(api, zoo, spec, download):
    publish_population(zoo, spec())
    for name in ("zoo-t-000", "zoo-t-001"):
        local = {path: content for path, content in state_of(zoo / name).items() if is_published(path)}
        remote = state_of(download(f"org/{name}"))
        del remote[".gitattributes"]
        assert remote == local
        assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "zoo.json"} <= set(remote)
        assert {"results.jsonl", "learning_curve.png"} <= set(remote)
        assert f"org/{name}".encode() in remote["README.md"]


def test_a_snapshot_is_a_whole_repo_of_its_moment(api, zoo, spec, download):
    before = Manifest.read(zoo / "zoo-t-000")
    publish_population(zoo, spec())
    files = state_of(download("org/zoo-t-000", revision="epoch-001"))
    assert files["model.safetensors"] == (zoo / "zoo-t-000/snapshots/epoch-001/model.safetensors").read_bytes()
    assert files["tokenizer.json"] == (zoo / "zoo-t-000/tokenizer.json").read_bytes()
    then = Manifest.from_dict(json.loads(files["zoo.json"]), "snapshot")
    assert then.sha256 == before.snapshots[1].sha256
    assert [record["epoch"] for record in then.results] == [0, 1]
    assert then.metrics == before.snapshots[1].metrics
    assert then.snapshots == ()
    assert b'revision="epoch-001"' in files["README.md"]
    assert "results.jsonl" not in files


def test_a_second_run_sends_nothing(api, local_hub, zoo, spec, changes):
    first = publish_population(zoo, spec())
    on_disk, collection = state_of(zoo), api.get_collection(first.collection_slug)
    local_hub.requests.clear()

    second = publish_population(zoo, spec())

    assert changes() == []
    assert second.commits == ()
    assert second.uploaded_files == 0
    assert second.skipped_files == first.uploaded_files > 0
    assert second.collection_slug == first.collection_slug
    assert state_of(zoo) == on_disk
    assert api.get_collection(first.collection_slug).last_updated == collection.last_updated


def test_only_what_changed_is_sent(api, local_hub, zoo, spec):
    publish_population(zoo, spec())
    (zoo / "zoo-t-001" / "notes.md").write_text("Seen to converge.\n")
    local_hub.requests.clear()
    report = publish_population(zoo, spec())
    assert [(done.repo, done.revision, done.uploaded) for done in report.revisions if done.uploaded] == [
        ("org/zoo-t-001", "main", 1)
    ]
    assert len([request for request in local_hub.requests if "/commit/" in request.path]) == 1
    assert not [request for request in local_hub.requests if request.method == "PUT"]


def test_weights_that_are_gone_here_go_there_too(api, zoo, spec):
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


def test_twenty_members_at_once(api, local_hub, tmp_path, base, spec, download):
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
        assert state_of(download(repo))["model.safetensors"] == expected
    assert len(api.get_collection(report.collection_slug).items) == 20


def test_public_and_without_snapshots(api, zoo, spec, download):
    report = publish_population(
        zoo, spec(private=False, snapshots=False, license="mit", language=("en",), collection="A b")
    )
    info = api.model_info("org/zoo-t-000")
    assert not info.private
    assert [branch.name for branch in api.list_repo_refs("org/zoo-t-000").branches] == ["main"]
    assert {"license:mit", "en"} <= set(info.tags)
    collection = api.get_collection(report.collection_slug)
    assert (collection.title, collection.private) == ("A b", False)
    assert b"revisions of this repo" not in state_of(download("org/zoo-t-000"))["README.md"]


def test_populations_and_members_open_from_the_hub(api, zoo, spec):
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


def test_stock_auto_classes_load_a_revision_in_a_process_without_hf_zoo(api, local_hub, run_with_hub, zoo, spec):
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
