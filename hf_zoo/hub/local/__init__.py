"""A Hub server for one machine: one process, one folder, the Hub's own protocol.

An unmodified `huggingface_hub` talks to it once `HF_ENDPOINT` names it::

    with FolderHub(Path("hub")) as hub:
        print(hub.url)  # HF_ENDPOINT=http://127.0.0.1:54321

What it keeps lies in the folder and survives a crash; nothing is acknowledged before it is on disk. Not kept: pull
requests, discussions, likes, jobs, buckets, and git over HTTP.
"""

from hf_zoo.hub.local.server import FolderHub
from hf_zoo.hub.local.wire import Request

__all__ = ["FolderHub", "Request"]
