"""`python -m hf_zoo.publish` as a person runs it."""

import pytest

from hf_zoo.publish import main


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
