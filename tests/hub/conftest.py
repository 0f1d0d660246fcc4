"""A real local Hub for each test that asks for one."""

import http.client
import json
import os
import subprocess
import sys
from urllib.parse import urlsplit

import pytest

from hf_zoo.hub.local import FolderHub


@pytest.fixture
def local_hub(tmp_path):
    """A started Hub in the test's own folder, without tokens: `.url`, `.requests`, `.fail_next(...)`."""
    with FolderHub(tmp_path / "hub") as hub:
        yield hub


@pytest.fixture
def hub_environment(tmp_path):
    """Return the environment in which a process talks to a Hub: `hub_environment(hub, token=None, **more)`."""

    def environment(hub, token=None, **more):
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf-home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            **({"HF_TOKEN": token} if token else {}),
            **more,
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        return kept | settings

    return environment


@pytest.fixture
def run_with_hub(hub_environment):
    """Run Python code in a fresh process that talks to a Hub, and return what it printed."""

    def run(hub, code, token=None, **more):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=hub_environment(hub, token, **more),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def hub_api(monkeypatch, tmp_path):
    """Return a client of a Hub in this process: `hub_api(hub, token=None)`, LFS only."""
    from huggingface_hub import HfApi, constants

    def api(hub, token=None):
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        return HfApi(endpoint=hub.url, token=token or False)

    return api


@pytest.fixture
def ask():
    """Send one raw request: `ask(hub, method, path, body=None, headers={})` -> status, headers, body."""

    def send(hub, method, path, body=None, headers=None):
        host = urlsplit(hub.url)
        connection = http.client.HTTPConnection(host.hostname, host.port, timeout=20)
        headers = dict(headers or {})
        if isinstance(body, (dict, list)):
            body = json.dumps(body).encode()
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    return send
