"""What a student needs: its teacher, both distributions at its states, and given answers.

load        the student, to be trained, and the teacher, frozen
compared    f(log π_θ, log π_T) at the states of a batch, one chunk of logits at a time
Answers     the rows' own answers, as rows of a rollout
"""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

import data
from data import UserError
from gpt import scatter
from training import checkpoint, distributed
from training.placement import full
from training.sampling import Rollout

# bytes of a table of log-probs, of which a chunk makes about eight
TABLE = {"cpu": 2**24, "cuda": 2**28, "mps": 2**28}


def load(run, task, path):
    """-> (the student, to be trained; the teacher, frozen). path: that of the teacher, or "" for
    the checkpoint that ppo.py writes. Without --init the student is an SFT model of half the
    teacher's width. Raises UserError if their vocabularies differ."""
    if data.kind(run.o.task) == "file" and not (run.o.init and path):
        both = "the student, --init, and its teacher, --teacher, are needed"
        raise UserError(f"{both} with a file as the task; give both")
    path = path or run.stage("ppo", "teacher")
    teacher, tokenizer, meta = checkpoint.load(path, mapped=True)
    half = "--name", "half", "--n-embd", str(teacher.config.n_embd // 2)
    policy = run.load(run.o.init or run.stage("sft-half", "init", *half), task)
    sizes = teacher.config.vocab_size, policy.config.vocab_size
    if tokenizer.vocabulary != run.tokenizer.vocabulary or sizes[0] != sizes[1]:
        words = f"has another vocabulary ({sizes[0]} tokens) than {run.start} ({sizes[1]})"
        raise UserError(f"--teacher {path} {words}; give one with the same tokens")
    if teacher.config.block_size < run.block_size:
        words = f"has a context of {teacher.config.block_size}, but the student needs"
        raise UserError(f"--teacher {path} {words} {run.block_size}; set --block-size")
    data.say(f"{path} is the teacher: {checkpoint.describe(meta)}")
    return policy, run.freeze(run.place(teacher, frozen=True))


# ---- both distributions
#
#     h (M, C), W (V, C)      the policy's states and its head; the teacher's may have another width
#     log π_θ, log π_T        (m, V) of a chunk of m states, nats
#
# No table of all states is made. If there is more than one chunk, the backward pass computes each
# chunk again. The teacher has no graph.


def compared(policy, teacher, batch, f, temperature=1.0):
    """-> f(log π_θ, log π_T) at the state before each response token, as a tuple of tables
    (rows, T), 0 off the response. f: two (m, V) tables of log-probs, nats -> a tuple of (m,).
    temperature: that of both distributions"""
    with torch.no_grad():
        states = teacher.read(lambda h, W: h, batch.packed)  # (M, C)
        head = full(teacher.head)
    found = policy.read(_chunks, batch.packed, states, head, f, temperature)
    return tuple(batch.unfold(scatter(x, batch.packed, batch.ids.shape)) for x in found)


def _chunks(h, W, states, head, f, temperature):
    """-> f at all states, a tuple of (M,)"""
    size = max(1, TABLE[h.device.type] // (4 * len(W)))
    chunks = list(zip(h.split(size), states.split(size)))
    at = partial(_at, W=W, head=head, f=f, temperature=temperature)
    if len(chunks) > 1:
        at = partial(recomputed, at, use_reentrant=False, preserve_rng_state=False)
    return tuple(torch.cat(x) for x in zip(*(at(*chunk) for chunk in chunks)))


def _at(h, states, W, head, f, temperature):
    """-> f at a chunk of states, a tuple of (m,)"""
    both = F.linear(h, W), F.linear(states, head)
    wide = torch.promote_types(both[0].dtype, torch.float32)
    return f(*((z.to(wide) / temperature).log_softmax(-1) for z in both))


# ---- given answers


class Answers:
    """The answers in the rows of a task. Raises UserError if the rows have none."""

    def __init__(self, run, task, n):
        """n: the number of prompts per step with given answers, `group` answers for each"""
        o = run.o
        self.device, self.group = run.device, o.group
        how = run.tokenizer, run.block_size, replace(o, batch_size=n * o.group)
        try:
            draw, make = task.demonstrations, distributed.in_one_process
            self.batches = data.Batches(draw, task.size, *how, make)
        except UserError as e:
            raise UserError(f"--answers {o.answers:g} needs the rows' own answers: {e}") from None

    def joined(self, rollout, step, n):
        """-> the rollout joined with the answers to n prompts of this step, whose `own` is False"""
        batch = data.pad(self.batches[step][: n * self.group], self.device)
        ids, mask = batch.unfold(batch.ids), batch.unfold(batch.mask)
        given = {
            "ids": ids,
            "mask": mask,
            "old_logp": None,
            "logp": torch.zeros(mask.shape, device=mask.device),
        }
        own = torch.zeros_like(mask[:, 0])
        return Rollout.cat([rollout, Rollout(**given, finished=~own, own=own)])
