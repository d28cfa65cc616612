"""One training run: steps, figures, the record. Nothing here appears in an equation."""

import contextlib
import math
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import pad
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

import data
import gpt
from data import Stopped, UserError
from training import checkpoint, distributed, lora, memory, sharding
from training.device import Compute
from training.files import Files, commit, from_checkpoint
from training.loggers import LOGGERS
from training.process import interrupts
from training.state import PARTED, Moments, Weights

# options that cannot change a run's bits, but for --shard, which can by rounding
FREE = ("resume", "log_every", "log_to", "save_every", "out", "shard")
LARGE = 1e6  # a reward above it is named where the loss is not finite
SHOWN = (  # beside the progress bar, where a method logs them
    *("loss", "reward", "rewards/margins", "rewards/accuracies", "accuracy", "margin", "nll_loss"),
    *("kl", "entropy", "explained_variance", "frac_reward_zero_std", "kept_fraction", "lr"),
)


class Run(Compute):
    """
    run = Run("dpo", o)                            refuses what cannot work, before it writes
    policy, tokenizer = run.load(path, task)       a checkpoint on this device
    ref = run.reference(policy)                    π_ref: a frozen copy, in the compute precision
    run.hold(policy=policy, ref=ref)               the models in memory: printed, recorded, saved
    for step in run.steps(batches, optimizer):     progress, record, --resume, Ctrl-C
        for micro in run.micro_batches(rows):
            run.backward((weight * losses).sum(), tokens)
            run.log(metrics, weight)               adds Σ weight · metric to the step's figures
        run.update(optimizer)                      learning rate, clipping, optimizer step
        run.evaluate(evaluator, policy)            every --eval-every steps
    run.finish(evaluator, policy)                  final figures, checkpoint, summary
    """

    def __init__(self, method, o):
        super().__init__(o)
        self.shard, self.compile = o.shard, o.compile
        self.method = method
        o.out = o.out or checkpoint.default_path(o.task, method)
        self.files = Files(o.out, LOGGERS[o.log_to](method, o.out))
        self.generator = torch.Generator().manual_seed(o.seed)  # of samples and minibatches
        self.wall = time.time()
        self.first = self.step = self.updates = self.tokens = self.sampled = 0
        self.start = ""  # the checkpoint that the policy starts from
        self.init = o.reference  # what it is compared with: --reference, or where it starts
        self.counts = True  # what is logged: a stand-in's is not
        self.skipped = 0  # optimizer steps, of gradients too large for float16
        enabled = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)
        self.models, self.sums, self.tracker, self.peak = {}, {}, None, None
        for f in fields(o):
            if f.metadata.get("file"):
                self.reads(getattr(o, f.name), f.name)

    def reads(self, path, part="", may_change=False):
        self.files.reads(path, part, may_change)

    # ---- models: where they live, in what precision

    def stage(self, method):
        """-> the checkpoint of an earlier stage, whose script runs first if it is missing"""
        o, path = self.o, checkpoint.default_path(self.o.task, method)
        self.reads(path, "init" if method == "sft" else "reward")
        if o.init and not Path(path).exists():
            checkpoint.load(o.init)  # a wrong one is told before anything is trained
        return checkpoint.make_if_missing(o.task, method, o.device, o.dtype)

    def load(self, path, task, scalar=False):
        """-> (policy, tokenizer) of a checkpoint; the task takes over its chat template. scalar:
        its trunk alone, with a new head that gives one number."""
        self.reads(path, "init")
        model, tokenizer, meta = checkpoint.load(path, task, mapped=self.shard)
        model = gpt.ScalarGPT(model.config, self.o.seed, trunk=model) if scalar else model
        tokenizer = self.told(tokenizer)
        task.template = meta["template"]
        self.start, self.init = path, self.o.reference or path
        data.say(f"starts from {path}: {checkpoint.describe(meta)}")
        if os.path.isdir(path) and "lr" not in self.o.given and not self.o.lora:
            real = "a pretrained one wants 1e-6 to 1e-5"
            data.say(f"warning: --lr {self.o.lr:g} is made for toy models; {real}")
        return self._take(model, tokenizer)

    def create(self, task):
        """-> (policy, tokenizer) with random weights"""
        o = self.o
        if o.lora:
            raise UserError("--lora adapts a checkpoint; give one with --init, or leave --lora out")
        tokenizer = self.told(data.tokenizer(o.tokenizer, task.tokenizer))
        task.template = data.TEMPLATE
        size = o.block_size or gpt.GPTConfig.block_size
        config = gpt.GPTConfig(tokenizer.size, size, o.n_layer, o.n_head, o.n_embd)
        return self._take(gpt.GPT(config, o.seed), tokenizer)

    def _take(self, model, tokenizer):
        own, wanted = model.config.block_size, self.o.block_size
        if wanted > own:
            words = f"--block-size {wanted} is more than the checkpoint's {own}"
            raise UserError(f"{words}; it may only shorten it")
        self.block_size = wanted or own
        self.tokenizer = tokenizer
        if self.o.reference:
            self.other_reference()  # a wrong one is told before anything is trained
        return self.prepare(model), tokenizer

    def prepare(self, model):
        """-> a model that is to be trained"""
        model.checkpoint_activations = self.o.checkpoint_activations
        return self.spread(self.adapt(self.place(model)))

    def hold(self, **models):
        self.models = {role: model for role, model in models.items() if model is not None}
        self.ledger = memory.records(self.models)
        say(memory.ledger(self.ledger))
        if self.pure:
            say("bfloat16-pure: an update below 1/256 of a weight is rounded away")

    def trained(self):
        """-> the roles of the models that are trained, or whose adapters are"""
        return [m["role"] for m in self.ledger if m["trainable"]]

    def adamw(self, *models):
        """AdamW with betas (0.9, 0.95), weight decay on the matrices only."""
        parameters = [p for model in models for p in model.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.dim() >= 2]
        rest = [p for p in parameters if p.dim() < 2]
        decay = self.o.weight_decay
        groups = [
            {"params": matrices, "weight_decay": decay},
            {"params": rest, "weight_decay": 0.0},
        ]
        fused = self.device.type in ("cpu", "cuda")
        return torch.optim.AdamW(groups, lr=self.o.lr, betas=(0.9, 0.95), fused=fused)

    # ---- forward passes without a graph

    def sample(self, model, questions, longest, group=1, temperature=1.0, generator=None):
        """As above; without a generator the run's own draws, and what is drawn counts."""
        drawn = generator or self.generator
        rollout = super().sample(model, questions, longest, group, temperature, drawn)
        if generator is None:
            self.sampled += int(rollout.mask.sum())
        return rollout

    def logprobs(self, model, rollout, temperature=1.0):
        """-> (N, T) log-probs of all responses of a rollout, a micro-batch at a time"""
        f = partial(model.logprobs, temperature=temperature)
        return self._table(rollout, lambda x: f(x.ids, x.mask, at=x.layout))

    def values(self, critic, rollout):
        """-> (N, T) values of what stands before each response token"""
        return self._table(rollout, lambda x: critic.values_before(x.ids, x.mask, x.layout))

    def _table(self, rollout, f):
        width = rollout.ids.size(1)
        return self.scores(rollout, lambda x: pad(f(x), (0, width - x.ids.size(1))))

    def scores(self, rows, f, size=0):
        return super().scores(rows, f, size or self.o.micro_batch)

    # ---- the loop

    def micro_batches(self, rows):
        """The one place where the rows of an optimizer step are cut, and shared out among the
        processes. What is logged meanwhile is a share, and is summed up at the end."""
        whole = self.sums, self.tokens
        if distributed.many:
            self.sums, self.tokens = {}, 0
        for part, counts in distributed.shares(len(rows), self.o.micro_batch):
            self.counts = counts
            yield rows[part]
        self.counts = True
        if distributed.many:
            found = distributed.total_all(self.sums | {"tokens": self.tokens}, self.device)
            self.sums, self.tokens = whole
            self.tokens += int(found.pop("tokens"))
            for name, x in found.items():
                self.sums[name] = self.sums.get(name, 0.0) + x

    def least(self, tensors):
        """-> the least of them, in all processes"""
        return distributed.total(min(tensors), "MIN")

    def greatest(self, tensors):
        return distributed.total(max(tensors), "MAX")

    def steps(self, batches, optimizer, **state):
        """Yields the number of each step from 0; between two of them the step is recorded, shown
        and saved. batches: the data, whose passes may set the steps. state: what else --resume must
        restore: name = object with state_dict and load_state_dict."""
        o = self.o
        o.steps = o.steps or (o.epochs or 1) * batches.per_epoch
        if data.kind(o.task) == "file" and o.steps < batches.per_epoch:
            part = f"{o.steps * batches.batch_size:,} of {len(batches.rows):,} training rows"
            say(f"{o.steps} steps read {part}; --epochs 1 reads all")
        if data.kind(o.task) == "exact" and "eval_every" not in o.given:
            o.eval_every = max(1, o.steps // 20)
        self.weights_state = {x: Weights(self.models[x]) for x in self.trained()}
        self.weights_state |= {"optimizer": Moments(optimizer)}
        if self.scaler.is_enabled():
            self.weights_state["scaler"] = self.scaler
        self.drawn_state = {"batches": batches} if hasattr(batches, "state_dict") else {}
        self.drawn_state |= state
        self.options = self._options()
        self.forget()
        self.optimizer, self.times, self.spent = optimizer, [], {}
        if not (o.resume and self._resume()):
            self._begin()
        self.tokens_before = self.tokens
        measured = min(self.first + 1, o.steps - 1)  # AdamW's moments are there
        hidden = not (sys.stderr.isatty() and distributed.first)
        bar = tqdm(total=o.steps, initial=self.first, desc=self.method, disable=hidden)
        with bar, interrupts.patient() as interrupted:
            for step in range(self.first, o.steps):
                self.step, self.updates = step, 0
                self.sums, self.logged_in, self.clocks = {}, {}, {}
                self.drawn = self._drawn()
                self.started = time.perf_counter()
                with self._measured() if step == measured else contextlib.nullcontext():
                    yield step
                self.seconds = self.updated - self.started
                if step != measured or step + 1 == o.steps:  # counting bytes takes time
                    self.times.append(self.seconds)
                    for name, seconds in self.clocks.items():
                        self.spent.setdefault(name, []).append(seconds)
                self._end_step(bar)
                stop = distributed.total(bool(interrupted))  # whoever was told so
                if (step + 1) % o.save_every == 0 or step + 1 == o.steps or stop:
                    self._save(step + 1)
                if stop:
                    interrupts.stop(f"step {step + 1}, in {self.files.state_path}")

    def _end_step(self, bar):
        """Records and shows the step's figures."""
        o, done = self.o, self.step + 1
        self.last = {"step": done} | self._figures() | {"step_ms": 1000 * self.seconds}
        if done % o.log_every == 0 or done == o.steps:
            self.files.record(self.last)
            shown = {k.split("/")[-1]: self.last[k] for k in SHOWN if k in self.last}
            text = ", ".join(f"{k} {x:.3g}" for k, x in shown.items())
            bar.set_postfix_str(text)
            tenth = done * 10 // o.steps > (done - o.log_every) * 10 // o.steps
            if bar.disable and not o.eval_every and (tenth or done == o.steps):
                say(f"{self.method} step {done}/{o.steps}: {text}")
        bar.update()

    def backward(self, loss, tokens):
        """tokens: how many of prompt and response the loss was computed on, padding left out"""
        loss = loss if self.counts else 0 * loss
        self.scaler.scale(loss).backward()
        self.tokens += tokens * self.counts

    @torch.no_grad()
    def log(self, metrics, weight=1.0):
        """Adds Σ weight · metric to the step's figures; the weights of a mean sum to 1. What is
        logged in several optimizer steps is averaged over them."""
        for name, x in metrics.items():
            x = weight * x
            x = x.sum() if torch.is_tensor(x) else x
            x = x if self.counts else 0.0
            self.sums[name] = self.sums.get(name, 0.0) + x
            self.logged_in.setdefault(name, set()).add(self.updates)

    def _figures(self):
        """-> the step's figures, as numbers"""
        line = {name: float(x) / len(self.logged_in[name]) for name, x in self.sums.items()}
        if self.scaler.is_enabled():
            line |= {"skipped": self.skipped, "scale": self.scaler.get_scale()}
        return line | ({"sampled_tokens": self.sampled} if self.sampled else {})

    @contextlib.contextmanager
    def clock(self, part):
        """Times a part of the step; the medians stand in the record as <part>_ms."""
        start = self._now()
        if self.tracker:
            self.tracker.during("sampling" if part == "sample" else None)
        yield
        if self.tracker:
            self.tracker.during(None)
        self.clocks[part] = self.clocks.get(part, 0.0) + self._now() - start

    def update(self, optimizer):
        """Learning rate, clipped gradient, optimizer step. Stops at a loss or a gradient that is
        not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.o)
        if not self.shard:  # where it is in the backward pass
            distributed.total_gradients(parameters)
        self.scaler.unscale_(optimizer)
        norm = sharding.full(torch.nn.utils.clip_grad_norm_(parameters, self.o.grad_clip))
        loss = self.sums["loss"]
        if torch.isfinite(norm + loss):
            self.scaler.step(optimizer)
            self.scaler.update()
            self.log({"grad_norm": norm})
        elif self.scaler.is_enabled() and math.isfinite(loss) and self.scaler.get_scale() >= 1:
            self.skipped += 1
            self.scaler.update(self.scaler.get_scale() / 2)
            self.scaler.load_state_dict(self.scaler.state_dict() | {"_growth_tracker": 0})
        else:
            self._give_up(loss, norm)
        optimizer.zero_grad()
        self.log({"lr": group["lr"]})
        self.updates += 1
        if self.tracker:
            self.peak = self.tracker.parts, dict(self.tracker.most)
        elif self.device.type == "cuda":
            self.allocated = torch.cuda.max_memory_allocated(self.device)
        self.updated = time.perf_counter()

    def _give_up(self, loss, norm):
        """Ends the run at figures that are not finite."""
        self.keep()
        path = self.files.state_path
        kept = f"the last good state is kept in {path}" if self.files.interrupted() else "no state"
        found = f"the loss is {float(loss)}, the gradient's norm {float(norm)}; {kept}"
        remedy = "start again with a smaller --lr or a longer --warmup"
        if self.scaler.is_enabled() and math.isfinite(loss):
            found += "; no scale of the loss keeps its gradient within float16"
        if self.largest_reward > LARGE:
            found = f"a reward is as large as {self.largest_reward:.3g}, so {found}"
            remedy = "scale the rewards down, and start again"
        raise Stopped(f"step {self.step + 1}: {found}; {remedy}")

    def cut_short(self, why):
        """Ends the training before this step; where nothing was learned yet, with an error."""
        step = self.step
        if step == 0:
            raise Stopped(why)
        say(f"{why}. The run ends after step {step} of {self.o.steps}, with what it has learned")
        if step > self.first and step % self.o.log_every:
            self.files.record(self.last)
        self.o.steps = step

    def evaluate(self, evaluator, policy):
        """Every --eval-every steps: records and shows figures of 128 test prompts."""
        done, every = self.step + 1, self.o.eval_every
        if not every or done % every:
            return
        figures = evaluator.measure(policy, 128)
        self.files.record({"step": done, "eval": figures})
        shown = ("reward", "score", "kl", "kl_star", "accuracy", "rms", "nll")
        text = ", ".join(f"{k} {figures[k]:.3f}" for k in shown if k in figures)
        loss = self._figures()["loss"]
        say(f"{self.method} step {done}/{self.o.steps}: loss {loss:.4f}, {text}")

    def finish(self, evaluator, policy, forward=None, updates=1, **figures):
        """Measures the policy, writes its checkpoint, and ends the record. forward: forward passes
        of a role over a token that is trained on, where they are not one; updates: passes over a
        rollout. figures: more of them."""
        try:
            final = evaluator.measure(policy) | figures
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"step {self.o.steps}, in {self.files.state_path}") from None
        forward = dict.fromkeys(self.models, 1) | (forward or {})
        forward = {role: n for role, n in forward.items() if role in self.models}
        backward = {role: updates * (role in self.trained()) for role in self.models}
        recompute = self.o.checkpoint_activations
        meta = {"method": self.method, "task": self.o.task, "options": self.options}
        meta |= {"steps": self.o.steps, "tokenizer": self.tokenizer.meta}
        meta |= {"files": self.files.digests, "folder": from_checkpoint(self.o.out)}
        evaluator.report(f"{self.method} on {self.o.task}", final)
        final |= {
            "models": self.ledger,
            "forward_passes": sum(forward.values()),
            "backward_passes": sum(backward.values()),
            "flops_per_token": memory.flops(self.models, forward, backward, recompute),
            "trained_tokens": self.tokens,
            "wall_s": round(time.time() - self.wall, 2),
        }
        final |= {"sampled_tokens": self.sampled} if self.sampled else {}
        final |= self._times(updates)
        if self.peak:
            parts, most = self.peak
            final |= {"peak_bytes": sum(parts.values()), "peak": parts, "peak_most": most}
        with interrupts.held():
            with self.files.writes(self.o.out):
                policy = sharding.gathered(policy) if self.shard else policy
                if distributed.first:
                    meta |= self._adapters(policy)
                    gpt.save(policy, self.o.out, **meta, **evaluator.facts(final))
            self.files.record({"final": final})
            self.files.drop_state()
        distributed.wait()  # a later stage reads it
        self._summary(final)
        return final

    def _adapters(self, policy):
        """Merges them into the weights. -> what a checkpoint keeps of them"""
        o, tensors = self.o, lora.merge(policy)
        facts = {"rank": o.lora, "alpha": o.lora_alpha, "start": self.start, "tensors": tensors}
        return {"lora": facts} if tensors else {}

    def _times(self, updates):
        """-> the medians of a step and of its parts, and the tokens of a second"""
        if not self.times:
            return {}
        tokens = (self.tokens - self.tokens_before) / updates / (self.step + 1 - self.first)
        figures = {"step_ms": 1000 * statistics.median(self.times)}
        figures["tokens_per_s"] = tokens / statistics.fmean(self.times)
        parts = self.spent.items()
        return figures | {f"{part}_ms": 1000 * statistics.median(x) for part, x in parts}

    def _summary(self, final):
        speed = ""
        if self.times:
            parts = ", ".join(f"{part} {final[f'{part}_ms']:.0f}" for part in self.spent)
            speed = f", {final['step_ms']:.0f} ms a step" + (f" ({parts})" if parts else "")
            speed += f", {final['tokens_per_s']:,.0f} tokens/s"
        say(memory.ledger(self.ledger))
        say(f"time: {final['wall_s']:.0f} s{speed}")
        if self.peak:
            say(f"memory at a step's peak: {memory.peak_text(*self.peak)}")
        say(f"checkpoint {self.o.out}, record {self.files.record_path}")

    @contextlib.contextmanager
    def _measured(self):
        """Counts the bytes of a whole step: on a CPU those of its tensors, which compiled code does
        not show, on a GPU those that its allocator gave out."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self.peak = {"all": self.allocated}, {}
        elif self.device.type == "cpu" and not self.compile:
            with memory.track(self.models, self.optimizer) as self.tracker:
                yield
            self.tracker = None
        else:
            yield

    # ---- files

    def _options(self):
        """-> the options that set a run's bits"""
        kept = {name: x for name, x in asdict(self.o).items() if name not in FREE}
        return kept | {"device": self.device.type}

    def past(self):
        """-> the closing figures of this very run, if it has ended before"""
        return distributed.of_first(partial(self.files.past, self.method, self._options()))

    def _begin(self):
        """A fresh run: its record begins, and no older run's state is left to be resumed."""
        o = self.o
        if o.warmup > o.steps:
            last = f"ends at {learning_rate(o.steps - 1, o):.3g}, not {o.lr:g}"
            say(f"--warmup {o.warmup} outlasts the {o.steps} steps: the learning rate {last}")
        if self.files.interrupted():
            say(f"the state that an interrupted run left in {self.files.state_path} is replaced")
        self.files.begin(asdict(o))
        self.files.drop_state()
        head = {"method": self.method, "task": o.task, "options": asdict(o), "commit": commit()}
        head |= {"device": str(self.device), "dtype": str(self.dtype)[6:], "models": self.ledger}
        head |= {"processes": distributed.size} | self.files.logger.facts()
        head["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
        self.files.record(head)

    def _drawn(self):
        """-> the states that a step moves before any weight has moved"""
        states = {name: x.state_dict() for name, x in self.drawn_state.items()}
        counts = {"sampled": self.sampled, "tokens": self.tokens, "skipped": self.skipped}
        return states | counts | {"generator": self.generator.get_state()}

    def _save(self, step, drawn=None):
        """drawn: earlier states, to be saved in place of the present ones"""
        state = {"step": step, "options": self.options, "processes": self._processes()}
        state |= {name: x.state_dict() for name, x in self.weights_state.items()}
        state |= drawn or self._drawn()
        state = sharding.whole(state) if self.shard else state
        with interrupts.held():
            self.files.save(state | {"wall": time.time() - self.wall})

    def keep(self):
        """Saves what was done before this step, if no weight has moved in it."""
        if self.step == self.first or self.updates:
            return
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not distributed.total(any(not sharding.local(p).isfinite().all() for p in weights)):
            self._save(self.step, self.drawn)
            path = self.files.state_path
            say(f"step {self.step} is saved in {path}; --resume goes on from there")

    def _resume(self):
        """Goes on from the saved state; False where there is none, which is said. Ends the process
        where the run had finished."""
        if self.past():
            say(f"--resume: this run has finished, {self.o.out} is its checkpoint")
            sys.exit(0)
        if not distributed.of_first(self.files.interrupted):
            say(f"--resume: there is no {self.files.state_path} yet, so this run starts afresh")
            return False
        device = "cpu" if self.shard else self.device
        state = self.files.load(self.options, device, mapped=self.shard)
        for name, x in (self.weights_state | self.drawn_state).items():
            x.load_state_dict(state[name] if isinstance(x, PARTED) else self._moved(state[name]))
        self.generator.set_state(state["generator"].cpu())
        self.wall = time.time() - state["wall"]
        self.first, self.tokens, self.sampled = state["step"], state["tokens"], state["sampled"]
        self.skipped = state.get("skipped", 0)  # older states have none
        self.step = self.first - 1
        self.files.begin(asdict(self.o))  # cut back to the saved step
        say(f"resumed after step {self.first} of {self.o.steps}")
        if (others := state.get("processes", "1")) != self._processes():
            say(f"it was saved by {others} processes: the numbers will differ by rounding")
        return True

    def _moved(self, state):
        """-> a saved object's state, with its tensors on the device, and none in a mapped file"""
        move = partial(torch.Tensor.to, device=self.device, copy=True)
        return tree_map_only(torch.Tensor, move, state)

    def _processes(self):
        return f"{distributed.size}{' --shard' if self.shard else ''}"

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def say(text):
    tqdm.write(text)
    sys.stdout.flush()


def learning_rate(step, o):
    """Linear warmup, then constant, linear to 0, or cosine to a tenth."""
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    done = (step - o.warmup) / max(1, o.steps - o.warmup)
    if o.lr_schedule == "cosine":
        return o.lr * (0.55 + 0.45 * math.cos(math.pi * done))
    return o.lr * (1 - done) if o.lr_schedule == "linear" else o.lr
