"""Protects the user's files: these scripts replace only files that they wrote, or empty ones."""

import os
import re

from data.error import UserError

HEADS = {  # the end of a path -> the beginning of files that these scripts write there
    ".pt": rb"PK.*nanopo",
    ".state": rb"PK.*nanopo",
    ".jsonl": rb'\{"method": "[\w-]+", "task": ".*?", "options": \{',
    ".md": rb"# python compare\.py",
    ".json": rb'\{\s*"(command": "python )?compare\.py',
    ".html": rb".*compare\.py",
    ".png": rb".*nanopo",
    ".lock": rb"(?!)",  # it is empty
    ".tiktoken": rb"[\w+/]+=* \d+\n",
}


def refuse_others(option, path, kind=""):
    """Raises UserError if there is a file at `path` that these scripts did not write; an empty file
    may be replaced. option: where the path comes from. kind: an end of the path that determines the
    kind of the file, if its own does not"""
    path = str(path)
    try:
        with open(path, "rb") as file:
            head = file.read(1000)
    except FileNotFoundError:
        return
    except OSError:  # a folder, or what may not be read
        head = b"?"
    wanted = HEADS.get(kind or os.path.splitext(path)[1], HEADS[".pt"])
    if head and not re.match(wanted, head, re.DOTALL):
        refuse(option, path)


def refuse(option, path):
    why = f"would overwrite {path}, which these scripts did not write"
    raise UserError(f"{option} {why}; move it, or give another path")
