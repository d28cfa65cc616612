"""A run's files: the record, the state that --resume goes on from, and what the run reads."""

import contextlib
import glob
import hashlib
import json
import os
from pathlib import Path

import torch

import gpt
from data import UserError
from training.options import flag


class Files:
    """out/dpo.pt is the checkpoint, out/dpo.jsonl the record, out/dpo.state the training state."""

    def __init__(self, out):
        self.out, stem = out, out.removesuffix(".pt")
        self.record_path, self.state_path = f"{stem}.jsonl", f"{stem}.state"
        self.lines = []  # of the record
        self.digests = {}  # of the files that the run reads
        if out.endswith((".jsonl", ".state", ".gz", "/")) or os.path.isdir(out):
            raise UserError(f"--out {out} is no place for a checkpoint; give a path like {stem}.pt")
        try:
            os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
            remove_half_written(Path(out))
            with open(f"{out}.{os.getpid()}.tmp", "w") as file:
                os.unlink(file.name)
        except OSError as e:
            why = f"cannot be written ({e.strerror}); give another path"
            raise UserError(f"--out {out} {why}") from None

    def reads(self, path, may_change=False):
        """Notes a file that is read: it must not be overwritten, nor change under --resume."""
        written = (self.out, self.record_path, self.state_path)
        if path and os.path.realpath(path) in map(os.path.realpath, written):
            words = f"--out {self.out} would overwrite {path}, which this run reads"
            raise UserError(f"{words}; give another path")
        if os.path.isfile(path) and not may_change:
            digest = hashlib.sha256()
            with open(path, "rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
            self.digests[path] = digest.hexdigest()

    # ---- the record

    def begin(self):
        """Opens the record, with the lines that a resumed run has already."""
        self.file = open(self.record_path, "wb", buffering=0)
        self.file.write("".join(self.lines).encode())

    def record(self, line):
        """One write a line, so that a killed run leaves whole lines."""
        self.lines.append(json.dumps(line) + "\n")
        self.file.write(self.lines[-1].encode())

    # ---- the state

    def save(self, state):
        gpt.write(state | {"files": self.digests, "lines": self.lines}, self.state_path)

    def load(self, options, device):
        """-> the saved state of a run of these options, whose files have not changed since"""
        try:
            state = torch.load(self.state_path, map_location=device, weights_only=True)
            saved = state["options"]
        except Exception as e:  # torch raises a zoo of types for a broken file
            why = f"is no whole training state ({type(e).__name__}); start without --resume"
            raise UserError(f"{self.state_path} {why}") from None
        if saved != options:
            had = f"the interrupted run had {others(saved, options)}"
            raise UserError(f"--resume: {had}; give the same options, or start without --resume")
        if state["files"] != self.digests:
            changed = min(path for path, _ in state["files"].items() ^ self.digests.items())
            when = "has changed since the run began; start without --resume"
            raise UserError(f"--resume: {changed} {when}")
        self.lines = state["lines"]
        return state

    def past(self, method, options):
        """-> the closing figures of this very run, where it has ended, else None. A run that was
        begun again has not: it has a state, or no such figures yet. The checkpoint of another run
        in its place is a mistake."""
        if self.interrupted():
            return None
        try:
            meta = torch.load(self.out, map_location="cpu", weights_only=True)["meta"]
            found = meta["method"], meta["options"]
            final = json.loads(Path(self.record_path).read_text().splitlines()[-1])["final"]
        except Exception:  # whatever stands at --out, it is no finished run
            return None
        if found != (method, options):
            other = (
                f"with {others(found[1], options)}" if found[0] == method else f"of {found[0]}.py"
            )
            remedy = "start without --resume, or give another --out"
            raise UserError(f"--resume: {self.out} is a finished run {other}; {remedy}")
        return final

    def interrupted(self):
        return os.path.exists(self.state_path)

    def drop_state(self):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.state_path)

    def forget(self):
        """Takes away an earlier run's record and state, which are not to be gone on with."""
        self.drop_state()
        Path(self.record_path).unlink(missing_ok=True)


def others(saved, options):
    """The options of a saved run that are not these, as text"""
    differing = [f"{flag(k)} {x}" for k, x in saved.items() if x != options.get(k)]
    return ", ".join(differing) or "other options"


def remove_half_written(out):
    """Removes the temporary files beside `out` whose process is gone."""
    for path in out.absolute().parent.glob(glob.escape(out.stem) + ".*.tmp"):
        with contextlib.suppress(ValueError, PermissionError):
            try:
                os.kill(int(path.name.split(".")[-2]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
