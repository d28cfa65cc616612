"""Models named by their ids on a hub: which options accept one, which files are fetched, and the
message if none can be fetched. The hub is a small server on this machine."""

import http.server
import io
import json
import os
import socket
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT, main
from folders import folder
from test_distributed import torchrun

from data import UserError
from hf import hub
from training import checkpoint, fetch, parse

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHERS = ("README.md", "pytorch_model.bin", "onnx/model.onnx", "consolidated.safetensors")


class Hub(http.server.BaseHTTPRequestHandler):
    """The model tiny/model, as its folder has it, in the branch main and in "old"."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.seen.append(f"{self.command} {self.path}")
        top = self.server.folder
        sizes = {str(x.relative_to(top)): x.stat().st_size for x in top.rglob("*") if x.is_file()}
        match self.path.partition("?")[0].strip("/").split("/"):
            case ["api", "models", "tiny", "model", "tree", *_]:
                found = [{"type": "file", "path": x, "size": sizes[x], "oid": x} for x in sizes]
                self.send(json.dumps(found).encode())
            case ["api", "models", "tiny", "model", "revision", "new"]:
                self.send(b"{}", 404, {"X-Error-Code": "RevisionNotFound"})
            case ["api", "models", "tiny", "model", *_]:
                facts = {"id": "tiny/model", "sha": COMMIT}
                facts["siblings"] = [{"rfilename": x} for x in sizes]
                self.send(json.dumps(facts).encode())
            case ["tiny", "model", "resolve", _, *name]:
                text = (top / "/".join(name)).read_bytes()
                self.send(text, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{name[-1]}"'})
            case _:
                self.send(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def send(self, text, code=200, facts=()):
        self.send_response(code)
        for name, x in {"Content-Length": str(len(text)), **dict(facts)}.items():
            self.send_header(name, x)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(text)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A hub with tiny/model, and an empty cache. -> the requests that it has seen"""
    made = folder(tmp_path / "served")
    for name in OTHERS:
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text("x")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.seen = made, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settle(monkeypatch, tmp_path, f"http://127.0.0.1:{server.server_port}")
    yield server.seen
    server.shutdown()
    server.server_close()


def settle(monkeypatch, folder, endpoint, **more):
    """Sets the environment that huggingface_hub reads when it is imported."""
    (folder / "here").mkdir(exist_ok=True)
    monkeypatch.chdir(folder / "here")
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    for name, x in (env | more).items():
        monkeypatch.setenv(name, x)
    monkeypatch.setenv("NO_PROXY", "*")
    for name in [x for x in sys.modules if x.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)


def asked_for(seen):
    return {path.rpartition("/")[2] for path in seen if "/resolve/" in path}


def asked_in_full(seen, name):
    return sum(path.startswith("GET") and path.endswith(f"/{name}") for path in seen)


def test_an_id_is_what_no_path_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine/model").mkdir(parents=True)
    yes = "Qwen/Qwen2.5-0.5B", "a/b", "a/b@refs/pr/1", "a/b@v1.0", "ptx/model.pts"
    no = (
        "mine/model",
        "mine/other",
        "a",
        "a/b/c",
        "./a/b",
        "../b",
        "/a/b",
        "~/b",
        "a/b.pt",
        "a/",
    )
    no += "a/b.jsonl", "a/b.jsonl.gz", "a/b.py:f", "task", "rm", "a/b c", "a/b@", "a/b.safetensors"
    assert [x for x in (*yes, *no) if hub.is_id(x)] == [*yes]


def test_a_model_is_fetched_once_and_what_is_not_read_is_left_there(served, capsys):
    path = fetch.path_of(["tiny/model", "none.pt"], "model")[0]
    texts = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert asked_for(served) == {*texts, "model.safetensors"}
    assert f"tiny/model: {path}" in capsys.readouterr().out
    model, tokenizer, meta = checkpoint.load(path)
    assert meta["task"] == tokenizer.name == "model"
    del served[:]
    assert fetch.path_of("tiny/model@old", "model") == path and not asked_for(served)


def test_of_a_prediction_the_config_alone_is_fetched(served, monkeypatch):
    fetch.path_of("tiny/model", "config")
    assert asked_for(served) == {"config.json"}


def test_what_was_fetched_is_read_without_a_network(served, monkeypatch, tmp_path, capsys):
    path = fetch.path_of("tiny/model", "model")
    for endpoint, more, why in (
        ("http://127.0.0.1:1", {}, "onnect"),
        (os.environ["HF_ENDPOINT"], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ):
        settle(monkeypatch, tmp_path, endpoint, **more)
        del served[:]
        assert fetch.path_of("tiny/model", "model") == path and not served
        said = capsys.readouterr().out
        assert "as it was fetched before (" in said and why in said


MISTAKES = [
    ("tiny/none", "", {}, "the hub has no public model of that name"),
    ("tiny/model", "new", {}, "it has no such revision"),
    ("tiny/model", "", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
    ("tiny/model", "", {"HF_ENDPOINT": "http://127.0.0.1:1"}, "onnect"),
]


@pytest.mark.parametrize("name, revision, env, why", MISTAKES)
def test_a_model_that_cannot_be_fetched_is_one_line(
    name, revision, env, why, served, monkeypatch, tmp_path, capsys
):
    settle(monkeypatch, tmp_path, os.environ["HF_ENDPOINT"], **env)
    given = f"{name}@{revision}" if revision else name
    assert main("dpo", "--init", given, "--lr", 1) == 2
    said, revision = capsys.readouterr().err, f" --revision {revision}" if revision else ""
    assert said.count("\n") == 1 and f"dpo.py: {given}: no such path here" in said and why in said
    assert f"; hf download {name}{revision} --local-dir FOLDER" in said


TAKEN = """
dpo --init
dpo --reference
sft --init
grpo --reward
rlaif --judge
evaluate
evaluate --reference
evaluate --reward
export
compare --predict
chat
"""


@pytest.mark.parametrize("command", TAKEN.split("\n")[1:-1])
def test_an_option_that_names_a_model_takes_its_id(command, monkeypatch):
    """A path of another kind stays as it is."""
    script, *option = command.split()
    other = ["a.pt"] if script == "evaluate" and option else []
    seen = []

    def fetched(name, files):
        seen.append(files)
        return "folder" if name == "tiny/model" else name

    monkeypatch.setattr(hub, "fetch", fetched)
    module = import_module(script)
    presets = getattr(module, "PRESETS", None)
    o = parse(module.Options, [*other, *option, "tiny/model"], presets)
    assert "folder" in [*vars(o).values(), *getattr(o, "checkpoints", [])]
    assert seen == [hub.CONFIG if "--predict" in option else hub.MODEL]
    o = parse(module.Options, [*other, *option, "tiny/model.pt"], presets)
    assert len(seen) == 1


def test_a_model_of_a_hub_talks(served, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the day"))
    assert main("chat", "tiny/model", "--device", "cpu", "--max-new-tokens", 2) == 0
    assert asked_in_full(served, "model.safetensors") == 1


@pytest.mark.slow
def test_of_two_processes_one_fetches(served):
    how = "--prompt", "the day", "--device", "cpu", "--max-new-tokens", 2
    torchrun(".", ROOT / "evaluate.py", "tiny/model", *how)
    assert asked_in_full(served, "model.safetensors") == 1
    said = torchrun(".", ROOT / "evaluate.py", "tiny/none", *how, code=1)
    assert said.count("evaluate.py: tiny/none: no such path here") == said.count("tiny/none:") == 1


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settle(monkeypatch, tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}")
        import huggingface_hub.hf_api  # noqa: F401

        begun = time.time()
        with pytest.raises(UserError, match="cannot be downloaded .no answer within"):
            hub.fetch("tiny/model")
    assert time.time() - begun < 5


def test_without_the_package_the_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="to download it, pip install -r requirements-hf.txt; or"):
        hub.fetch("tiny/model")


def test_a_folder_of_the_cache_has_the_id_of_its_model(tmp_path):
    """Which exported adapters name as their base: another machine has no such folder."""
    cached = tmp_path / "models--tiny--a-model" / "snapshots" / "0123abc"
    assert (hub.id_of(cached), hub.name_of(cached)) == ("tiny/a-model", "a-model")
    mine = tmp_path / "models--tiny--mine"
    assert (hub.id_of(mine), hub.name_of(mine)) == ("", "models--tiny--mine")
