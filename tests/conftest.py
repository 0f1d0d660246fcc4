"""What every test shares: an environment without network, account or trackers."""

import os
import signal
from pathlib import Path

import pytest

# Set before anything imports the Hub client, which reads its environment once.
os.environ.update(
    OMP_NUM_THREADS="1",  # tests are tiny, and several run at once
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TRANSFORMERS_VERBOSITY="error",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.pop("HF_TOKEN", None)

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_DATA = REPOSITORY.parent / "shared" / "data"


@pytest.fixture
def no_hang():
    """End a test that would go on for ever; it says nothing on how long it may take."""

    def stop(*_):
        raise TimeoutError("still running after two minutes: this hangs")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="session", autouse=True)
def hugging_face_home(tmp_path_factory):
    """Keep every cache of the Hugging Face libraries inside the test's own folder."""
    home = tmp_path_factory.mktemp("hf-home")
    previous = os.environ.get("HF_HOME")
    os.environ["HF_HOME"] = str(home)
    yield home
    if previous is None:
        del os.environ["HF_HOME"]
    else:
        os.environ["HF_HOME"] = previous
