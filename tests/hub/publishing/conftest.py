"""What tests of publishing share: a tiny population, a Hub for it, and ways to look at both."""

from pathlib import Path

import pytest
import torch
from tiny_zoo import write_bert, write_population

from hf_zoo.recipe.schema import PublishSpec


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


@pytest.fixture
def spec():
    """Return a publishing spec for `org`: `spec(private=False, ...)`."""
    return lambda **changes: PublishSpec(**{"namespace": "org", "workers": 2, **changes})


@pytest.fixture
def changes(local_hub):
    """Return the requests so far that could change something on the Hub: `changes()`."""
    return lambda: [request for request in local_hub.requests if request.method not in {"GET", "HEAD"}]


@pytest.fixture
def download(api):
    """Fetch a repo with the stock client: `download(repo, revision=None)` -> folder."""
    return lambda repo, revision=None: Path(api.snapshot_download(repo, revision=revision))
