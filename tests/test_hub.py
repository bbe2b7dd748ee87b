"""Uploads to a server on this machine that speaks as much of the Hub's protocol as an upload needs."""

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlparse

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_lightning.__main__ import main
from rlhf_lightning.checkpoint_files import CHECKPOINT_KEY
from rlhf_lightning.errors import UserError
from rlhf_lightning.hub import check_repository, push_folder
from rlhf_lightning.models.export import pack_model

TOKEN = "hf_of-the-test"


class FakeHub(ThreadingHTTPServer):
    """Takes what is created, uploaded and committed; ``refusals`` gives paths that it answers with an error."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.created: dict[str, Any] = {}
        self.preuploaded: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.committed: dict[str, bytes] = {}
        self.summaries: list[str] = []
        self.cards: list[str] = []
        self.tokens: set[str | None] = set()
        self.refusals: dict[str, int] = {}


class Answering(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.server, urlparse(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "/models/" in path or "/repos/" in path or "/info/lfs" in path:
            hub.tokens.add(self.headers.get("Authorization"))
        refusal = next((status for part, status in hub.refusals.items() if part in path), None)
        if refusal is not None:
            self.reply({"error": "said the fake hub", "url": f"{hub.endpoint}/someone/my-model"}, refusal)
        elif path == "/api/repos/create":
            hub.created = json.loads(body)
            owner = hub.created["organization"] or "me"
            self.reply({"url": f"{hub.endpoint}/{owner}/{hub.created['name']}"})
        elif path == "/api/validate-yaml":
            hub.cards.append(json.loads(body)["content"])
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            hub.preuploaded |= set(names)
            self.reply({"files": [{"path": name, "uploadMode": mode(name), "shouldIgnore": False} for name in names]})
        elif path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            upload = f"{hub.endpoint}/upload"
            answers = [{**one, "actions": {"upload": {"href": f"{upload}/{one['oid']}"}}} for one in wanted]
            self.reply({"objects": answers})
        elif path.startswith("/upload/"):
            hub.large[path.rpartition("/")[2]] = body
            self.reply({})
        elif "/commit/" in path:
            self.commit([json.loads(line) for line in body.splitlines()])
            repository = path.removeprefix("/api/models/").partition("/commit/")[0]
            self.reply({"commitUrl": f"{hub.endpoint}/{repository}/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self.reply({"error": "not found"}, 404)

    def commit(self, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            value = entry["value"]
            if entry["key"] == "header":
                self.server.summaries.append(value["summary"])
            elif entry["key"] == "file":
                self.server.committed[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.committed[value["path"]] = self.server.large[value["oid"]]

    def reply(self, content: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def mode(name: str) -> str:
    return "lfs" if name.endswith(".safetensors") else "regular"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A fake hub that huggingface_hub takes for the real one, and a token."""
    server = FakeHub()
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an export may look like."""
    path = tmp_path / "my model"
    (path / "curves").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(os.urandom(5000))
    (path / "config.json").write_text("{}")
    (path / "README.md").write_text("---\ntags: [a]\n---\n\n# ä\n")
    (path / "curves" / "score.svg").write_text("<svg/>")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_arrives_is_the_folder_byte_for_byte(hub: FakeHub, folder: Path) -> None:
    assert push_folder(folder, "someone/my-model") == f"{hub.endpoint}/someone/my-model"
    assert hub.committed == contents(folder)
    assert hub.preuploaded == set(hub.committed)
    assert hub.cards == [(folder / "README.md").read_text()]
    assert list(hub.large) == [hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()]
    assert hub.summaries == ["Upload the model and its card"]
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.created["name"] == "my-model"
    assert hub.created["organization"] == "someone"
    assert "private" not in json.dumps(hub.created)


def test_a_new_repository_is_private_where_that_is_asked_for(hub: FakeHub, folder: Path) -> None:
    assert push_folder(folder, "my-model", private=True) == f"{hub.endpoint}/me/my-model"
    assert "private" in json.dumps(hub.created)
    assert hub.committed == contents(folder)


def test_a_repository_that_exists_gets_the_commit(hub: FakeHub, folder: Path) -> None:
    hub.refusals = {"/api/repos/create": 409}
    assert push_folder(folder, "someone/my-model").endswith("/someone/my-model")
    assert hub.committed == contents(folder)


@pytest.mark.parametrize(
    ("refusals", "line"),
    [
        ({"create": 401}, "the Hub does not accept the token (401); log in with 'hf auth login' or set HF_TOKEN to a"),
        ({"create": 403}, "the token may not write to a/b (403); give it the right to write, or another repository; "),
        ({"create": 418}, "the Hub answered 418 (said the fake hub); nothing was uploaded. The folder '"),
        ({"preupload": 403}, "the token may not write to a/b (403); give it the right to write, or another repository"),
        ({"commit": 401}, "the Hub does not accept the token (401)"),
        ({"commit": 404}, "there is no a/b that the token may see (404); the repository a/b is there, but no commit"),
        ({"batch": 403}, "the token may not write to a/b (403)"),
        ({"/upload/": 403}, "http://127.0.0.1:"),
    ],
)
def test_a_refusal_takes_one_line_and_claims_nothing(
    refusals: dict[str, int], line: str, hub: FakeHub, folder: Path
) -> None:
    hub.refusals = refusals
    with pytest.raises(UserError) as error:
        push_folder(folder, "a/b")
    assert str(error.value).startswith(f"push_to_hub: {line}")
    assert str(error.value).endswith(f"is complete; upload it later with: hf upload a/b '{folder}'")
    assert ("nothing was uploaded" in str(error.value)) == ("create" in refusals)
    assert "\n" not in str(error.value)
    assert TOKEN not in str(error.value)
    assert hub.committed == {}


def test_a_network_that_is_down_is_said(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as closed:
        port = closed.server_address[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(UserError, match=rf"127\.0\.0\.1:{port} could not be reached .*; nothing was uploaded\."):
        push_folder(folder, "a/b")


def test_the_other_protocol_of_large_files_fails_in_one_line_too(
    hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.refusals = {"xet-write-token": 403, "/info/lfs": 403}
    with pytest.raises(UserError, match="no commit was confirmed"):
        push_folder(folder, "a/b")
    assert hub.committed == {}


@pytest.mark.parametrize("name", ["", "a/b/c", "a b/c", "/a", "a/", "../up", "-a/b", "a" * 100, "a\nb/c", "~/model"])
def test_a_name_that_the_hub_cannot_have_is_refused_before_anything_is_done(name: str, hub: FakeHub) -> None:
    with pytest.raises(UserError, match=r"push_to_hub is .*; expected owner/name or name"):
        check_repository(name)
    assert hub.tokens == set()


def test_no_token_is_said_before_anything_is_done(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_repository("a/b")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError, match=r"no token of the Hub was found; log in with 'hf auth login' or set HF_TOKEN"):
        check_repository("a/b")


def test_offline_is_said(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        check_repository("a/b")


def test_export_uploads_the_model_with_its_card(
    hub: FakeHub,
    make_model: Callable[..., PreTrainedModel],
    word_tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model("llama")
    packed = pack_model("policy.", model, word_tokenizer) | {"module": "SFTModule"}
    weights = {f"policy.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": weights, CHECKPOINT_KEY: packed}, "last.ckpt")
    command = ["export", "--ckpt=last.ckpt", "--output=out", "--push_to_hub=someone/tea"]
    assert main([*command, "--private=true"]) == 0
    assert hub.committed == contents(Path("out"))
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= set(hub.committed)
    assert b'path = "someone/tea"' in hub.committed["README.md"]
    assert "private" in json.dumps(hub.created)
    assert capsys.readouterr().out == f"model written to out\nuploaded to {hub.endpoint}/someone/tea\n"
    hub.refusals = {"create": 403}
    assert main([*command[:2], "--output=again", *command[3:]]) == 2
    captured = capsys.readouterr()
    assert captured.out == "model written to again\n"
    assert "error: push_to_hub: the token may not write to someone/tea (403)" in captured.err
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main([*command[:2], "--output=never", *command[3:]]) == 2
    assert not Path("never").exists()


def test_endpoint_and_token_of_the_environment_are_honoured(hub: FakeHub, folder: Path) -> None:
    script = "import sys; from rlhf_lightning.hub import *; check_repository('a/b'); push_folder(sys.argv[1], 'a/b')"
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_of-the-shell", "HF_HUB_DISABLE_XET": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | settings
    subprocess.run([sys.executable, "-c", script, str(folder)], env=environment, check=True, capture_output=True)
    assert hub.committed == contents(folder)
    assert hub.tokens == {"Bearer hf_of-the-shell"}
