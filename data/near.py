"""The message for a path that does not exist. It is loaded only then."""

import difflib
import os


def missing(path, what="no such file"):
    """-> the message, with the most similar name in the folder of the path, if there is one"""
    folder, name = os.path.split(path)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    near = difflib.get_close_matches(name, names, 1)
    return f"{path}: {what}" + (f"; did you mean {os.path.join(folder, near[0])}?" if near else "")
