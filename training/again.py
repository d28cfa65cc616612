"""A trained checkpoint, opened again to be measured: for evaluate.py and analysis.optima."""

import os
from types import SimpleNamespace

import data
from data import UserError
from training import checkpoint
from training.device import Compute

# options for a Hugging Face folder, which none of these scripts has trained
FOLDER = {"block_size": 0, "truncate": False, "eval_file": "", "eval_prompts": 512}


class Again(Compute):
    """A trained checkpoint, opened again to be measured."""

    def __init__(self, o):
        super().__init__(o)
        policy, self.tokenizer, self.meta = checkpoint.load(o.checkpoint, mapped=True)
        self.policy = self.freeze(self.place(policy, frozen=True))
        self.models = {"policy": self.policy}
        self.trained = SimpleNamespace(**FOLDER | self.meta["options"])
        self.block_size = self.trained.block_size or policy.config.block_size
        self.reference = self._find_reference()
        self.baseline = self.reference
        o.max_new_tokens = o.max_new_tokens or self.meta["max_new_tokens"]
        o.truncate = o.truncate or self.trained.truncate
        o.eval_prompts = o.eval_prompts or self.trained.eval_prompts

    def _find_reference(self):
        path, moved = self.o.reference, ""
        if not path and self.meta["reference"]:
            path = self.meant(self.meta["reference"])
            moved = os.path.join(os.path.dirname(self.o.checkpoint), os.path.basename(path))
            path = path if os.path.exists(path) else moved  # beside the checkpoint, if that moved
        if not path or not os.path.exists(path) and not self.o.reference:
            missing = f" ({path} is missing)" if path else ""
            left_out = "win rate and KL are not reported; give one with --reference"
            print(f"no reference checkpoint{missing}: {left_out}")
            return ""
        model, tokenizer, _ = checkpoint.load(path)
        if tokenizer.vocabulary != self.tokenizer.vocabulary:
            words = f"{path} has another vocabulary than {self.o.checkpoint}"
            raise UserError(f"{words}; give another --reference")
        self.block_size = min(self.block_size, model.config.block_size)
        return path

    def meant(self, path):
        """A path as the checkpoint recorded it, from its folder -> the path from here. A name that
        is no file stays as it is."""
        if not path or path in ("task", "rm") or data.kind(path) in data.BUILT_IN:
            return path
        folder = os.path.dirname(os.path.realpath(self.o.checkpoint))
        return os.path.relpath(os.path.join(folder, self.meta["folder"], path))

    def reads(self, path, part, known_by=""):
        """Does nothing: this writes no file that could be a file it reads."""

    def keep(self):
        """Does nothing: this trains no weights that could be lost."""

    def stage(self, method, part):
        return checkpoint.default_path(self.o.task, method)
