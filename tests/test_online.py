"""Online and iterative DPO: who wins, what weighs nothing, the optimum of one's own pairs, rounds and the reference, judges."""
import math
import shutil
from functools import partial

import pytest
import torch
from conftest import ENDS, TINY, documented, first_gradient, lines, main

import common
import data
import evaluate
import online_dpo
from data import oracle
from data.make_vocab import main as make_vocab
from gpt import GPT, GPTConfig, Samples, ScalarGPT, load, sample, save
from online_dpo import choose, dpo_loss, ipo_loss

WORLD = data.task("exact")
R, LOG_D, BEATS = torch.from_numpy(WORLD.r), torch.from_numpy(WORLD.d).log(), torch.from_numpy(WORLD.beats)
PAIRS = [*ENDS, "--batch-size", 8, "--reward", "judge.py:odd"]  # rewards 1 or -1
NEVER_TIED = "def number(prompt, completion): return sum(i * ord(c) for i, c in enumerate(completion, 1)) % 1009 / 100\n"


# ---- the equations, by hand


def test_losses_by_hand():
    """h = (-1 + 3) - (-2 + 2) = 2. DPO, β = ½: log(1 + e⁻¹). IPO, τ = ¼: (2 - 2)²; τ = 1: (2 - ½)²."""
    one = [torch.tensor([x], dtype=torch.float64) for x in (-1.0, -2.0, -3.0, -2.0)]
    assert dpo_loss(*one, beta=0.5).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert ipo_loss(*one, tau=0.25).item() == 0.0 and ipo_loss(*one, tau=1.0).item() == 2.25
    zero = [torch.zeros(3, requires_grad=True) for _ in range(4)]
    loss = dpo_loss(*zero, beta=0.5)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(2)] * 3)
    assert [x.grad.tolist() for x in zero[:2]] == [[-0.25] * 3, [0.25] * 3]  # -β/2 and β/2
    with pytest.raises(AssertionError):
        dpo_loss(zero[0], zero[1][:2], *zero[2:])


def test_the_best_is_compared_with_the_worst():
    reward = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 5.0], [2.0, 2.0, 2.0]], requires_grad=True)
    chosen, rejected = choose(reward)
    assert chosen.tolist() == [1, 2, 2] and rejected.tolist() == [0, 1, 0]
    assert not chosen.is_floating_point()  # a place, through which nothing can be learned
    for uniform, wins in ((math.nextafter(1 / (1 + math.exp(-2)), 0), True), (1 / (1 + math.exp(-2)) + 1e-6, False)):  # σ(3 - 1)
        chosen, rejected = choose(reward[:1], torch.tensor([uniform - 1e-6 * wins]))
        assert (chosen.tolist(), rejected.tolist()) == (([1], [0]) if wins else ([0], [1]))
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    share = (choose(torch.tensor([[0.5, -0.7]]).expand(20_000, 2), draws)[0] == 0).float().mean().item()
    assert abs(share - 1 / (1 + math.exp(-1.2))) < 4 * 0.5 / 20_000**0.5
    swapped, lost = choose(reward[:2].flip(1), draws[:2])
    assert [(2 - swapped).tolist(), (2 - lost).tolist()] == [x.tolist() for x in choose(reward[:2], draws[:2])]
    with pytest.raises(AssertionError):
        choose(reward[:, :1])


def gradient_at(log_p, label, beta=0.5):
    """The expectation, over pairs of samples of the policy and their labels, of the gradient in the logits; π_ref = d."""
    theta = log_p.clone().requires_grad_()
    logp, p = theta.log_softmax(1), log_p.exp()
    wins = BEATS if label == "bt" else (R[:, :, None] > R[:, None, :]).double()
    weight = 2 * p[:, :, None] * p[:, None, :] * wins
    w, l = (x.expand(4, 40, 40).flatten() for x in (logp[:, :, None], logp[:, None, :]))
    ref_w, ref_l = (x.expand(4, 40, 40).flatten() for x in (LOG_D[:, :, None], LOG_D[:, None, :]))
    (weight.flatten() * dpo_loss(w, l, ref_w, ref_l, beta)).sum().backward()
    return theta.grad.abs().max().item()


def test_the_optimum_of_own_pairs_is_that_of_the_labels():
    """Drawn by Bradley–Terry, the mean gradient vanishes at π* and not at π_ref; with argmax it does not vanish at π*."""
    star = oracle.star(LOG_D, R, 0.5)
    assert gradient_at(star, "bt") < 1e-12 < 1e-2 < gradient_at(LOG_D, "bt")
    assert gradient_at(star, "argmax") > 1e-2


OPTIONS = {"label": "bt", "ref_update": "fixed", "reward": "task", "loss": "dpo", "samples_per_prompt": 2, "temperature": 1.0, "rounds": 0,
           "ipo_sum": True, "tau": 0.3, "beta": 0.5}  # fmt: skip


def test_what_online_dpo_aims_at():
    torch.testing.assert_close(oracle.aim(WORLD, LOG_D, "online_dpo", OPTIONS)[1], oracle.star(LOG_D, R, 0.5))
    more = OPTIONS | {"rounds": 3, "samples_per_prompt": 4, "temperature": 0.7}  # the pairs do not matter
    torch.testing.assert_close(oracle.aim(WORLD, LOG_D, "online_dpo", more)[1], oracle.star(LOG_D, R, 0.5))
    for change in ({"label": "argmax"}, {"ref_update": "per-round"}, {"reward": "rm"}):
        assert oracle.aim(WORLD, LOG_D, "online_dpo", OPTIONS | change) is None
    for change in ({"rounds": 3}, {"samples_per_prompt": 4}, {"temperature": 0.7}):  # for IPO they do
        assert oracle.aim(WORLD, LOG_D, "online_dpo", OPTIONS | change | {"loss": "ipo"}) is None
    assert oracle.aim(WORLD, None, "online_dpo", OPTIONS) is None


def test_ipo_on_own_pairs_ends_where_no_policy_wins():
    """Of sums: Σ_y' π(y') [h(y, y') - (2 P(y beats y') - 1)/(2τ)] = 0 for each y, which is π ∝ π_ref exp(P(y beats π)/τ). Of means that
    policy is another one."""
    loss, point = oracle.aim(WORLD, LOG_D, "online_dpo", OPTIONS | {"loss": "ipo"})
    beats = torch.einsum("xyz,xz->xy", BEATS, point.exp())
    assert loss is None and oracle.kl(point, (LOG_D + beats / 0.3).log_softmax(1)).max() < 1e-9 and oracle.kl(point, LOG_D).mean() > 0.1
    _, mean = oracle.aim(WORLD, LOG_D, "online_dpo", OPTIONS | {"loss": "ipo", "ipo_sum": False, "tau": 1.0})
    assert oracle.kl(mean, (LOG_D + torch.einsum("xyz,xz->xy", BEATS, mean.exp())).log_softmax(1)).max() > 0.01


# ---- the loop


@pytest.mark.parametrize("loss, label", [("dpo", "argmax"), ("dpo", "bt"), ("ipo", "argmax"), ("ipo", "bt")])
def test_the_first_gradient_is_the_equation_s(loss, label, ends, monkeypatch):
    """π = π_ref, so h = 0: -β/2 mean(∇log π(y_w) - ∇log π(y_l)) over the pairs that count; IPO: -1/τ of the means over tokens. The pairs
    are told by a plain loop from the samples, and from uniforms that draw the better one always."""
    monkeypatch.chdir(ends)
    kept = []
    monkeypatch.setattr(torch, "sigmoid", lambda x: torch.ones_like(x))

    def keep(*args):
        kept.append(sample(*args))
        return kept[-1]

    args = [*PAIRS, "--samples-per-prompt", 3, "--loss", loss, "--label", label, "--seed", 3]
    found, metrics = first_gradient("online_dpo", args, monkeypatch, sample=keep)
    model, s, tokenizer = load("ends.pt")[0].double(), kept[0], data.tokenizer()
    texts = [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(s.ids, s.mask)]
    logp, total, n = model.logprobs(s.ids, s.mask).sum(1), 0.0, 0
    assert len(texts) == 24
    for i in range(0, 24, 3):
        odd, even = ([j for j in range(i, i + 3) if len(texts[j]) % 2 == k] for k in (1, 0))
        if not odd or not even:  # a tie: with argmax it weighs nothing, else the last wins over the first, if they are two
            if label == "argmax" or texts[i] == texts[i + 2]:
                continue
            odd, even = [i + 2], [i]
        scale = [s.mask[j].sum() if loss == "ipo" else 1.0 for j in (odd[-1], even[0])]
        total, n = total + logp[odd[-1]] / scale[0] - logp[even[0]] / scale[1], n + 1
    value = -(1.0 if loss == "ipo" else 0.05) * total / n
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])
    assert 2 < n < (8 if label == "argmax" else 9) and (found - expected).norm() < 1e-6 * expected.norm()
    assert metrics["loss"] == pytest.approx(0.25 if loss == "ipo" else math.log(2)) and metrics["kl"] == pytest.approx(0, abs=1e-9)


def test_the_second_step_is_drawn_at_the_temperature_and_its_kl_is_that_of_its_samples(ends, monkeypatch):
    """kl: mean over the step's responses of log π - log π_ref, of the policy after one step; sampled_tokens: all of them, once."""
    monkeypatch.chdir(ends)
    kept, weights = [], []

    def keep(model, prompts, longest, end_id, temperature, *more):
        weights.append({k: v.clone() for k, v in model.state_dict().items()})
        kept.append((sample(model, prompts, longest, end_id, temperature, *more), temperature))
        return kept[-1][0]

    monkeypatch.setattr(online_dpo, "sample", keep)
    args = [*PAIRS, "--temperature", 0.7, "--steps", 2, "--warmup", 0, "--lr", 0.01, "--log-every", 1, "--dtype", "float64"]
    assert main("online_dpo", *args, "--out", "second/x.pt") == 0
    first, _, second, last = lines(ends / "second/x.jsonl")
    assert [t for _, t in kept] == [0.7, 0.7]
    s, policy, ref = kept[1][0], load("ends.pt")[0].double(), load("ends.pt")[0].double()
    policy.load_state_dict(weights[1])
    with torch.no_grad():
        kl = sum((1 - 2 * i) * model.logprobs(s.ids, s.mask).sum().item() for i, model in enumerate((policy, ref))) / len(s.ids)
    assert abs(kl) > 1e-3 and second["kl"] == pytest.approx(kl, rel=1e-6)
    assert second["sampled_tokens"] == last["final"]["sampled_tokens"] == sum(int(s.mask.sum()) for s, _ in kept)


def twins(*args):
    """The second sample to each prompt is the first again."""
    s = sample(*args)
    return s.take(torch.arange(0, len(s.ids), 2).repeat_interleave(2))


def swapped(*args):
    s = sample(*args)
    return s.take(torch.arange(len(s.ids)).view(-1, 2).flip(1).flatten())


@pytest.mark.parametrize("label", ["bt", "argmax"])
@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_equal_samples_move_nothing(label, loss, ends, monkeypatch):
    monkeypatch.chdir(ends)
    args = [*PAIRS, "--label", label, "--loss", loss]
    found, metrics = first_gradient("online_dpo", args, monkeypatch, sample=twins)
    assert found.abs().max() == 0 and metrics["loss"] == 0 and metrics["equal_fraction"] == 1.0
    found, metrics = first_gradient("online_dpo", args, monkeypatch)
    assert found.abs().max() > 0 and metrics["equal_fraction"] < 0.5


def test_equal_rewards_move_nothing_with_argmax(ends, monkeypatch):
    """And where labels are drawn they do: a fair coin says that two answers are equally good."""
    monkeypatch.chdir(ends)
    args = [*PAIRS[:-1], "judge.py:constant"]
    found, metrics = first_gradient("online_dpo", [*args, "--label", "argmax"], monkeypatch)
    assert found.abs().max() == 0 and metrics["loss"] == 0 and metrics["tie_fraction"] == 1.0
    assert first_gradient("online_dpo", args, monkeypatch)[0].abs().max() > 0


@pytest.mark.parametrize("label", ["bt", "argmax"])
def test_swapping_the_two_samples_changes_nothing(label, ends, monkeypatch):
    monkeypatch.chdir(ends)
    (ends / "number.py").write_text(NEVER_TIED)
    args = [*PAIRS[:-1], "number.py:number", "--label", label]
    a, metrics = first_gradient("online_dpo", args, monkeypatch)
    b, again = first_gradient("online_dpo", args, monkeypatch, sample=swapped)
    assert metrics["tie_fraction"] == 0 and a.norm() > 0 and (a - b).norm() < 1e-9 * a.norm() and metrics == pytest.approx(again)


def test_padding_is_never_trained_and_the_end_token_is(ends, monkeypatch):
    monkeypatch.chdir(ends)

    def padded(*args):
        s = sample(*args)
        widen = partial(torch.nn.functional.pad, pad=(0, 5))
        ids = torch.where(torch.arange(s.ids.size(1)) >= s.stop[:, None], 7, s.ids)
        return Samples(widen(ids, value=9), widen(s.mask), widen(s.logp), s.finished)

    def endless(*args):
        s = sample(*args)
        return s._replace(mask=s.mask & ~(s.finished[:, None] & (torch.arange(s.ids.size(1)) == s.stop[:, None] - 1)))

    a, _ = first_gradient("online_dpo", PAIRS, monkeypatch)
    b, _ = first_gradient("online_dpo", PAIRS, monkeypatch, sample=padded)
    c, _ = first_gradient("online_dpo", PAIRS, monkeypatch, sample=endless)
    assert (a - b).norm() < 1e-9 * a.norm() and (a - c).norm() > 1e-2 * a.norm()


def watched(args, monkeypatch):
    """-> the weights of the policy before each optimizer step, and the reference's"""
    held, policies, refs, update, ledger = {}, [], [], common.Run.update, online_dpo.memory.Ledger

    def keep(**models):
        held.update(models)
        return ledger(**models)

    def watch(self, step, policy, *more):
        policies.append(flat(policy))
        refs.append(flat(held["ref"]))
        update(self, step, policy, *more)

    with monkeypatch.context() as m:
        m.setattr(online_dpo.memory, "Ledger", keep)
        m.setattr(common.Run, "update", watch)
        assert main("online_dpo", *args) == 0
    return policies, refs


def flat(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def test_the_reference_is_fixed_or_the_last_round_s_policy(ends, monkeypatch):
    """Six steps in four rounds: from steps 0, 1, 3 and 4. The policy meets no reward that is always the same, so every step moves it."""
    monkeypatch.chdir(ends)
    (ends / "number.py").write_text(NEVER_TIED)
    args = [*PAIRS[:-1], "number.py:number", "--steps", 6, "--warmup", 0, "--rounds", 4, "--out", "ref/x.pt"]
    start = flat(load("ends.pt")[0])
    policies, refs = watched(args, monkeypatch)
    assert all(torch.equal(ref, start) for ref in refs) and not torch.equal(policies[-1], start)
    policies, refs = watched([*args, "--ref-update", "per-round"], monkeypatch)
    assert [next(j for j in range(6) if torch.equal(ref, policies[j])) for ref in refs] == [0, 1, 1, 3, 4, 4]


def test_a_round_is_sampled_at_once_and_trained_on_once(ends, monkeypatch):
    """Two rounds of 2 and 3 steps: their batches are sampled before any of them is trained on, and each step has one of its own."""
    monkeypatch.chdir(ends)
    events, seen, update = [], [], common.Run.update

    def keep(*args):
        events.append("sample")
        return sample(*args)

    def watch(self, *more):
        events.append("update")
        update(self, *more)

    monkeypatch.setattr(online_dpo, "sample", keep)
    monkeypatch.setattr(common.Run, "update", watch)
    take = online_dpo.Round.__getitem__
    monkeypatch.setattr(online_dpo.Round, "__getitem__", lambda self, step: (seen.append(take(self, step)[0]), take(self, step))[1])
    assert main("online_dpo", *PAIRS, "--steps", 5, "--rounds", 2, "--log-every", 1, "--out", "rounds/x.pt") == 0
    assert events == ["sample"] * 2 + ["update"] * 2 + ["sample"] * 3 + ["update"] * 3
    assert len(seen) == 5 and not any(a.ids.shape == b.ids.shape and torch.equal(a.ids, b.ids) for a, b in zip(seen, seen[1:]))
    labels = [line["labels"] for line in lines(ends / "rounds/x.jsonl")[1:-1]]
    assert labels[0] == labels[1] <= 16 and labels[2] == labels[4] <= 40 and labels[4] > labels[0]


@pytest.mark.parametrize("more", [[], ["--judge", "judge.pt", "--label", "argmax", "--samples-per-prompt", "3", "--loss", "ipo"]])
def test_end_to_end(more, ends, tmp_path, monkeypatch, capsys):
    """Exit code, documented finite figures, the ledger's models, a checkpoint that evaluates to the same."""
    monkeypatch.chdir(tmp_path)
    for name in ("ends.pt", "judge.py", "judge.pt"):
        shutil.copy(ends / name, tmp_path)
    args = ["--init", "ends.pt", *TINY, "--eval-every", 2, *(more or ["--reward", "judge.py:odd"])]
    assert main("online_dpo", *args) == 0
    said = capsys.readouterr().out
    first, *steps, last = lines(tmp_path / "out/reviews/online_dpo.jsonl")
    final, log = last["final"], [line for line in steps if "loss" in line]
    held = [("policy", True), ("ref", False)] + [("reward", False)] * bool(more)
    assert [(m["role"], m["trainable"]) for m in final["models"]] == held and f"models held: {len(held)}" in said
    numbers = [x for x in (final | log[-1]).values() if isinstance(x, (int, float))]
    assert all(map(math.isfinite, numbers)) and {"sample_ms", "update_ms", "labels", "sampled_tokens", "kl", "win_rate"} <= set(final)
    documented(steps, final)
    assert log[0]["loss"] == pytest.approx(0.25 if more else math.log(2), abs=1e-6) and log[0]["rewards/accuracies"] == 0
    assert final["labels"] == log[-1]["labels"] <= 12 and final["forward_passes"] == (2.5 + 1 + 1.5 if more else 3)
    assert (load("out/reviews/online_dpo.pt")[0].wte.weight != load("ends.pt")[0].wte.weight).any()
    assert ("score" in final) == bool(more)
    assert main("evaluate", "out/reviews/online_dpo.pt", "--device", "cpu") == 0
    assert f"{final['kl']:.2f} ± {final['kl_se']:.2f}" in capsys.readouterr().out


# ---- judges


def test_a_judge_reads_text_with_its_own_vocabulary(ends, tmp_path, monkeypatch, capsys):
    """260 tokens where the policy has 748: the score is that of the text in the judge's own tokens, with an end token where the response
    ended; a score of one that did not end loses --missing-eos-penalty; evaluate.py finds the judge again."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ends / "ends.pt", tmp_path)
    (tmp_path / "text.jsonl").write_text('{"prompt": "A drama", "completion": "The plot is fine."}\n' * 20)
    make_vocab(["text.jsonl", "--size", "260", "--out", "own.tiktoken"])
    own, policy_s = data.tokenizer("own.tiktoken"), data.tokenizer()
    judge = ScalarGPT(GPTConfig(own.size, 64, 1, 1, 8), seed=5)
    with torch.no_grad():
        judge.head.weight *= 100
    save(judge, "elsewhere.pt", method="reward_model", task="text.jsonl", steps=1, reward=None, tokenizer=own.meta)
    compute = common.Compute(common.Options(device="cpu"))
    reward = evaluate.Reward(compute, data.task("reviews"), "rm").open(policy_s, "elsewhere.pt", 256, judge=True)
    prompt, answers = "A drama, The Last Road:", [(" The plot is fine.", True), (" Skip it", False)]
    rows = [(tuple(policy_s.encode(prompt)), tuple(policy_s.answer(y) if end else policy_s.encode(y))) for y, end in answers]
    batch = data.pad(rows)
    s = Samples(batch.ids, batch.mask, torch.zeros(2, batch.ids.size(1) - 1), torch.tensor([True, False]))
    texts = [own.encode(prompt) + (own.answer(y) if end else own.encode(y)) for y, end in answers]
    expected = [judge.values(torch.tensor([text]))[0, -1].item() for text in texts]
    assert reward([(rows[0][0], prompt, {})], s).tolist() == pytest.approx(expected, rel=1e-5)
    long = "A drama, " * 30 + "The Last Road:"  # of a prompt that is too long the judge reads the end
    cut = [(own.encode(long) + own.answer(answers[0][0]))[-64:]]
    assert reward([(rows[0][0], long, {})], s.take(torch.tensor([0]))).item() == pytest.approx(
        judge.values(torch.tensor(cut))[0, -1].item(), rel=1e-5)  # fmt: skip
    args = [*ENDS, *TINY, "--judge", "elsewhere.pt"]
    seen, kept, look = [], [], online_dpo.choose
    monkeypatch.setattr(online_dpo, "choose", lambda r, u=None: (seen.append(r), look(r, u))[1])
    monkeypatch.setattr(online_dpo, "sample", lambda *more: (kept.append(sample(*more)), kept[-1])[1])
    for penalty in (0.0, 5.0):
        assert main("online_dpo", *args, "--missing-eos-penalty", penalty, "--steps", 1) == 0
    missing = ~kept[0].finished
    assert 0 < missing.sum() < len(missing) and torch.equal(kept[0].ids, kept[1].ids)
    assert (seen[0] - seen[1]).flatten().tolist() == pytest.approx((5.0 * missing).tolist(), abs=1e-4)
    assert capsys.readouterr().out.count("elsewhere.pt judges the responses") == 3
    for more in ([], ["--reward", "rm"]):
        assert main("evaluate", "out/reviews/online_dpo.pt", "--device", "cpu", *more) == 0
        assert "score of the reward model" in capsys.readouterr().out
    assert main("grpo", *ENDS, "--reward", "rm", "--reward-model", "elsewhere.pt") == 2  # no judge: it started from the same checkpoint
    save(ScalarGPT(GPTConfig(4, 8, 1, 1, 8)), "world.pt", method="reward_model", task="exact", tokenizer=WORLD.tokenizer)
    assert main("online_dpo", *ENDS, "--judge", "world.pt") == 2
    assert "exact has a vocabulary of its own" in capsys.readouterr().err


# ---- learning


@pytest.mark.slow
def test_online_dpo_ends_near_the_optimum(world, monkeypatch, capsys):
    """With the defaults below 0.25 nats of π*; with argmax it is elsewhere."""
    monkeypatch.chdir(world)
    assert main("online_dpo", "--task", "exact", "--device", "cpu") == 0
    assert lines(world / "out/exact/online_dpo.jsonl")[-1]["final"]["kl_star"] < 0.25
    assert main("online_dpo", "--task", "exact", "--label", "argmax", "--out", "argmax.pt", "--device", "cpu") == 0
    assert lines(world / "argmax.jsonl")[-1]["final"]["kl_star"] > 0.5
    assert "no optimum of this loss is known" in capsys.readouterr().out


def test_on_exact_each_prompt_is_asked_as_often(world, monkeypatch):
    """A batch of 64 prompts has each of the four as often; the policy comes nearer to π* than 1.5 nats, where it starts."""
    monkeypatch.chdir(world)
    seen = []
    monkeypatch.setattr(online_dpo, "sample", lambda model, prompts, *more: (seen.append(prompts), sample(model, prompts, *more))[1])
    args = ["--task", "exact", "--batch-size", 64, "--steps", 60, "--warmup", 5, "--eval-every", 30, "--lr", 1e-3, "--device", "cpu"]
    assert main("online_dpo", *args, "--out", "near.pt") == 0
    assert all([prompts.count(x) for x in prompts] == [16] * 64 for prompts in seen[-60:])
    evals = [line["eval"] for line in lines(world / "near.jsonl") if "eval" in line]
    assert evals[-1]["kl_star"] < 1.2 and evals[-1]["kl_optimum"] == pytest.approx(evals[-1]["kl_star"])


def test_a_policy_of_one_answer_learns_nothing(ends, monkeypatch, capsys):
    """All samples equal: no label is asked for, and every loss is 0."""
    monkeypatch.chdir(ends)
    model, meta = load("ends.pt")
    model = GPT(model.config, seed=1)
    with torch.no_grad():
        model.norm.bias += 1.0
        model.wte.weight[65] += 40.0 / model.config.n_embd
    save(model, "single.pt", **meta)
    assert main("online_dpo", "--init", "single.pt", *TINY, "--reward", "judge.py:odd", "--out", "single/x.pt", "--warmup", 0) == 0
    first, *steps, last = lines(ends / "single/x.jsonl")
    assert [line["equal_fraction"] for line in steps] == [1.0] * 3 and [line["loss"] for line in steps] == [0.0] * 3
    assert last["final"]["labels"] == 0 and torch.equal(flat(load("single/x.pt")[0]), flat(model))
