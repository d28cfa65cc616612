"""What is said of a path where nothing is. Loaded only then."""

import difflib
import os


def missing(path, what="no such file"):
    """-> the message, with the nearest name in the path's folder, if one is near"""
    folder, name = os.path.split(path)
    names = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    near = difflib.get_close_matches(name, names, 1)
    return f"{path}: {what}" + (f"; did you mean {os.path.join(folder, near[0])}?" if near else "")
