"""Finds the checkpoint that an option names, by its path or by the id of a model on a hub."""

from data import UserError
from hf import hub
from training import distributed


def path_of(name, files):
    """-> the path of a checkpoint, or of each in a list. files: "model", or "config" if only that
    is read. If there are many processes, the first one of each machine fetches the model, and the
    others wait."""
    if isinstance(name, list):
        return [path_of(one, files) for one in name]
    if not hub.is_id(name):
        return name
    folder = None
    try:
        with distributed.agreed():
            if distributed.local == 0:
                folder = hub.fetch(name, hub.CONFIG if files == "config" else hub.MODEL)
    except UserError as e:
        e.alone = False  # one has met it for all
        raise
    folders = distributed.gathered(folder)[: distributed.rank + 1]
    return [folder for folder in folders if folder][-1]
