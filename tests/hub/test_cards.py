"""Cards as a pure function of the manifest; `python tests/hub/test_cards.py` writes the golden files anew."""

import math
from pathlib import Path

import pytest
import yaml
from sample_cards import (
    HUB_KEYS,
    NASTY,
    member,
    merge,
    metadata_of,
    outside_fences,
    rows_of,
    snippets_of,
    without_code,
)
from tiny_zoo import records

from hf_zoo.hub.cards import (
    CITATION,
    MOST_ROWS,
    draw_learning_curve,
    render_card,
    render_collection,
    render_note,
    shorten,
    write_card,
)
from hf_zoo.hub.figures import shows
from hf_zoo.hub.markdown import code, fence, number, sentence, table
from hf_zoo.population import Manifest, Parent

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["member", "merge"])
def test_the_card_reads_as_it_should(name):
    assert render_card(*_golden(name)) == (GOLDEN / f"{name}.md").read_text()


@pytest.mark.parametrize("manifest", [member(), merge()], ids=["member", "merge"])
def test_the_same_manifest_gives_the_same_bytes(manifest, tmp_path):
    manifest.write(tmp_path)
    assert render_card(manifest) == render_card(manifest) == render_card(Manifest.read(tmp_path))


@pytest.mark.parametrize("text", NASTY)
def test_no_value_breaks_out_of_its_place(text):
    plain = member()
    nasty = member(
        factors={"seed": text, text or "x": 1},
        description=text,
        dataset={"path": text, "labels": [text, text]},
        loading={text or "x": text},
        recipe={"name": text, "model": {"config": {text or "x": text}}},
        license=text or None,
        versions={text or "x": text},
        task=text or None,
    )
    card = render_card(nasty, "org/x")
    assert set(metadata_of(card)) <= HUB_KEYS
    assert "\n## " in card
    headings = [line for line in outside_fences(card) if line.startswith("#")]
    assert headings == [line for line in outside_fences(render_card(plain, "org/x")) if line.startswith("#")]
    for heading in ("## Generating factors", "What was taken from the parent", "## Data", "## Versions"):
        assert {len(row) for row in rows_of(card, heading)} == {2}
    assert len(rows_of(card, "## Generating factors")) == 2 + len(nasty.factors)
    assert not any("<script>" in line for line in without_code(card))
    for snippet in snippets_of(card):
        compile(snippet, "card", "exec")


@pytest.mark.parametrize("text", NASTY)
def test_no_value_breaks_a_merge(text):
    manifest = merge(
        method={"name": text, "title": text, "paper": text, "url": text, "parameters": {text or "x": text}},
        tasks=(text or "x", "mnli"), parents=(Parent(repo=text or "x", revision=text, role="member", task=text),),
        results=({"task": text, "model": text, "test_accuracy": 0.5},),
    )  # fmt: skip
    card = render_card(manifest)
    assert set(metadata_of(card)) <= HUB_KEYS
    assert {len(row) for row in rows_of(card, "## Lineage")} == {5}
    assert {len(row) for row in rows_of(card, "## Results")} == {2}
    assert not any("<script>" in line for line in without_code(card))
    for snippet in snippets_of(card):
        compile(snippet, "card", "exec")


def test_the_results_stand_in_the_table():
    rows = rows_of(render_card(member()), "![Learning curve]")
    assert rows[0][:4] == ["epoch", "step", "learning rate", "train loss"]
    assert rows[0][4:] == ["validation loss", "validation accuracy", "test loss", "test accuracy"]
    assert [row[0] for row in rows[2:]] == ["0", "1", "2"]
    assert rows[4] == ["2", "20", "0.001", "0.2333", "0.2667", "0.8333", "0.3", "0.8167"]


def test_long_results_are_thinned_and_say_so():
    card = render_card(member(results=records(400)))
    rows = rows_of(card, "![Learning curve]")[2:]
    assert len(rows) == MOST_ROWS
    assert (rows[0][0], rows[-1][0]) == ("0", "400")
    assert "25 of 401 records are shown" in card
    assert "records are shown" not in render_card(member(results=records(MOST_ROWS - 1)))


def test_wide_results_keep_the_columns_that_matter():
    more = {f"{split}_{name}": 0.5 for split in ("train", "validation", "test") for name in ("f1", "top5", "accuracy")}
    card = render_card(member(results=tuple(record | more for record in records(2))))
    header = rows_of(card, "![Learning curve]")[0]
    assert header == ["epoch", "step", "learning rate", *(
        f"{split} {name}" for split in ("train", "validation", "test") for name in ("loss", "accuracy")
    )]  # fmt: skip
    assert "All metrics are in `results.jsonl`." in card
    assert "All metrics" not in render_card(member())


def test_the_notes_speak_of_what_is_there():
    assert "The running loss is" not in render_card(member())
    assert "The running loss is" in render_card(member(results=({"epoch": 1, "step": 5, "running_loss": 2.0},) * 2))
    assert "untrained" not in render_card(member(results=({"epoch": 1, "step": 5, "running_loss": 2.0},) * 2))
    assert "How its weights began:" in render_card(member(parents=(), loading={"init": "default"}))


def test_what_is_not_finite_is_shown_but_not_claimed():
    metrics = {"validation_accuracy": math.nan, "test_accuracy": math.inf, "test_loss": 1.5}
    manifest = member(metrics=metrics, results=({"epoch": 0, "train_loss": 2.0}, {"epoch": 1, "train_loss": math.nan}))
    card = render_card(manifest)
    assert "model-index" not in metadata_of(card)
    assert rows_of(card, "![Learning curve]")[3] == ["1", "nan"]
    assert draw_learning_curve(manifest.results).startswith(b"\x89PNG")


def test_a_merge_is_compared_with_its_parents():
    rows = rows_of(render_card(merge()), "## Results")
    assert rows[0] == ["Model", "`sst`", "`mnli`", "mean"]
    assert rows[2:] == [
        ["`org/a`", "0.91", "-", "-"],
        ["`org/b`", "-", "0.72", "-"],
        ["`merge-sst-mnli`", "0.88", "0.7", "0.79"],
    ]


def test_the_lineage_links_to_the_very_commit():
    row = rows_of(render_card(member()), "## Lineage")[2]
    assert row[1] == "[`org/zoo-simclr-003`](/org/zoo-simclr-003)"
    assert row[2] == f"[`{'a' * 12}`](/org/zoo-simclr-003/tree/{'a' * 40})"
    assert "Trained from scratch." in render_card(member(parents=()))


def test_a_snapshot_says_which_moment_it_is():
    card = render_card(member(snapshots=()), "org/zoo-vit-042", "epoch-001")
    assert "# zoo-vit-042 at `epoch-001`" in card
    assert 'from_pretrained("org/zoo-vit-042", revision="epoch-001")' in snippets_of(card)[0]
    assert "learning_curve.png" not in card


def test_citations_agree_with_the_project_and_name_the_paper():
    project = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["title"] in CITATION
    assert project["authors"][0]["name"] in CITATION
    assert project["license"] in CITATION
    card = render_card(merge())
    assert "title = {TIES-Merging}" in card
    assert "url = {https://arxiv.org/abs/2306.01708}" in card


def test_unchanged_cards_are_not_written_again(tmp_path):
    member().write(tmp_path)
    write_card(tmp_path, "org/zoo-vit-042")
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert set(before) == {"zoo.json", "README.md", "learning_curve.png"}
    write_card(tmp_path, "org/zoo-vit-042")
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    member(results=records(9)).write(tmp_path)
    write_card(tmp_path, "org/zoo-vit-042")
    assert shows((tmp_path / "learning_curve.png").read_bytes(), Manifest.read(tmp_path).results)


def test_no_picture_for_a_single_record(tmp_path):
    member(results=records(0)).write(tmp_path)
    write_card(tmp_path)
    assert not (tmp_path / "learning_curve.png").exists()
    assert "learning_curve.png" not in (tmp_path / "README.md").read_text()


def test_collection_and_note_fit_what_the_hub_takes():
    text = render_collection([member(description="word " * 100)] * 3)
    assert text.startswith("3 models made with hf_zoo for image classification; they differ in ")
    assert len(text) <= 150
    assert text.endswith("…")
    assert "\n" not in text
    assert render_note(member()) == "augmentation.mixup = 0.2, seed = 2, training.learning_rate = 0.001"
    assert render_note(merge()) == "ties of a, b"
    assert len(render_note(member(factors={f"f{i}": "x" * 20 for i in range(100)}))) <= 500
    assert render_collection([member(objective=None), member()]).startswith("2 models made with hf_zoo; they differ")


@pytest.mark.parametrize(
    ("text", "limit", "short"), [("a b c", 5, "a b c"), ("aa bb cc", 6, "aa bb…"), ("aaaaaaaa", 4, "aaa…")]
)
def test_shortening(text, limit, short):
    assert shorten(text, limit) == short
    assert len(short) <= limit


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.5, "0.5"), (1 / 3, "0.3333"), (1e-5, "1.000e-05"), (45322, "45,322"), (123456.7, "1.235e+05"),
     (12345.6, "12,346"), (0.0, "0"), (True, "True"), (None, "None"), (math.nan, "nan"), (-2.0, "-2")],
)  # fmt: skip
def test_numbers(value, shown):
    assert number(value) == shown


def test_markdown_pieces():
    assert code("a`b") == "``a`b``"
    assert code("`a`") == "`` `a` ``"
    assert code("") == "(empty)"
    assert sentence("a*b* <i> [x](y) _z_ snake_case") == r"a\*b\* \<i\> \[x\](y) \_z\_ snake_case"
    assert table(["A", "B"], [["x|y", ""]], numeric=[1]) == "| A | B |\n| --- | ---: |\n| x\\|y |   |"
    assert fence("a\n```\nb", "yaml") == "````yaml\na\n```\nb\n````"


def _golden(name):
    return (member(), "org/zoo-vit-042") if name == "member" else (merge(), "org/merge-sst-mnli")


if __name__ == "__main__":
    for golden in ("member", "merge"):
        (GOLDEN / f"{golden}.md").write_text(render_card(*_golden(golden)))
