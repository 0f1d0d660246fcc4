"""Parents, bases of adapters and merged members by their names on the Hub."""

import dataclasses
import json
import shutil

import pytest
import torch
from tiny_zoo import parent_of, state_of, write_member, write_population

from hf_zoo.errors import HubError
from hf_zoo.files import weights_digest
from hf_zoo.hub.publish import publish_member, publish_population
from hf_zoo.population import Manifest, Member, Population


def test_parents_become_repos_at_a_commit(api, tmp_path, base, spec):
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


def test_parents_within_a_population_go_first(api, tmp_path, base, spec):
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


def test_an_adapter_names_its_base_as_the_hub_knows_it(api, local_hub, tmp_path, base, spec, changes, download):
    [parent] = write_population(tmp_path / "zoo-p", base, num_members=1, num_epochs=0)
    folder = tmp_path / "zoo-a-000"
    write_member(folder, base, "zoo-a", num_epochs=0, parents=[parent_of(parent)], library="peft")
    for place in (folder, folder / "snapshots/epoch-000"):
        (place / "model.safetensors").rename(place / "adapter_model.safetensors")
        (place / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "zoo-p")}))
    with pytest.raises(HubError, match="its adapter needs zoo-p-000, which is not on the Hub"):
        publish_member(folder, "org", spec())
    assert changes() == []
    published = publish_population(tmp_path / "zoo-p", spec())
    publish_member(folder, "org", spec())
    for revision in ("main", "epoch-000"):
        config = json.loads(state_of(download("org/zoo-a-000", revision=revision))["adapter_config.json"])
        assert config == {"base_model_name_or_path": "org/zoo-p-000", "revision": published.revisions[-1].commit}
    local_hub.requests.clear()
    publish_member(folder, "org", spec())
    assert changes() == []


def test_a_merge_is_published_with_a_sub_folder_a_task(api, local_hub, tmp_path, base, spec):
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


def test_a_real_adapter_loads_on_its_published_base(api, local_hub, run_with_hub, tmp_path, base, spec):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    [parent] = write_population(tmp_path / "zoo-p", base, num_members=1, num_epochs=0)
    publish_population(tmp_path / "zoo-p", spec())
    folder = tmp_path / "zoo-a-000"
    write_member(folder, base, "zoo-a", num_epochs=0, parents=[parent_of(parent)], library="peft")
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "zoo-p" / "zoo-p-000"),
        LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"]),
    ).eval()
    expected = []
    for place in (folder / "snapshots/epoch-000", folder):
        for path in (*place.glob("*.safetensors"), place / "config.json"):
            path.unlink()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.add_(0.3)
            expected.append(model(torch.tensor([[2, 5, 6, 3]])).logits)
        model.save_pretrained(place)
    manifest = Manifest.read(folder)
    snapshot = dataclasses.replace(manifest.snapshots[0], sha256=weights_digest(folder / "snapshots/epoch-000"))
    manifest.replace(sha256=weights_digest(folder), snapshots=(snapshot,)).write(folder)
    publish_member(folder, "org", spec())

    card = (folder / "README.md").read_text()
    assert 'adapter_kwargs={"revision": "epoch-000"}' in card
    said = run_with_hub(
        local_hub,
        "import json, torch\n"
        "from transformers import AutoModelForSequenceClassification as Auto\n"
        "last = Auto.from_pretrained('org/zoo-a-000')\n"
        "early = Auto.from_pretrained('org/zoo-a-000', adapter_kwargs={'revision': 'epoch-000'})\n"
        "print(json.dumps([m(torch.tensor([[2, 5, 6, 3]])).logits.tolist() for m in (early, last)]))\n",
    )
    loaded = torch.tensor(json.loads(said.splitlines()[-1]))
    torch.testing.assert_close(loaded, torch.stack(expected))
    assert (loaded[0] - loaded[1]).abs().max() > 0.02
