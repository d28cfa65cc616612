"""SFT: supervised fine-tuning on demonstrations, the stage that the others start from (InstructGPT, arXiv:2203.02155).

    L(θ) = - Σ_b Σ_t m_bt log π_θ(y_bt | x_b, y_b<t) / Σ_b Σ_t m_bt

    paper        code                       shape
    x, y         prompt and response ids    lists of tokens
    m            batch.mask                 (B, T), True on the response and its end token
    log π_θ      policy.logprobs(…)         (B, T-1), nats a token, 0 off the mask

Both sums run over the whole optimizer step: every response token weighs the same, however the batch is cut.

Models in memory: 1 (the policy, trained).
Data: (prompt, completion).
Departures: the usual ones. No dropout, no packing, no loss on the prompt, one end token after every whole response.

    python sft.py                                              reviews, from random weights, half a minute on a laptop
    python sft.py --task arithmetic:2                          sums of two digits; --task exact: a world of 40 outcomes
    python sft.py --task my.jsonl.gz --block-size 1024 --truncate        rows of {"prompt", "completion"}
    python sft.py --task my.jsonl.gz --init out/reviews/sft.pt            from a checkpoint

It ends with the reward of its samples where the task has one, and with the loss on held-out answers where it has not.
"""
from dataclasses import dataclass

import common
import data
import memory
from common import Count, Positive, Whole
from evaluate import choose_yardstick, context, find_reference, open_or_make, reopen, report
from gpt import CheckpointError, save


def nll(logp):
    """Negative log-likelihood. logp: (B, T) token log-probs in nats, 0 where nothing is trained. Returns (B,) sums, nats."""
    return -logp.sum(1)


@dataclass
class Options(common.Options):
    init: str = ""  # checkpoint to start from (default: random weights)
    steps: Count = 500  # optimizer steps (default: %(default)s; of a file: one epoch)
    lr: Positive = 4e-3  # AdamW learning rate at its peak; large models take 1e-6 to 2e-5
    warmup: Whole = 50  # steps over which the learning rate rises from 0
    n_layer: Count = 4  # blocks, where weights start random
    n_head: Count = 4  # attention heads a block, where weights start random
    n_embd: Count = 128  # width, where weights start random
    block_size: Whole = 0  # longest sequence, prompt and response, in tokens (0: the checkpoint's, or 256 at random weights)
    on_arithmetic = dict(steps=1600, batch_size=64, lr=2e-3)
    on_exact = dict(steps=1000, batch_size=4096, lr=2e-3, lr_schedule="linear", n_layer=2, n_embd=64, block_size=8)
    on_predict = dict(batch_size=4)


@common.command(CheckpointError, data.DataError)
def main(argv=None):
    o = common.parse(Options, argv)
    task = data.task(o.task, o.eval_file, o.strict)
    run = common.Run(o, "sft")
    policy, tokenizer, task.template = open_or_make(o, task)
    block_size = context(o, policy)
    count = None if common.is_file(o.task) else 0
    batches = data.Batches(task.demonstrations, count, o.batch_size, o.seed, tokenizer, block_size, o.truncate)
    yardstick = choose_yardstick(run, task, tokenizer, block_size, o.max_new_tokens, o.truncate, aim=("sft", vars(o)))
    reference = find_reference(o, run, tokenizer, block_size)
    for note in filter(None, [*task.notes, batches.note, *yardstick.notes]):
        run.say(note)

    policy = run.prepare(policy)
    policy.checkpoint_activations = o.checkpoint_activations
    optimizer = common.adamw(policy, o)
    run.begin(memory.Ledger(policy=policy), batches, policy=policy, optimizer=optimizer)

    for step in run.steps():
        rows = batches[step]
        n = run.total(sum(len(y) for _, y in rows))  # response tokens of the whole step
        for micro in run.micro_batches(rows):
            batch = data.pad(micro, run.device)
            with run.autocast():
                logp = policy.logprobs(batch.ids, batch.mask, index=batch.index)  # (B, T-1)
            loss = batch.spread(nll(logp)).sum() / n  # token mean over the step
            loss.backward()
            run.tokens += batch.tokens
            run.add({"loss": loss})
        run.update(step, policy, optimizer)
        if o.eval_every and (step + 1) % o.eval_every == 0:
            run.evaluated(step, yardstick.measure(policy, n=128)[0])

    final, samples = yardstick.measure(policy, reopen(run, reference))
    save(policy, o.out, **run.facts(), tokenizer=tokenizer.meta, template=task.template, reference=o.init, implicit="nll",
         max_new_tokens=yardstick.max_new_tokens, reward=final.get("reward"))  # fmt: skip
    report(f"sft on {o.task}", final, samples, task.bound)
    run.finish(final, forward={"policy": 1}, backward={"policy": 1})


if __name__ == "__main__":
    main()
