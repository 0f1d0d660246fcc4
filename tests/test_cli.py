"""The one command line: its verbs, its help, its exit statuses."""

import subprocess
import sys

import pytest

from hf_zoo import __version__
from hf_zoo.cli import VERBS, guarded, main
from hf_zoo.errors import RecipeError


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_verb(arguments, capsys):
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == list(VERBS)
    assert err == ""


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_says_how_it_is_used(verb, flag, capsys):
    assert main([verb, flag]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: hf-zoo {verb}")
    assert err == ""
    assert max(map(len, out.splitlines())) <= 120


@pytest.mark.parametrize("verb", ["pretrain", "finetune", "merge", "publish"])
def test_the_verbs_with_recipes_and_folders_are_modules_too(verb):
    run = subprocess.run(
        [sys.executable, "-m", f"hf_zoo.{verb}", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert run.returncode == 0
    assert run.stdout.startswith("usage: hf-zoo ")


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf_zoo {__version__}\n"


def test_an_unknown_verb_gets_the_nearest(capsys):
    assert main(["pretrian", "recipe.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hf-zoo: unknown verb 'pretrian' (did you mean 'pretrain'?)")


def test_arguments_reach_the_verb(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", "nothing.yaml", "seed=3"]) == 2
    assert "nothing.yaml" in capsys.readouterr().err


def raise_it(error):
    def body():
        raise error

    return body


def test_a_users_mistake_is_one_message(capsys):
    assert guarded(raise_it(RecipeError("a.yaml", ["seed: must be 0 or more", "nmae: unknown"]))) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: a.yaml: 2 mistakes\n  - seed: must be 0 or more\n  - nmae: unknown\n"


def test_an_interrupted_verb_says_how_to_go_on(capsys):
    assert guarded(raise_it(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted: run the same command again to go on\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)


def test_output_cut_by_head_is_no_mistake(tmp_path):
    code = (
        "from hf_zoo.cli import guarded\n"
        "def body():\n"
        "    for line in range(100000): print('a line of a long table', line)\n"
        "    return 0\n"
        "raise SystemExit(guarded(body))\n"
    )
    run = subprocess.run(
        f"'{sys.executable}' -c \"$CODE\" | head -1",
        env={"CODE": code, "PATH": "/usr/bin:/bin"},
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.stdout == "a line of a long table 0\n"
    assert "Traceback" not in run.stderr
