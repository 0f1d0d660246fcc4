"""Tokens: who may see and change what."""

import base64
import json

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import get_session

from hf_zoo.errors import HubError
from hf_zoo.hub.local import FolderHub

ALICE, BOB = "hf_alice", "hf_bob"


@pytest.fixture
def guarded_hub(tmp_path):
    with FolderHub(tmp_path / "hub", tokens={ALICE: "alice,zoo", BOB: "bob"}) as hub:
        yield hub


@pytest.fixture
def clients(guarded_hub, hub_api):
    hub_api(guarded_hub)
    return {
        name: HfApi(endpoint=guarded_hub.url, token=token)
        for name, token in (("alice", ALICE), ("bob", BOB), ("nobody", False), ("stranger", "hf_unknown"))
    }


def status_of(call, *arguments, **options):
    with pytest.raises(HfHubHTTPError) as caught:
        call(*arguments, **options)
    return caught.value.response.status_code


def test_whoami_names_user_and_organisations(clients):
    identity = clients["alice"].whoami()
    assert identity["name"] == "alice"
    assert [org["name"] for org in identity["orgs"]] == ["zoo"]
    assert status_of(clients["stranger"].whoami) == 401


def test_only_owners_write(clients):
    clients["alice"].create_repo("zoo/model")
    for name, expected in (("bob", 403), ("nobody", 401), ("stranger", 401)):
        api = clients[name]
        attempts = {
            "create": (api.create_repo, ["zoo/other"], {}),
            "delete": (api.delete_repo, ["zoo/model"], {}),
            "move": (api.move_repo, ["zoo/model", "bob/model"], {}),
            "settings": (api.update_repo_settings, ["zoo/model"], {"private": True}),
            "branch": (api.create_branch, ["zoo/model"], {"branch": "b"}),
            "tag": (api.create_tag, ["zoo/model"], {"tag": "t"}),
            "upload": (api.upload_file, [], {"path_or_fileobj": b"x", "path_in_repo": "x", "repo_id": "zoo/model"}),
            "squash": (api.super_squash_history, ["zoo/model"], {}),
            "collection": (api.create_collection, ["Title"], {"namespace": "zoo"}),
        }
        outcomes = {what: status_of(call, *args, **options) for what, (call, args, options) in attempts.items()}
        assert outcomes == dict.fromkeys(attempts, expected)
    assert clients["nobody"].list_repo_files("zoo/model") == [".gitattributes"]
    assert clients["nobody"].model_info("zoo/model").private is False


def test_a_repo_cannot_be_given_to_a_foreign_namespace(clients):
    clients["alice"].create_repo("zoo/model")
    assert status_of(clients["alice"].move_repo, "zoo/model", "bob/model") == 403
    clients["alice"].move_repo("zoo/model", "alice/model")


def test_private_repos_are_not_there_for_others(clients, guarded_hub, ask):
    clients["alice"].create_repo("zoo/secret", private=True)
    clients["alice"].upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id="zoo/secret")
    slug = clients["alice"].create_collection("Mixed", namespace="zoo").slug
    clients["alice"].add_collection_item(slug, "zoo/secret", "model")
    hidden = clients["alice"].create_collection("Hidden", namespace="zoo", private=True).slug
    for name in ("bob", "nobody"):
        with pytest.raises(RepositoryNotFoundError):
            clients[name].model_info("zoo/secret")
        with pytest.raises(RepositoryNotFoundError):
            clients[name].hf_hub_download("zoo/secret", "x.txt")
        assert list(clients[name].list_models()) == []
        assert clients[name].get_collection(slug).items == []
        assert [one.title for one in clients[name].list_collections()] == ["Mixed"]
        assert status_of(clients[name].get_collection, hidden) == 404
        assert not clients[name].repo_exists("zoo/secret")
    for page in ("/", "/zoo/secret", "/zoo/secret/tree/main", "/zoo/secret/blob/main/x.txt", f"/collections/{slug}"):
        assert b"secret" not in ask(guarded_hub, "GET", page)[2].replace(b"Repository not found: zoo/secret", b"")
    assert [model.id for model in clients["alice"].list_models()] == ["zoo/secret"]
    assert len(clients["alice"].get_collection(slug).items) == 1


def test_the_existence_of_a_private_repo_cannot_be_probed(clients, guarded_hub, ask):
    """Missing and hidden repos answer alike to somebody without rights."""
    clients["alice"].create_repo("zoo/secret", private=True)
    for method, tail in (("GET", ""), ("POST", "/branch/b"), ("POST", "/commit/main"), ("PUT", "/settings")):
        hidden = ask(guarded_hub, method, f"/api/models/zoo/secret{tail}", body=b"{}" if method != "GET" else None)
        missing = ask(guarded_hub, method, f"/api/models/zoo/missin{tail}", body=b"{}" if method != "GET" else None)
        assert hidden[0] == missing[0] == 404
        assert hidden[2].replace(b"secret", b"") == missing[2].replace(b"missin", b"")


def test_uploads_need_an_address_that_the_hub_signed(clients, guarded_hub, ask):
    clients["alice"].create_repo("zoo/model")
    clients["bob"].create_repo("bob/model")
    oid, other = "a" * 64, "b" * 64
    batch = {"operation": "upload", "objects": [{"oid": oid, "size": 3}], "hash_algo": "sha256"}
    headers = {"Authorization": f"Bearer {ALICE}"}
    path = "/zoo/model.git/info/lfs/objects/batch"
    assert ask(guarded_hub, "POST", path, batch)[0] == 401
    assert ask(guarded_hub, "POST", path, batch, {"Authorization": f"Bearer {BOB}"})[0] == 403
    status, _, answer = ask(guarded_hub, "POST", path, batch, headers)
    assert status == 200
    href = json.loads(answer)["objects"][0]["actions"]["upload"]["href"].removeprefix(guarded_hub.url)
    for forged in (
        href.replace("zoo/model", "bob/model"),
        href.replace(oid, other),
        href.replace("size=3", "size=4"),
        href.replace("expires=", "expires=9"),
        href.partition("?")[0],
        href[:-1] + ("0" if href[-1] != "0" else "1"),
    ):
        assert ask(guarded_hub, "PUT", forged, b"abc")[0] == 403, forged
    assert ask(guarded_hub, "PUT", href, b"abc")[0] == 400  # signed, but not the content it was announced as


def test_a_digest_alone_does_not_open_somebody_elses_file(clients, guarded_hub):
    """Knowing the SHA-256 of a private file is not having it."""
    content = b"private weights"
    clients["alice"].create_repo("alice/secret", private=True)
    clients["alice"].upload_file(path_or_fileobj=content, path_in_repo="w.bin", repo_id="alice/secret")
    oid = clients["alice"].get_paths_info("alice/secret", "w.bin")[0].lfs.sha256
    clients["bob"].create_repo("bob/mine")
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": oid}},
    ]
    answer = get_session().post(
        f"{guarded_hub.url}/api/models/bob/mine/commit/main",
        content="\n".join(map(json.dumps, lines)).encode(),
        headers={"Authorization": f"Bearer {BOB}"},
    )
    assert answer.status_code == 400
    assert "never uploaded to bob/mine" in answer.text


def test_browsers_sign_in_with_the_token_as_password(guarded_hub, clients, ask):
    clients["alice"].create_repo("zoo/secret", private=True)
    status, headers, _ = ask(guarded_hub, "GET", "/login")
    assert (status, headers["WWW-Authenticate"][:5]) == (401, "Basic")
    basic = {"Authorization": "Basic " + base64.b64encode(f"x:{ALICE}".encode()).decode()}
    assert ask(guarded_hub, "GET", "/login", headers=basic)[0] == 303
    assert b"zoo/secret" in ask(guarded_hub, "GET", "/", headers=basic)[2]


def test_pages_of_other_sites_cannot_change_anything(local_hub, ask):
    body = {"name": "evil", "organization": "zoo"}
    for origin in ("https://evil.example", "null", f"http://evil.example:{local_hub.url.rpartition(':')[2]}"):
        assert ask(local_hub, "POST", "/api/repos/create", body, {"Origin": origin})[0] == 403
    assert ask(local_hub, "GET", "/api/models", headers={"Host": "evil.example"})[0] == 421  # DNS rebinding
    assert ask(local_hub, "POST", "/api/repos/create", body, {"Origin": local_hub.url})[0] == 200


def test_the_network_needs_tokens(tmp_path):
    with pytest.raises(HubError, match="give it tokens"):
        FolderHub(tmp_path / "hub", host="0.0.0.0")
    with FolderHub(tmp_path / "hub", host="0.0.0.0", tokens={ALICE: "alice"}) as hub:
        assert hub.url.startswith("http://0.0.0.0:")
    with pytest.raises(HubError, match="users"):
        FolderHub(tmp_path / "hub", tokens={"hf_x": "../up"})
