"""A folder to work in that holds small populations of every kind, as the verbs leave them."""

import shutil

import pytest
from commands import tree, verb, write_recipes
from huggingface_hub import constants


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with recipes, and runs/ with a small ViT, BERT, and two fine-tuned classifiers."""
    folder = tmp_path_factory.mktemp("trained")
    write_recipes(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert verb("pretrain", "vit.yaml", "vary.seed=[0,1]") == 0
        assert verb("pretrain", "bert.yaml") == 0
        assert verb("finetune", "sst.yaml", "vary.seed=[0,1]") == 0
    return folder


@pytest.fixture
def work(trained, tmp_path, monkeypatch):
    """A copy of `trained` to spoil, as the current folder."""
    folder = tmp_path / "work"
    shutil.copytree(trained, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody: a test that asks a Hub brings one
    return folder


@pytest.fixture
def refused(work, capsys):
    """Run a verb that must refuse: `refused(NAME, ...)` returns its one message, after checking that nothing changed."""

    def run(name, *arguments):
        capsys.readouterr()
        before = tree(work)
        status = verb(name, *arguments)
        after = tree(work)
        out, err = capsys.readouterr()
        assert status == 2, err
        assert err.startswith("error: ")
        assert err.count("error: ") == 1
        assert "Traceback" not in err
        assert out == ""
        assert {path: after.get(path, "gone") for path in before if before[path] != after.get(path, "gone")} == {}
        assert sorted(after.keys() - before.keys()) == []
        return err.removeprefix("error: ").rstrip("\n")

    return run
