"""PPO's loop: its gradients by a plain loop, what is old and what is frozen, the score of a response that does not end."""
import math
import re

import pytest
import torch
from conftest import BATCH, ENDS, TINY, documented, first_gradient, killed, lines, main

import common
import data
import evaluate
import ppo
from gpt import ScalarGPT, load, sample

TOKENIZER = data.tokenizer()
RM = [*ENDS, "--batch-size", 32, "--reward-model", "judge.pt"]
ONE = ["--updates", 1, "--minibatches", 1]


def spy(monkeypatch, name, kept, of=ppo):
    """Replaces of.name by itself, which keeps its arguments and what it returns."""
    f = getattr(of, name)
    monkeypatch.setattr(of, name, lambda *args: kept.append((args, f(*args))) or kept[-1][1])


def keep_models(monkeypatch):
    """-> (role -> model, role -> its weights at the start) of the runs that follow"""
    held, start, begin = {}, {}, common.Run.begin

    def keep(self, models, *args, **state):
        held.update(models.models)
        start.update({role: {k: v.clone() for k, v in model.state_dict().items()} for role, model in models.models.items()})
        return begin(self, models, *args, **state)

    monkeypatch.setattr(common.Run, "begin", keep)
    return held, start


def same(a, b):
    """Whether the weights a are those of b, to the bit"""
    return all(torch.equal(x, b[k]) for k, x in a.items())


def plain_values(model, ids):
    """(T,) ids -> (T,) values, of one row alone"""
    return torch.nn.functional.linear(model.trunk.hidden(ids[None])[0], model.head.weight, model.head.bias)[:, 0]


def test_the_first_gradients_are_the_equations(ends, monkeypatch):
    """The policy's and the critic's, token by token in a plain loop from the docstring's equations, float64. π = π_ref: no KL in the
    rewards; the reward model's score at the last token, -5 where there is no end; the mean is over all 32 responses' tokens."""
    monkeypatch.chdir(ends)
    kept = []
    spy(monkeypatch, "rollout", kept)
    args = [*RM, *ONE, "--missing-end-score", -5, "--lam", 0.9, "--gamma", 0.8, "--vf-coef", 0.3]
    found, metrics = first_gradient("ppo", args, monkeypatch)
    policy, critic, s = load("ends.pt")[0].double(), load("judge.pt")[0].double(), kept[0][1][1]
    assert 0 < s.finished.float().mean() < 1
    tokens = []  # (log π, V with gradient, A, R) of every response token
    for i in range(32):
        row, first = s.ids[i, : s.stop[i]], int(s.mask[i].int().argmax())
        logp = policy(row[None])[0, :-1].log_softmax(-1).gather(1, row[1:, None])[first - 1 :, 0]
        values, score = plain_values(critic, row), -5.0
        if s.finished[i]:
            score = values[-1].item()  # the reward model is the critic's start, read at the end token
        V, n, A = values[first - 1 : -1], len(logp), 0.0
        for t in reversed(range(n)):
            delta = (score if t == n - 1 else 0.8 * V[t + 1].item()) - V[t].item()
            A = delta + 0.8 * 0.9 * A
            tokens.append((logp[t], V[t], A, A + V[t].item()))
    adv = torch.tensor([A for *_, A, _ in tokens]).double()
    white = (adv - adv.mean()) / (adv.var(correction=0) + 1e-8).sqrt()
    loss = sum(-a * logp for (logp, *_), a in zip(tokens, white.tolist())) / len(tokens)
    error = sum(0.5 * (V - R) ** 2 for _, V, _, R in tokens) / len(tokens)
    parameters = [*policy.parameters(), *critic.parameters()]
    expected = torch.autograd.grad(loss + 0.3 * error, parameters)
    torch.testing.assert_close(found, torch.cat([g.flatten() for g in expected]), rtol=1e-5, atol=1e-8)
    assert metrics["loss/value_avg"] == pytest.approx(error.item(), rel=1e-6) and metrics["loss/policy_avg"] == pytest.approx(0, abs=1e-6)
    assert metrics["policy/approxkl_avg"] == metrics["policy/clipfrac_avg"] == metrics["val/clipfrac_avg"] == 0.0


def test_what_is_old_is_of_before_the_rollout_s_updates(ends, monkeypatch):
    """Two passes of two minibatches, large steps: the first ratio is exactly 1, later ones are not; both passes meet the same old
    log-probs (those that the tokens were drawn with), advantages and values, in another order. Advantages are whitened over the
    rollout, not over a minibatch. What is logged is the mean over the four, over response tokens."""
    monkeypatch.chdir(ends)
    policy, value, drawn, norms, clip = [], [], [], [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: (norms.append(clip(*a)), norms[-1])[1])
    spy(monkeypatch, "ppo_loss", policy)
    spy(monkeypatch, "value_loss", value)
    spy(monkeypatch, "rollout", drawn)
    args = ["--temperature", 0.7, "--eps", 0.1, "--eps-v", 0.15, "--steps", 1, "--updates", 2, "--minibatches", 2, "--warmup", 0,
            "--lr", 0.01, "--dtype", "float64", "--log-every", 1]  # fmt: skip
    assert main("ppo", *RM, *args, "--missing-end-score", -5, "--out", "old/x.pt") == 0
    assert len(policy) == len(value) == 4 and torch.equal(*policy[0][0][:2])
    masks = [old != 0 for (_, old, *_), _ in policy]
    assert all((logp - old)[m].abs().max() > 1e-3 for ((logp, old, *_), _), m in list(zip(policy, masks))[1:])
    for calls, place in ((policy, 1), (policy, 2), (value, 1), (value, 2)):
        first, second = (torch.cat([args[place][m] for (args, _), m in list(zip(calls, masks))[i : i + 2]]).sort()[0] for i in (0, 2))
        torch.testing.assert_close(first, second)
    sampled = drawn[0][1][1]
    first = torch.cat([old[m] for ((_, old, *_), _), m in zip(policy[:2], masks)]).sort()[0]
    torch.testing.assert_close(first.float(), sampled.logp[sampled.mask[:, 1:]].sort()[0], rtol=0, atol=1e-4)  # at the same temperature
    adv = [args[2][m] for (args, _), m in zip(policy, masks)]
    whole = torch.cat(adv[:2])
    assert whole.mean().abs() < 1e-6 and whole.var(correction=0).item() == pytest.approx(1, abs=1e-6) and adv[0].mean().abs() > 1e-3
    expected = {"policy/clipfrac_avg": [], "val/clipfrac_avg": [], "policy/approxkl_avg": [], "loss/policy_avg": [], "loss/value_avg": []}
    for ((logp, old, A, _), loss), ((V, old_V, R, _), error), m in zip(policy, value, masks):
        ratio = (logp - old).exp()
        clipped = ((ratio > 1.1) & (A > 0)) | ((ratio < 0.9) & (A < 0))
        kept = (V - R) ** 2 < ((old_V + (V - old_V).clamp(-0.15, 0.15)) - R) ** 2
        shares = (clipped, kept, (logp - old) ** 2 / 2, loss, error)
        for name, x in zip(expected, shares):
            expected[name].append(x[m].double().mean().item())
    line = lines(ends / "old/x.jsonl")[1]
    assert line["grad_norm"] == pytest.approx(sum(norms).item() / 4)
    for name, shares in expected.items():
        assert line[name] == pytest.approx(sum(shares) / 4, rel=1e-6), name
    assert line["policy/clipfrac_avg"] > 0 < line["val/clipfrac_avg"] and line["kl"] == pytest.approx(0, abs=1e-6)  # π = π_ref
    R, V = torch.cat([a[2][m] for (a, _), m in zip(value[:2], masks)]), torch.cat([a[1][m] for (a, _), m in zip(value[:2], masks)])
    assert line["explained_variance"] == pytest.approx(1 - ((R - V).var() / R.var()).item(), abs=1e-4)


def test_four_models_two_of_them_frozen(ends, monkeypatch):
    """The critic starts from the reward model, the policy from --init; after three steps both have changed, and reference and reward
    model are to the bit what they were, without a gradient. With another reward three models, and a critic on the policy's trunk."""
    monkeypatch.chdir(ends)
    held, start = keep_models(monkeypatch)
    assert main("ppo", *RM, "--steps", 3, "--beta", 0.1, "--out", "four/x.pt") == 0
    assert list(held) == ["policy", "critic", "ref", "reward"]
    assert same(start["critic"], start["reward"]) and same(start["policy"], start["ref"])
    for role, model in held.items():
        frozen = role in ("ref", "reward")
        assert same(start[role], model.state_dict()) == frozen, role
        assert all(p.requires_grad != frozen and (p.grad is None or not frozen) for p in model.parameters()), role
    pointers = {p.data_ptr() for model in held.values() for p in model.parameters()}
    assert len(pointers) == sum(len(list(model.parameters())) for model in held.values())  # no weight is shared
    rm, _ = load("judge.pt")
    assert same(rm.state_dict(), start["critic"])
    held.clear()
    assert main("ppo", *ENDS, *BATCH, "--steps", 1, "--out", "three/x.pt") == 0
    assert list(held) == ["policy", "critic", "ref"] and isinstance(held["critic"], ScalarGPT)
    assert same({f"trunk.{k}": v for k, v in start["policy"].items()}, start["critic"])
    assert start["critic"]["head.weight"].abs().sum() == start["critic"]["head.bias"] == 0


def test_each_loss_moves_its_own_network(ends, monkeypatch):
    """c_v = 0: the critic stays as it was, the policy moves. With a policy loss of 0 the policy stays, and the critic moves."""
    monkeypatch.chdir(ends)
    held, start = keep_models(monkeypatch)
    for loss, vf, moved in ((ppo.ppo_loss, 0.0, "policy"), (lambda logp, *_: 0.0 * logp, 0.1, "critic")):
        monkeypatch.setattr(ppo, "ppo_loss", loss)
        assert main("ppo", *ENDS, *BATCH, "--steps", 2, "--vf-coef", vf, "--out", "own/x.pt") == 0
        for role in ("policy", "critic"):
            assert same(start[role], held[role].state_dict()) == (role != moved), (moved, role)


def test_the_score_of_a_response_that_does_not_end(ends, monkeypatch, capsys):
    """By default the first percentile of the reward model's scores of the policy's own responses; printed, in the record, given to
    every unended response in training and in the evaluations, by evaluate.py too; --missing-end-score replaces it."""
    monkeypatch.chdir(ends)
    kept = []
    spy(monkeypatch, "token_rewards", kept)
    spy(monkeypatch, "rollout", kept)
    args = [*RM, *ONE, "--steps", 1, "--log-every", 1]
    assert main("ppo", *args, "--out", "end/x.pt") == 0
    said = float(re.search(r"a response that does not end scores (-?[\d.]+)", capsys.readouterr().out)[1])
    record = lines(ends / "end/x.jsonl")
    chosen = record[-1]["final"]["missing_end_score"]
    assert said == pytest.approx(chosen, abs=0.006)

    rm, policy = load("judge.pt")[0], load("ends.pt")[0]
    prompts = [TOKENIZER.encode(x) for x, _ in data.task("reviews").prompts(512, 7)]
    s = sample(policy, prompts, 8, TOKENIZER.end_id, generator=torch.Generator().manual_seed(9))
    scores = rm.score(s.ids, s.mask).detach()
    below = (scores[s.finished] < chosen).float().mean()
    assert 0.0 <= below < 0.04  # a hundredth, of another 512

    (_, (_, drawn)), ((score, *_), _) = kept
    own = rm.score(drawn.ids, drawn.mask).detach()
    assert not drawn.finished.all() and (score[~drawn.finished] == chosen).all()
    torch.testing.assert_close(score[drawn.finished], own[drawn.finished])
    assert record[1]["reward"] == pytest.approx(score.mean().item())
    assert main("ppo", *args, "--missing-end-score", -50, "--out", "end/y.pt") == 0
    assert (kept[3][0][0][~kept[2][1][1].finished] == -50).all()
    final = lines(ends / "end/y.jsonl")[-1]["final"]
    assert final["score"] < -50 * (1 - final["ended"]) + 3  # the yardstick's unended count the same
    for again in ([], ["--reward", "rm"]):
        capsys.readouterr()
        assert main("evaluate", "end/y.pt", "--device", "cpu", *again) == 0
        assert re.search(rf"score of the reward model +{final['ref_score']:.2f} +{final['score']:.2f}", capsys.readouterr().out)


def test_the_score_is_part_of_the_saved_state(ends, monkeypatch):
    """A resumed run goes on with the score that it began with, whatever its first percentile would be now."""
    monkeypatch.chdir(ends)
    args = [*RM, *ONE, "--steps", 2, "--save-every", 1, "--out", "kept/x.pt"]
    monkeypatch.setattr(ppo, "first_percentile", lambda *_: (-3.0, "so"))
    killed(2, "ppo", args, monkeypatch)
    monkeypatch.setattr(ppo, "first_percentile", lambda *_: (-4.0, "so"))
    assert main("ppo", *args, "--resume") == 0
    assert lines(ends / "kept/x.jsonl")[-1]["final"]["missing_end_score"] == -3.0 == load("kept/x.pt")[1]["unended"]


def test_the_first_percentile_is_of_what_ends(ends):
    """A judge that gives -100 to what does not end, and 1, 2, 3 … to what does: of n of these, 1 + (n - 1)/100. Where nothing ends,
    of all."""
    policy, run = load(ends / "ends.pt")[0], common.Compute(common.parse(ppo.Options, ["--device", "cpu"]))
    prompts, seen = data.Prompts(data.task("reviews"), 100, 0, TOKENIZER, 200), []

    def judge(rows, s):
        assert len(rows) == len(s.ids) and all(s.ids[i, : len(row[0])].tolist() == row[0] for i, row in enumerate(rows))
        seen.append(s.finished)
        count = torch.arange(1, int(s.finished.sum()) + 1).float() + sum(int(x.sum()) for x in seen[:-1])
        return torch.full((len(rows),), -100.0).masked_scatter(s.finished, count)

    o = common.parse(ppo.Options, [])
    found, how = ppo.first_percentile(judge, policy, prompts, TOKENIZER, 8, o, run)
    n = int(torch.cat(seen).sum())
    assert sum(map(len, seen)) == 512 and n < 500 and found == pytest.approx(1 + (n - 1) / 100) and prompts.cursor == 0
    assert f"{n} of 512 end" in how and "few" not in how
    constant = lambda rows, s: torch.full((len(rows),), -7.0)  # noqa: E731
    with torch.no_grad():
        policy.wte.weight[TOKENIZER.end_id] -= 100 * policy.norm.bias.sign()
    found, how = ppo.first_percentile(constant, policy, prompts, TOKENIZER, 1, o, run)
    assert found == -7.0 and "0 of 512 end; that is few, --missing-end-score names another" in how


def test_score_and_gold_reward_stand_side_by_side(ends, monkeypatch):
    monkeypatch.chdir(ends)
    assert main("ppo", *TINY, *RM, "--steps", 4, "--eval-every", 2, "--out", "gold/x.pt") == 0
    record = lines(ends / "gold/x.jsonl")
    figures = [line["eval"] for line in record if "eval" in line] + [record[-1]["final"]]
    assert len(figures) == 3 and all({"score", "ref_score", "reward", "ref_reward", "kl"} <= set(f) for f in figures)
    for line in record:
        assert "kl" not in line or line["rlhf_reward"] == pytest.approx(line["reward"] - 0.05 * line["kl"], abs=1e-5)
    final = record[-1]["final"]
    assert [m["role"] for m in final["models"]] == ["policy", "critic", "ref", "reward"]
    policy, critic = (load(name)[0].matmul_parameters() for name in ("ends.pt", "judge.pt"))  # sampling, old, ref; values, reward; K = 2
    assert final["flops_per_token"] == (2 + 2 + 2 + 2 * 6) * policy + (2 + 2 + 2 * 6) * critic
    documented(record[1:-1], final)


# ---- exact


EXACT = ["--task", "exact", "--gamma", 1, "--lam", 1, "--device", "cpu"]


def test_the_first_step_climbs_j_whatever_the_critic_says(world, monkeypatch):
    """The loop's own first gradient from 8,192 samples against that of E[r] by enumeration, with a critic that is wrong by half of what
    rewards vary: at λ = 1 the cosine is above 0.99, at λ = 0 below 0.9. (At the first step π = π_ref, where KL has no gradient.)"""
    monkeypatch.chdir(world)
    broken = lambda self, ids: self._read(h := self.trunk.hidden(ids)) + 0.5 * torch.sin(20 * h[..., 0])  # noqa: E731
    policy = load("out/exact/sft.pt")[0].double()
    task = data.task("exact")
    yardstick = evaluate.choose_yardstick(common.Compute(common.parse(ppo.Options, ["--device", "cpu", "--dtype", "float64"])), task,
                                          data.tokenizer(own=task.tokenizer), 8)  # fmt: skip
    b = yardstick.batch
    table = policy.logprobs(b.ids, b.mask, index=b.index).sum(1).view(4, 40)
    J = (table.exp() * torch.from_numpy(task.r)).sum(1).mean()
    exact = -torch.cat([g.flatten() for g in torch.autograd.grad(J, list(policy.parameters()))])
    monkeypatch.setattr(ScalarGPT, "values", broken)
    found = {}
    for lam in (1, 0):
        args = ["--task", "exact", "--lam", lam, "--group", 2048, *ONE, "--device", "cpu"]
        gradient, _ = first_gradient("ppo", args, monkeypatch)
        found[lam] = torch.cosine_similarity(gradient[: len(exact)], exact, dim=0).item()
    assert found[1] > 0.99 and found[0] < 0.9, found


@pytest.mark.slow
def test_ppo_comes_near_the_known_optimum(world, monkeypatch):
    """60 rollouts of 128 at λ = 1: KL(π‖π*) from above 1 to below 0.2; without a penalty the same steps end further than 0.3 away."""
    monkeypatch.chdir(world)
    found = []
    for options in ([], ["--beta", 0]):
        assert main("ppo", *EXACT, "--steps", 60, "--group", 32, "--eval-every", 0, *options, "--out", "near/x.pt") == 0
        found.append(lines(world / "near/x.jsonl")[-1]["final"])
    assert found[0]["kl_star"] < 0.2 and found[0]["kl_optimum"] == pytest.approx(found[0]["kl_star"]) and found[1]["kl_star"] > 0.3
    assert [m["role"] for m in found[0]["models"]] == ["policy", "critic", "ref"] and math.isfinite(found[0]["objective"])
