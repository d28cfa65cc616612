"""A run's files: its record, the state that --resume goes on from, and the files that it reads."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import subprocess
import time
from pathlib import Path

import torch

import gpt
from data import Stopped, UserError
from data.ours import refuse_others
from training import distributed, locks
from training.logger import Logger
from training.options import flag


def logger(log_to, method, out):
    """-> the logger that --log-to names, which also gets the record's lines; without --log-to one
    that does nothing"""
    if not log_to:
        return Logger(method, out)
    from training.loggers import LOGGERS

    return LOGGERS[log_to](method, out)


class Files:
    """out/dpo.pt is the checkpoint, out/dpo.jsonl the record, out/dpo.state the training state. If
    there are many processes, only the first one writes."""

    def __init__(self, out, logger, keeps=False):
        """keeps: whether checkpoints of earlier steps are written too"""
        self.logger = logger  # takes the record's lines too
        self.out, stem = out, out.removesuffix(".pt")
        self.record_path, self.state_path = f"{stem}.jsonl", f"{stem}.state"
        self.written = [out, self.record_path, self.state_path]
        self.written += glob.glob(f"{glob.escape(stem)}-{6 * '[0-9]'}.pt") if keeps else []
        self.lines = []  # of the record
        self.paths, self.digests = {}, {}  # of the files that the run reads, by their part in it
        taken = os.path.exists(out) and not os.path.isfile(out)  # a folder, /dev/null
        if out.endswith((".jsonl", ".state", ".gz", "/")) or taken:
            raise UserError(f"--out {out} is no place for a checkpoint; give a path like {stem}.pt")
        if not distributed.is_first:
            return
        try:
            os.makedirs(os.path.dirname(os.path.realpath(out)), exist_ok=True)
            for path in self.written:
                refuse_others(f"--out {out}", path)
                path = os.path.realpath(path)
                with open(f"{path}.{os.getpid()}.tmp", "w") as file:
                    os.unlink(file.name)
                if os.path.exists(path) and not os.access(path, os.W_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
            locks.take_or_refuse(out)
        except OSError as e:
            why = f"cannot be written ({e.strerror or e}); give another path"
            raise UserError(f"--out {out} {why}") from None
        remove_half_written(Path(os.path.realpath(out)))
        self._drop_parts()

    def reads(self, path, part, known_by=""):
        """Notes a file that the run reads: the run must not overwrite it, and --resume needs it
        unchanged, though its path may change. part: its part in the run, such as "init". known_by:
        what --resume compares instead of the content, if the user may correct the file."""
        if path and os.path.realpath(path) in map(os.path.realpath, self.written):
            words = f"--out {self.out} would overwrite {path}, which this run reads"
            raise UserError(f"{words}; give another path")
        if os.path.isfile(path) or is_model_folder(path):
            self.paths[part] = path
            self.digests[part] = known_by or (digest(path) if distributed.is_first else "")
            distributed.wait()  # so that all processes find a mistake in it at once

    # ---- the record

    def begin(self, options):
        """Opens the record. In a resumed run it has lines already."""
        if not distributed.is_first:
            return
        self.logger.begin(options, [json.loads(line) for line in self.lines])
        with self.writes(self.record_path):
            self.file = open(self.record_path, "wb", buffering=0)
            self.file.write("".join(self.lines).encode())

    def record(self, line):
        """Writes each line at once, so that a killed run or a full disk leaves only whole lines."""
        self.lines.append(json.dumps(line) + "\n")
        if not distributed.is_first:
            return
        text, place = self.lines[-1].encode(), self.file.tell()
        with self.writes(self.record_path):
            if self.file.write(text) < len(text):
                self.file.truncate(place)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.logger.take(line)

    @contextlib.contextmanager
    def writes(self, path):
        """If a file cannot be written, ends the run with one line that says what is complete."""
        try:
            yield
        except OSError as e:
            kept = f"; {self.state_path} is complete, and --resume goes on from it"
            kept = kept if self.interrupted() else ""
            raise Stopped(f"{path} cannot be written ({e.strerror or e}){kept}") from None

    # ---- the state

    def save(self, state):
        """Called within `writes`. Once the new state is written, the folder of parts that an older
        state named is not needed any more."""
        distributed.saved = self.state_path
        if distributed.is_first:
            state = {"nanopo": "state"} | state | {"files": self.digests, "lines": self.lines}
            gpt.write(state, self.state_path)
            self._drop_parts()

    def _drop_parts(self):
        """Removes the folders of parts that no state names."""
        if glob.glob(f"{glob.escape(self.state_path)}.parts-*"):
            from training import parts

            parts.drop(self.state_path)

    def load(self, method, options):
        """-> the saved state. Raises UserError if a run with other options saved it, or if a file
        that the run read has changed. Its tensors stay in the file until they are read."""
        where = {"map_location": "cpu", "mmap": True}
        try:
            state = torch.load(self.state_path, weights_only=True, **where)
            if "parts" in state:
                from training import parts

                state = parts.opened(state, self.state_path)
            differ = self._differs(state, method, options)
        except Exception as e:  # torch raises many types of error for a broken file
            why = f"is not a complete training state ({type(e).__name__}); start without --resume"
            raise UserError(f"{self.state_path} {why}") from None
        self._refuse(f"{self.state_path} belongs to an interrupted run", differ)
        self.lines = state["lines"]
        distributed.saved = self.state_path
        return state

    def past(self, method, options):
        """-> the closing figures of this very run if it has finished, else None. A run that began
        again has not finished: it has a state, or no closing figures yet. Raises UserError if --out
        is the checkpoint of another run."""
        if self.interrupted():
            return None
        try:
            meta = torch.load(self.out, map_location="cpu", weights_only=True)["meta"]
            differ = self._differs(meta, method, options)
            final = json.loads(Path(self.record_path).read_text().splitlines()[-1])["final"]
        except Exception:  # whatever --out is, it is no finished run
            return None
        self._refuse(f"{self.out} belongs to a finished run", differ)
        return final

    def replaces(self, method, options):
        """-> a description of the other run's checkpoint that this run replaces, or "" """
        try:
            file = torch.load(self.out, map_location="cpu", weights_only=True, mmap=True)
            differ = self._differs(file["meta"], method, options)
            made = time.strftime("%Y-%m-%d %H:%M", time.localtime(os.path.getmtime(self.out)))
        except Exception:  # there is none, or it is not complete
            return ""
        words = f"replaces {self.out}: a run {differ}, of {made}"
        return differ and f"{words}; --name or --out keeps both"

    def _differs(self, saved, method, options):
        """-> how a saved run differs from this one, or "". If both have read a file for an option,
        its content is compared, not its path."""
        if saved["method"] != method:
            return f"of {saved['method']}.py"
        files, both = saved["files"], self.digests.keys() & saved["files"].keys()
        differ = [
            f"{flag(k)} {x}"
            for k, x in saved["options"].items()
            if k not in both and x != options.get(k)
        ]
        if differ:
            return f"with {', '.join(differ)}"
        changed = [part for part, x in self.digests.items() if x and x != files.get(part)]
        return f"that read another {self.paths[changed[0]]}" if changed else ""

    def _refuse(self, what, differ):
        if differ:
            remedy = "start without --resume, or give another --out"
            raise UserError(f"--resume: {what} {differ}; {remedy}")

    def interrupted(self):
        return os.path.exists(self.state_path)

    def drop_state(self):
        with contextlib.suppress(FileNotFoundError):
            if distributed.is_first:
                os.unlink(self.state_path)
                self._drop_parts()

    def forget(self):
        """Removes an earlier run's record and state, so that nothing resumes them."""
        self.drop_state()
        if distributed.is_first:
            Path(self.record_path).unlink(missing_ok=True)


def is_model_folder(path):
    """Whether a path is a folder with a checkpoint, or with adapters of one"""
    names = "config.json", "adapter_config.json"
    return any(os.path.isfile(os.path.join(path, name)) for name in names)


def digest(path):
    """-> the digest of a file's content, or of those files in a checkpoint's folder that are read;
    "" if there is neither"""
    if is_model_folder(path):
        from hf import peft, weights

        return (peft if peft.holds(path) else weights).digest(path, digest)
    if not os.path.isfile(path):
        return ""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def remove_half_written(out):
    """Removes the temporary files of earlier runs with this --out. Its lock shows that these have
    ended."""
    name = re.escape(out.name.removesuffix(".pt"))
    ours = re.compile(name + r"((-\d{6})?\.pt|\.state|\.jsonl)?\.\d+\.tmp")
    for path in out.parent.iterdir():
        if ours.fullmatch(path.name):
            path.unlink(missing_ok=True)


def from_checkpoint(out):
    """-> the relative path from the checkpoint's folder to the working folder, where the paths of
    the run start"""
    try:
        return os.path.relpath(os.getcwd(), os.path.dirname(os.path.realpath(out)))
    except ValueError:  # on another drive
        return os.getcwd()


def commit():
    """-> the git commit of these scripts, or "" if they are no repository of their own"""
    folder = Path(__file__).absolute().parent.parent
    env = {name: x for name, x in os.environ.items() if not name.startswith("GIT_")}
    with contextlib.suppress(OSError):
        command = ["git", "-C", folder, "rev-parse", "--show-toplevel", "HEAD"]
        found = subprocess.run(command, capture_output=True, text=True, env=env).stdout.splitlines()
        if len(found) == 2 and folder.samefile(found[0]):
            return found[1]
    return ""
