"""The files that a comparison writes: a report with its pictures, printed too."""

import json
import os
import textwrap
from pathlib import Path

from data.ours import refuse_others


def writes(folder, *names):
    """Refuses, before anything runs, to replace files that these scripts did not write."""
    for name in names:
        refuse_others(f"--out {folder}", folder / name)


def write(path, text):
    path = Path(os.path.realpath(path))  # if it is a link, its target is replaced
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def publish(folder, record, text, pictures, more=(), shown=""):
    """Writes a report and links to its pictures, and prints it. shown: text to print instead"""
    write(folder / "compare.json", json.dumps(record, indent=1))
    links = "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)
    write(folder / "README.md", f"# {record['command']}\n\n{text}\n{links}")
    names = ", ".join([*more, "compare.json", *(path.name for path in pictures)])
    print()
    for paragraph in (shown or text).split("\n\n"):
        table = paragraph.startswith("|")
        print(paragraph if table else textwrap.fill(paragraph, 100), end="\n\n")
    print(f"{folder}/README.md, {names}")
