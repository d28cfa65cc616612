"""Fetches models of a hub by their ids, such as HuggingFaceTB/SmolLM2-135M-Instruct. No other file
of these scripts downloads anything.

An id is owner/name or owner/name@revision. It is taken for an id if there is no folder `owner` here
and if it does not end like the name of a file. Only the files that these scripts read are fetched,
into the cache of huggingface_hub, whose environment variables apply: HF_ENDPOINT, HF_HUB_OFFLINE,
HF_HOME.
"""

import os
import re
import threading
from pathlib import Path

from data import UserError, say

ID = re.compile(r"([A-Za-z0-9][\w.-]*)/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
FILES = r"\.(pt|pth|bin|gguf|safetensors|jsonl?|gz|state|py|txt|tiktoken|tmp)$"
CONFIG = ("config.json",)
TEXTS = (  # the small files of a model that these scripts read
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
MODEL = (*TEXTS, "model*.safetensors", "model.safetensors.index.json", "adapter_*")
INSTALL = "pip install -r requirements-hf.txt"
PATIENCE = 8.0  # seconds to wait for a hub that does not answer


def is_id(path):
    """Whether an option's value is the id of a model and not a path"""
    found = ID.fullmatch(path)
    return bool(found) and not (
        os.path.exists(path) or os.path.isdir(found[1]) or re.search(FILES, path)
    )


def fetch(path, files=MODEL):
    """-> the folder in the cache with the files of a model. Missing files are downloaded."""
    name, _, revision = path.partition("@")
    command = f"hf download {name}{f' --revision {revision}' * bool(revision)} --local-dir FOLDER"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # it is read at the import
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        needs = f"{path}: no such path here; to download it, {INSTALL}"
        raise UserError(f"{needs}; or fetch it elsewhere with {command}") from None
    how = {"revision": revision or None, "allow_patterns": list(files)}
    why = unreachable(name, revision)
    try:
        folder = snapshot_download(name, **how, local_files_only=bool(why))
    except Exception as e:  # whatever the network, the hub and the disk may do
        why = why or reason(e)
        words = f"{path}: no such path here, and it cannot be downloaded ({why})"
        raise UserError(f"{words}; {command} fetches it where that works") from None
    say(f"{path}: {folder}" + f", as it was fetched before ({why})" * bool(why))
    return folder


def unreachable(name, revision):
    """-> why the hub does not give facts of a model within PATIENCE seconds; "" if it does"""
    from huggingface_hub import HfApi

    found = [f"no answer within {PATIENCE:g} s"]

    def look():
        try:
            HfApi().model_info(name, revision=revision or None, timeout=PATIENCE + 1)
            found[0] = ""
        except Exception as e:
            found[0] = reason(e)

    thread = threading.Thread(target=look, daemon=True)  # a name server may take longer
    thread.start()
    thread.join(PATIENCE)
    return found[0]


def reason(e):
    """-> an error of huggingface_hub in a few words"""
    from huggingface_hub import errors

    if isinstance(e, errors.GatedRepoError):
        return "its terms have to be accepted on its page, and hf auth login run here"
    if isinstance(e, errors.RevisionNotFoundError):
        return "it has no such revision"
    if isinstance(e, errors.RepositoryNotFoundError):
        return "the hub has no public model of that name"
    if isinstance(e, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    return str(e).strip().partition("\n")[0] or type(e).__name__


def id_of(folder):
    """-> the id, owner/name, of the model in a folder of the cache; "" for other folders"""
    above = Path(os.path.abspath(folder)).parent
    cached = above.name == "snapshots" and above.parent.name.startswith("models--")
    return "/".join(above.parent.name.split("--")[1:]) if cached else ""


def name_of(folder):
    """-> the name of a model's folder; in the cache, that of the model"""
    return os.path.basename(id_of(folder) or os.path.abspath(folder))
