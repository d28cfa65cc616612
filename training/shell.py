"""Runs a script from the shell, so that an error ends it with one line and an exit code."""

import os
import shlex
import sys

import torch

from data import UserError
from training import distributed, locks
from training.process import interrupts, streams


def command(main, argv=None, torchrun=True):
    """Runs main. torchrun: whether main can run as one of many processes"""
    argv = sys.argv[1:] if argv is None else argv
    with interrupts.caught():
        try:
            with streams(), distributed.joined(), locks.given_back():
                if distributed.many and not torchrun:
                    raise UserError("this script runs in one process; start it with python")
                return main(argv)
        except (UserError, OSError, KeyboardInterrupt, RuntimeError, distributed.Lost) as e:
            ended = ending(e, argv)
            if not ended:
                raise
            code, message = ended
            alone = isinstance(e, torch.OutOfMemoryError) or getattr(e, "alone", False)
            by_one = isinstance(e, KeyboardInterrupt)
        interrupts.over |= distributed.many  # while this one waits, torchrun may end it
        if message is not None:
            message = distributed.to_say(message, alone, by_one)
        script = os.path.basename(main.__code__.co_filename)
        if message:
            print(f"{script}: {' '.join(message.split())}", file=sys.stderr)
        if interrupts.depth == 1:  # not inside a run, which still has locks
            distributed.end(code)
        sys.exit(code)


def ending(e, argv):
    """-> (exit code, message) for the error that has ended a script; None if it is a bug. The
    message is "" if another process prints it, and None if nobody is there to read it."""
    match e:
        case UserError():
            return e.code, str(e)
        case torch.OutOfMemoryError():
            remedy = "try a smaller --micro-batch, or --checkpoint-activations; or, with a CUDA"
            remedy += " device, PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment"
            return 1, f"out of memory ({str(e).splitlines()[0]}): {remedy}"
        case BrokenPipeError():  # a reader has left
            return 1, None
        case OSError():
            return 1, f"{e.filename or 'a file'}: {e.strerror or e}"
        case KeyboardInterrupt() if str(e):  # where the state is
            launcher = distributed.launch.words() if distributed.started else ["python"]
            words = [*launcher, sys.argv[0], *argv]
            again = shlex.join([x for x in words if x != "--resume"])
            return 130, f"interrupted; this goes on from {e}: {again} --resume"
        case KeyboardInterrupt():
            return 130, "interrupted"
        case _ if distributed.is_lost(e):
            return 1, ""
