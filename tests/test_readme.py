"""Every command of the README, word for word, one after another in one folder, as somebody who reads it would."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_zoo.recipe.grid import expand
from hf_zoo.recipe.loader import load_recipe
from hf_zoo.recipe.schema import MergeRecipe, PretrainRecipe

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [block for block in BLOCKS if block[0] in {"bash", "python"}]
PORT = "8642"
MAX_SECONDS = 1800  # guards against a hang; the whole file takes minutes on two idle cores
WITHOUT_HF_ZOO = "\nimport sys\nassert not [name for name in sys.modules if name.partition('.')[0] == 'hf_zoo']\n"

pytestmark = pytest.mark.e2e
trains = pytest.mark.readme  # for what waits for minutes of training: `make readme` runs it


class Reader:
    """Somebody who works through the README in a folder of their own: a checkout, but for the package.

    What a terminal would keep, exported variables and servers in the background, is kept from block to block.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.done, self.output, self.servers = folder, 0, {}, []
        for name in ("Makefile", "recipes", "accelerate_configs"):
            (folder / name).symlink_to(REPOSITORY / name)
        shutil.copyfile(REPOSITORY / "setup.py", folder / "setup.py")
        (folder / ".installed").touch()  # later than setup.py: nothing is to be installed
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port = str(server.getsockname()[1])
        kept = {key: value for key, value in os.environ.items()
                if not key.startswith(("HF_", "ACCELERATE_", "PYTEST", "MAKE", "MFLAGS", "VIRTUAL_ENV"))}  # fmt: skip
        self.environment = kept | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "HF_HOME": str(folder / "hf-home"),
            # The environment that runs the tests is the one `make` would set up.
            "MAKEFLAGS": f"VENV={sys.prefix} INSTALLED={folder / '.installed'}",
        }

    def read(self, index: int) -> str:
        """Do what the blocks up to one say, and return what that one printed."""
        while self.done <= index:
            place = self.done
            self.done += 1  # a block that fails is not tried again
            kind, block = COMMANDS[place]
            self._provide(block)
            self.output[place] = self.run(kind, block)
        assert index in self.output, f"this block failed before: {COMMANDS[index][1]}"
        return self.output[index]

    def run(self, kind: str, block: str, status: int = 0) -> str:
        block = block.replace(PORT, self.port)
        if kind == "python":
            return self._finish([sys.executable, "-c", block], status)
        # `make test` runs this test among others; what it runs is looked at instead.
        lines = [line for line in block.splitlines() if not re.match(r"make test\b", line)]
        for line in lines:
            if exported := re.fullmatch(r"export (\w+)=(\S+)", line):
                self.environment[exported[1]] = exported[2]
        if any(line.startswith("hf-zoo hub serve") for line in lines):
            return self._serve("\n".join(lines))
        return self._finish(["bash", "-e", "-c", "\n".join(lines)], status)

    def _provide(self, block: str) -> None:
        # Without this population `make merge` trains one, by the recipes and for the minutes the demo just did.
        if block.startswith("make merge"):
            shutil.copytree(self.folder / "runs/demo/zoo-bert-tasks", self.folder / "runs/zoo-bert-tasks")

    def _finish(self, command: list[str], status: int) -> str:
        run = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True,
                             timeout=MAX_SECONDS, check=False, stdin=subprocess.DEVNULL)  # fmt: skip
        assert run.returncode == status, f"{command[-1]}\n{run.stdout}\n{run.stderr}"
        return run.stdout + run.stderr

    def _serve(self, command: str) -> str:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
        )
        self.servers.append(server)
        return server.stdout.readline()  # it says where it is once it is there

    def close(self) -> None:
        for server in self.servers:
            server.send_signal(signal.SIGTERM)
            server.wait(timeout=60)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    someone = Reader(tmp_path_factory.mktemp("readme"))
    yield someone
    someone.close()


def place_of(words):
    """Return the only block that holds some words."""
    (index,) = [index for index, (_, block) in enumerate(COMMANDS) if words in block]
    return index


def test_the_readme_names_what_is_fixed():
    named = "\n".join(block for _, block in COMMANDS)
    for fixed in (
        "make demo",
        "make test",
        "accelerate launch -m hf_zoo.pretrain recipes/bert_mlm.yaml",
        "make merge TASKS=sst,mnli",
        'AutoModel.from_pretrained("org/zoo-vit-042")',
    ):
        assert named.count(fixed) == 1, fixed
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "yaml"}


def in_turn():
    """Return a parameter a block; those that train for a minute or more are marked."""
    for index, (_, block) in enumerate(COMMANDS):
        slow = "make demo" in block or "recipes/bert_mlm.yaml" in block
        yield pytest.param(index, id=block.splitlines()[0], marks=[pytest.mark.slow] if slow else [])


@trains
@pytest.mark.parametrize("index", in_turn())
def test_every_block_runs(reader, index):
    reader.read(index)


def test_make_test_runs_the_tests(reader):
    run = subprocess.run(
        ["make", "-n", "test"], cwd=reader.folder, env=reader.environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.split()[:3] == [f"{sys.prefix}/bin/python", "-m", "pytest"]
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text()


def test_the_recipe_shown_is_one(tmp_path):
    content, merge = [block for kind, block in BLOCKS if kind == "yaml"]
    (tmp_path / "merge.yaml").write_text(merge)
    recipe = load_recipe(tmp_path / "merge.yaml", MergeRecipe)
    assert (recipe.method, recipe.tokenizer.source, len(recipe.rules)) == ("ties", "union", 2)
    (tmp_path / "recipe.yaml").write_text(content)
    recipe = load_recipe(tmp_path / "recipe.yaml", PretrainRecipe)
    assert [plan.factors for plan in expand(recipe)] == [
        {"seed": seed, "training.weight_decay": decay} for seed in (0, 1, 2) for decay in (0, 0.1)
    ]


@trains
def test_the_demo_shows_members_merge_and_hub(reader):
    said = reader.read(place_of("make demo"))
    shown = ["zoo-vit-042", "zoo-bert-000", "zoo-bert-tasks-000", "merge-sst-mnli", "http://127.0.0.1:"]
    shown.append('AutoModel.from_pretrained("org/zoo-vit-042")  ViTModel')
    assert [words for words in shown if words not in said] == []
    assert re.search(r"Done in \d+ s\.", said)
    (again,) = re.findall(r"hf-zoo hub serve \S+", said)
    answer = reader.run("bash", f"{again} --port 0\n")
    (url,) = re.findall(r"http://[\d.:]+", answer)
    code = (
        "import torch\n"
        "from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSequenceClassification\n"
        'model = AutoModel.from_pretrained("org/zoo-vit-042")\n'
        'first = AutoModelForImageClassification.from_pretrained("org/zoo-vit-042", revision="epoch-000")\n'
        'last = AutoModelForImageClassification.from_pretrained("org/zoo-vit-042")\n'
        "assert last.config.num_labels == 10\n"
        "assert not torch.equal(first.vit.embeddings.cls_token, last.vit.embeddings.cls_token)\n"
        'trunk = AutoModel.from_pretrained("org/merge-sst-mnli")\n'
        'heads = [AutoModelForSequenceClassification.from_pretrained("org/merge-sst-mnli", subfolder=task)\n'
        '         for task in ("sst", "mnli")]\n'
        "assert [head.config.num_labels for head in heads] == [2, 3]\n"
        "word = trunk.embeddings.word_embeddings.weight\n"
        "assert all(torch.equal(head.base_model.embeddings.word_embeddings.weight, word) for head in heads)\n"
    )
    fresh = reader.environment | {"HF_ENDPOINT": url, "HF_HOME": str(reader.folder / "fresh-home")}
    fresh.pop("PYTHONPATH")
    subprocess.run([sys.executable, "-c", code + WITHOUT_HF_ZOO], cwd=reader.folder / "runs", env=fresh, check=True)


@trains
def test_the_language_models_are_trained(reader):
    reader.read(place_of("recipes/bert_mlm.yaml"))
    index = json.loads((reader.folder / "runs/zoo-bert/population.json").read_text())
    assert [entry["name"] for entry in index["members"]] == ["zoo-bert-000", "zoo-bert-001"]
    for entry in index["members"]:
        manifest = json.loads((reader.folder / "runs/zoo-bert" / entry["name"] / "zoo.json").read_text())
        assert manifest["status"] == "finished"
        untrained, trained = manifest["results"][0], manifest["results"][-1]
        assert trained["test_loss"] < untrained["test_loss"] - 1


@trains
def test_the_merge_has_a_trunk_and_two_heads_measured_against_their_parents(reader):
    said = reader.read(place_of("make merge TASKS=sst,mnli"))
    folder = reader.folder / "runs/merges/merge-sst-mnli"
    manifest = json.loads((folder / "zoo.json").read_text())
    measured = {(record["task"], record["model"]) for record in manifest["results"]}
    assert {task for task, _ in measured} == {"sst", "mnli"}
    parents = {parent["repo"]: parent["task"] for parent in manifest["parents"] if parent["role"] == "member"}
    assert sorted(parents.values()) == ["mnli", "sst"]
    for repo, task in parents.items():
        assert any(
            task == measured_task and repo.endswith(model.rpartition("/")[2]) for measured_task, model in measured
        )
    assert {("sst", "merge-sst-mnli"), ("mnli", "merge-sst-mnli")} <= measured
    assert "merge-sst-mnli" in said
    # Said again, nothing is made again.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "already made" in reader.run("bash", "make merge TASKS=sst,mnli\n")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@trains
def test_make_merge_says_what_is_wrong(reader):
    reader.read(place_of("make merge TASKS=sst,mnli"))
    assert re.search(r"it has mnli \(\d\), sst \(\d\)", reader.run("bash", "make merge TASKS=sts\n", status=2))
    assert "make merge TASKS=sst,mnli" in reader.run("bash", "make merge\n", status=2)


def test_every_variable_of_make_merge_is_passed_on(reader):
    (command,) = re.findall(r"`(make merge TASKS=sst,mnli METHOD=[^`]*)`", README)
    command = command.replace("BASE=", "BASE=org/base").replace("METHOD=average", "METHOD=greedy_soup")
    run = subprocess.run(
        ["bash", "-c", command.replace("make", "make -n", 1)],
        cwd=reader.folder, env=reader.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (merge,) = [line for line in run.stdout.replace("\\\n", " ").splitlines() if "hf_zoo.merge" in line]
    assert merge.split()[1:] == [
        "-m", "hf_zoo.merge", "recipes/merge_tasks.yaml", "tasks=[sst,mnli]", "method=greedy_soup",
        "population=runs/zoo-bert-tasks", "base=org/base", "data.sst.path=folder", "publish.namespace=org",
    ]  # fmt: skip


@trains
def test_the_models_on_the_hub_need_no_hf_zoo(reader):
    index = place_of("from transformers import AutoModel")
    reader.read(index)
    fresh = {key: value for key, value in reader.environment.items() if key != "PYTHONPATH"}
    code = COMMANDS[index][1] + (
        "assert (type(model).__name__, type(early).__name__) == ('ViTModel', 'ViTForImageClassification')\n"
    )
    subprocess.run([sys.executable, "-c", code + WITHOUT_HF_ZOO], cwd=reader.folder / "runs", env=fresh, check=True)


def test_a_dry_run_lists_members_and_leaves_no_trace(reader):
    index = place_of("--dry-run")
    before = sorted((reader.folder / "runs").iterdir()) if (reader.folder / "runs").exists() else []
    said = reader.run(*COMMANDS[index])
    assert "nothing was done" in said
    assert [line.split()[0] for line in said.splitlines() if line.startswith("zoo-vit-")][:2] == [
        "zoo-vit-000",
        "zoo-vit-001",
    ]
    assert (sorted((reader.folder / "runs").iterdir()) if (reader.folder / "runs").exists() else []) == before


@trains
def test_the_population_on_the_hub_is_tabled_and_merged(reader):
    said = reader.read(place_of('Population.open("org/zoo-vit")'))
    assert re.findall(r"zoo-vit-\d+", said) == ["zoo-vit-000", "zoo-vit-042"]
    assert said.split()[:3] == ["name", "training.learning_rate", "test_accuracy"]


def test_the_command_table_is_the_command_line():
    from hf_zoo.cli import VERBS

    table = re.findall(r"^\| `hf-zoo (\w+)", README, re.MULTILINE)
    assert sorted(table) == sorted(set(VERBS) - {"register"})


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (REPOSITORY / target).exists(), target
