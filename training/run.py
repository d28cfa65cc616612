"""One training run: models, steps, the record. Nothing here appears in an equation."""

import contextlib
import os
import time
from dataclasses import fields
from functools import partial

import torch
from torch.nn.functional import pad

import data
import gpt
from data import UserError, say
from training import checkpoint, distributed, memory
from training.bar import Bar
from training.device import Compute, choose_placement
from training.figures import Figures, evaluated_text, means
from training.files import Files, logger
from training.optimizer import Scaler, adamw, learning_rate, step_if
from training.placement import full
from training.process import interrupts
from training.state import State


class Run(Compute):
    """What surrounds a script's loop. A script calls it in this order:

    run = Run("dpo", o)                            refuses what cannot work, before it writes
    policy = run.load(path, task)                  a checkpoint on this device
    ref = run.reference(policy)                    π_ref: a frozen copy, in the compute precision
    run.hold(policy=policy, ref=ref)               the models in memory: printed, recorded, saved
    batches = run.batches(task.preferences)        batches[step]: rows of token ids
    for step in run.steps(batches, optimizer):     progress, record, --resume, Ctrl-C
        for micro in run.micro_batches(batches[step]):
            run.backward(loss, tokens)             of some of the rows, the gradient adds up
            run.log(metrics, weight)               adds Σ weight · metric to the step's figures
        run.update(optimizer)                      learning rate, clipping, optimizer step
        run.evaluate(evaluator, policy)            every --eval-every steps
    run.finish(evaluator, policy)                  final figures, checkpoint, summary
    """

    def __init__(self, method, o):
        super().__init__(o)
        self.method = method  # the script's name
        self.compile, self.micro_tokens = o.compile, o.micro_tokens
        self.placement = choose_placement(o.shard, self.device, self.weights)
        name = f"{method}-{o.name}" if o.name else method
        o.out = o.out or checkpoint.default_path(o.task, name)
        self.files = Files(o.out, logger(o.log_to, method, o.out), o.keep_every)
        o.resume = o.resume or distributed.goes_on(self.files.record_path)
        self.generator = torch.Generator().manual_seed(o.seed)  # for samples and minibatches
        self.figures = Figures(self.device)  # what is logged, timed and counted
        self.state = State(self)  # what --resume goes on from
        self.meter = memory.Meter(self.device, o.compile)  # bytes of one step
        self.scaler = Scaler(self.device.type, enabled=self.dtype == torch.float16)
        # set by `load` or `create`: the task, its tokens, and the longest sequence
        self.task = self.tokenizer = self.block_size = None
        self.start = ""  # the path of the checkpoint that the policy starts from
        self.baseline = o.reference  # path of the model to compare with: --reference, or the start
        # set by `hold` and `steps`
        self.models, self.ledger = {}, []  # the models by role; their sizes, as plain facts
        self.optimizer = None  # of all that is trained
        self.first_step = self.step = 0  # the step at which the run begins or resumes; this step
        for f in fields(o):
            if f.metadata.get("file"):
                self.reads(getattr(o, f.name), f.name)

    def reads(self, path, part, known_by=""):  # a file is an input of the run
        self.files.reads(path, part, known_by)

    # ---- models: where they come from

    def stage(self, method, part="init", *more):
        """-> a stage's checkpoint; if missing, its script runs first, with the options `more`"""
        path = checkpoint.default_path(self.o.task, method)
        self.reads(path, part)
        return checkpoint.make_if_missing(path, method, self.o, *more)

    def load(self, path, task, scalar=False):
        """-> the policy of a checkpoint; the task gets its chat template. scalar: the policy's
        trunk with a new head that gives one number"""
        self.reads(path, "init")
        model, tokenizer, meta = checkpoint.start(path, task, self.o, scalar)
        model = gpt.ScalarGPT(model.config, self.o.seed, trunk=model) if scalar else model
        self.start, self.baseline = path, self.o.reference or path
        say(f"starts from {path}: {checkpoint.describe(meta)}")
        if os.path.isdir(path) and "lr" not in self.o.given and not self.o.lora:
            toys = "is for toy models; a pretrained model needs 1e-6 to 1e-5"
            say(f"warning: --lr {self.o.lr:g} {toys}")
        return self._adopt(model, tokenizer, task, meta["template"])

    def create(self, task):
        """-> a policy with random weights"""
        o = self.o
        if o.lora:
            raise UserError("--lora adapts a checkpoint; give one with --init, or leave --lora out")
        tokenizer = data.tokenizer(o.tokenizer, task.tokenizer)
        size = o.block_size or gpt.GPTConfig.block_size
        config = gpt.GPTConfig(tokenizer.size, size, o.n_layer, o.n_head, o.n_embd)
        return self._adopt(gpt.GPT(config, o.seed), tokenizer, task, data.TEMPLATE)

    def _adopt(self, model, tokenizer, task, template):
        own, wanted = model.config.block_size, self.o.block_size
        if wanted > own:
            more = f"is more than the checkpoint's {own}; give at most that"
            raise UserError(f"--block-size {wanted} {more}")
        self.task, self.block_size = task, wanted or own
        self.tokenizer = self.with_chat(tokenizer)
        task.template = template
        if self.o.reference:
            self.other_reference()  # a wrong one is refused before anything is trained
        return self.prepare(model)

    def prepare(self, model):
        """-> the model, ready to be trained"""
        model.checkpoint_activations = self.o.checkpoint_activations
        return self.complete(self.adapt(self.place(model, frozen=bool(self.o.lora))))

    def hold(self, **models):
        """Names the models in memory by their roles; a model that is None is not held."""
        self.models = {role: model for role, model in models.items() if model is not None}
        self.ledger = memory.records(self.models, self.o.optimizer)
        self.figures.watch(self.models)
        rounded = "\nbfloat16-pure: an update below 1/256 of a weight is rounded away"
        say(memory.ledger(self.ledger) + rounded * self.pure)

    def adamw(self, *models):
        """-> the optimizer of all trained weights of these models"""
        return adamw(models, self.o, self.device)

    def batches(self, draw, fixed=0):
        """-> data.Batches of the rows that `draw` gives. fixed: the size of a fixed set (0: fresh
        rows, or all rows of a file)"""
        count, make = fixed or self.task.size, distributed.in_one_process
        return data.Batches(draw, count, self.tokenizer, self.block_size, self.o, make)

    def prompts(self, split="train"):
        """-> data.Prompts of the task"""
        make = distributed.in_one_process
        return data.Prompts(self.task, self.tokenizer, self.block_size, self.o, split, make)

    # ---- forward passes without a graph

    def sample(self, model, questions, longest, group=1, temperature=1.0, generator=None):
        """Like Compute.sample. Without a generator the run's own is used, and the samples count."""
        source = generator or self.generator
        rollout = super().sample(model, questions, longest, group, temperature, source)
        if generator is None:
            self.figures.drew(rollout, model, self.models)
        return rollout

    def kept(self, rollout, rows):
        """-> these rows of a rollout. The passes of the other rows do not count."""
        self.figures.dropped(len(rollout) - int(rows.sum()))
        return rollout[rows]

    def logprobs(self, model, rollout, temperature=1.0):
        """-> (N, T) log-probs of all responses of a rollout, computed in micro-batches"""
        f = partial(model.logprobs, temperature=temperature)
        return self._table(rollout, lambda x: f(x.ids, x.mask, packed=x.packed))

    def values(self, critic, rollout):
        """-> (N, T) values of the states before each response token"""
        return self._table(rollout, lambda x: critic.values_before(x.ids, x.mask, x.packed))

    def _table(self, rollout, f):
        width = rollout.ids.size(1)
        return self.scores(rollout, lambda x: pad(f(x), (0, width - x.ids.size(1))))

    def scores(self, rows, f, size=0):
        with self.figures.passing(len(rows)):
            return super().scores(rows, f, size or self.o.micro_batch)

    # ---- the loop

    def micro_batches(self, rows, responses=1, lengths=None):
        """Yields the micro-batches of an optimizer step that are this process's share. What the
        processes log inside the loop is summed at its end. responses: the number per row"""
        take, limits = self.cutter(rows, self.o.micro_batch, lengths)
        with self.figures.shared(), self.figures.passing(responses * len(rows)):
            for part, counts in distributed.shares(len(rows), *limits):
                self.figures.counts = counts
                yield take(part)

    def steps(self, batches, optimizer, **restored):
        """Yields the number of each step from 0; between two of them the step is recorded, shown
        and saved. batches: the data; --epochs may set the number of steps by it. restored: what
        else --resume must restore, as name = object with state_dict and load_state_dict."""
        o, figures = self.o, self.figures
        self._plan(batches)
        self.optimizer = optimizer
        if hasattr(batches, "state_dict"):
            restored["batches"] = batches
        self.state.hold(optimizer, restored)
        self.placement.collect_garbage()
        if not (o.resume and self.state.resume()):
            self.state.begin()
        measured = min(self.first_step + 1, o.steps - 1)  # the first step makes AdamW's moments
        with Bar(self) as bar, interrupts.patient() as interrupted:
            for step in range(self.first_step, o.steps):
                self.step, done = step, step + 1
                self.state.begin_step()
                figures.begin_step()
                with self.meter.measure(self.models, optimizer, step == measured):
                    yield step
                figures.end_step(timed=step != measured or done == o.steps)  # counting slows it
                self._record(bar)
                stop = distributed.total(bool(interrupted))  # whichever process got the signal
                if done % o.save_every == 0 or done == o.steps or stop:
                    self.state.save(done)
                if stop:
                    interrupts.stop(f"step {done}, in {self.files.state_path}")

    def _plan(self, batches):
        """Decides how many steps there are, and how often they are evaluated."""
        o = self.o
        o.steps = o.steps or (o.epochs or 1) * batches.per_epoch
        if data.kind(o.task) == "file" and o.steps < batches.per_epoch:
            part = f"{o.steps * batches.batch_size:,} of {len(batches.rows):,} training rows"
            say(f"{o.steps} steps read {part}; --epochs 1 reads all")
        if data.kind(o.task) == "exact" and "eval_every" not in o.given:
            o.eval_every = max(1, o.steps // 20)

    def _record(self, bar):
        """Records and shows the step's figures."""
        o, figures, done = self.o, self.figures, self.step + 1
        facts = figures.sampled_tokens() | {"step_ms": 1000 * figures.seconds}
        figures.line = done, figures.sums, figures.logged_in, facts
        if done % o.log_every == 0 or done == o.steps:
            self.files.record(line := self.line(*figures.line))
            bar.show(line, figures.tokens - figures.tokens_before)
        bar.step()

    def line(self, done, sums, logged_in, facts):  # made only if it is recorded: the device waits
        return {"step": done} | means(sums, logged_in) | self.scaler.figures() | facts

    def backward(self, loss, tokens):
        """tokens: the number that the loss was computed on, with prompts but without padding"""
        counts = self.figures.counts  # False: this process only keeps pace with the others
        self.scaler.scale(loss if counts else 0 * loss).backward()
        self.figures.tokens += tokens * counts

    def log(self, metrics, weight=1.0):
        """Adds Σ weight · metric to the step's figures; the weights of a mean sum to 1."""
        self.figures.log(metrics, weight)

    @contextlib.contextmanager
    def clock(self, part):
        """Times a part of the step. The record has the medians, as <part>_ms."""
        with self.meter.during("sampling" if part == "sample" else None):
            with self.figures.clock(part):
                yield

    def update(self, optimizer):
        """Clips the gradient and makes the optimizer step; stops the run if it is not finite."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.o)
        self.placement.total_gradients(parameters)
        self.scaler.unscale_(optimizer)
        norm = full(torch.nn.utils.clip_grad_norm_(parameters, self.o.grad_clip))
        loss = self.figures.sums["loss"]
        if step_if(torch.isfinite(norm + loss), optimizer):
            self.scaler.update()
            self.log({"grad_norm": norm})
        elif not self.scaler.skips(loss):
            from training import ending

            ending.give_up(self, loss, norm)
        optimizer.zero_grad()
        self.log({"lr": group["lr"]})
        self.meter.read()
        self.figures.end_update()

    def keep(self):  # what was done before this step, if no weight has moved in it
        self.state.keep()

    def cut_short(self, why):
        """Ends the run after the step before this one. Raises Stopped if there is none."""
        from training import ending

        ending.cut_short(self, why)

    def evaluate(self, evaluator, policy):
        """Every --eval-every steps, records and prints figures of 128 test prompts."""
        o, done, found, self.figures.in_step = self.o, self.step + 1, {}, False
        if o.keep_every or o.loss_every:
            from training import kept

            found = kept.between_steps(self, evaluator, policy)
        if o.eval_every and done % o.eval_every == 0:
            found |= evaluator.measure(policy, 128)
        if found:
            self.files.record({"step": done, "eval": found})
            text = evaluated_text({"loss": self.figures.means()["loss"]} | found)
            say(f"{self.method} step {done}/{o.steps}: {text}")

    def finish(self, evaluator, policy, **figures):
        """Measures the policy, writes its checkpoint, and ends the record. figures: more of them"""
        o = self.o
        try:
            final = evaluator.measure(policy) | figures
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"step {o.steps}, in {self.files.state_path}") from None
        evaluator.report(f"{self.method} on {o.task}", final)
        final |= {"models": self.ledger}
        final |= self.figures.cost(self.models, o.passes(), o.checkpoint_activations)
        final |= self.figures.medians(self.step + 1 - self.first_step, o.passes())
        final |= self.meter.figures() | {"wall_s": round(time.time() - self.figures.run_began, 2)}
        with interrupts.held():
            with self.files.writes(o.out):
                meta = checkpoint.facts(self) | evaluator.facts(final)
                checkpoint.write(self, policy, o.out, meta)
            self.files.record({"final": final})
            self.files.drop_state()
        distributed.wait()  # a later stage reads it
        say(self.figures.summary(final, self.meter.peak))
        say(f"checkpoint {o.out}, record {self.files.record_path}")
        say(evaluator.what_next(o.out, self.files.record_path))
        return final
