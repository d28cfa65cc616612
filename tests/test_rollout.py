"""Rollouts: all columns are cut, shuffled and trimmed together; DAPO's dynamic sampling; the rounds
of online DPO."""

import math
import shutil
from types import SimpleNamespace

import pytest
import test_steps
import torch
from conftest import ENDS, TINY, documented, few_prompts, lines, main
from torch.nn.utils import parameters_to_vector

import dapo
import online_dpo
from gpt import load
from training import Rollout

watch = test_steps.watch


@pytest.fixture
def few_test_prompts(monkeypatch):
    """The figures at the end of a run are not looked at."""
    few_prompts(monkeypatch, 8)


# ---- rollouts


def numbered(lengths, prompt=1):
    """A Rollout whose every entry tells its row and, where it has a column for each token, its
    column: row · 100 + column, 0 in the padding"""
    n, T = len(lengths), prompt + max(lengths)
    column, length = torch.arange(T), torch.tensor(lengths)[:, None]
    text, row = column < prompt + length, torch.arange(n)[:, None]
    ids = (100 * row + column) * text
    return Rollout(
        ids=ids,
        mask=text & (column >= prompt),
        logp=ids * 1.0,
        finished=row[:, 0] % 2 == 0,
        adv=row * 1.0,
        returns=ids * 2.0,
        ref_logp=None,
        old_logp=ids * 3.0,
    )


def test_rows_are_taken_and_joined():
    s = numbered([2, 4])
    assert s.length.tolist() == [[2], [4]] and s.tokens == 2 + 4 and len(s) == 2
    part = s[torch.tensor([0])]
    assert part.ids.tolist() == [[0, 1, 2]] and part.mask.tolist() == [[False, True, True]]
    assert part.logp.tolist() == [[0.0, 1.0, 2.0]] and part.adv.tolist() == [[0.0]]
    assert part.tokens == 2 and part.ref_logp is None
    both = Rollout.cat([part, s])
    assert both.ids.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 0, 0], [100, 101, 102, 103, 104]]
    assert both.mask.tolist()[0] == [False, True, True, False, False]
    assert both.logp.shape == (3, 5) and both.adv.shape == (3, 1) and both.ref_logp is None
    assert both.finished.tolist() == [True, True, False]
    changed = s | {"adv": s.adv + 1}
    assert changed.adv.tolist() == [[1.0], [2.0]] and s.adv.tolist() == [[0.0], [1.0]]
    assert len(s[2:]) == 0


@pytest.mark.parametrize("updates, parts", [(1, 3), (2, 3), (2, 1), (3, 12)])
def test_minibatches_are_cut_shuffled_and_trimmed_whole(updates, parts):
    """Each pass is a partition of the rows, in another order; each row keeps all that is its own,
    and no column of a part is padding alone. The first has no old log-probs, all others have."""
    s = numbered([1, 7, 2, 5, 3, 3, 4, 2, 6, 1, 1, 5])
    generator = torch.Generator().manual_seed(0)
    found = list(s.minibatches(updates, parts, generator))
    assert [len(part) for part in found] == [12 // parts] * parts * updates
    orders = []
    for i, part in enumerate(found):
        row, width = part.adv[:, 0].long(), part.ids.size(1)
        assert width == 1 + part.length.max() and part.ref_logp is None
        for name, x in vars(s[row]).items():
            mine = getattr(part, name)
            if name == "old_logp" and i == 0:
                assert mine is None
            elif x is not None:
                assert torch.equal(mine, x) and mine.dtype == x.dtype, name
        assert torch.equal(part.logp, s.logp[row, :width])  # what is cut off is padding
        assert part.logp.sum() == s.logp[row].sum()
        orders.append(row.tolist())
    passes = [sum(orders[i : i + parts], []) for i in range(0, len(orders), parts)]
    assert all(sorted(order) == list(range(12)) for order in passes)
    assert all(order == sorted(order) for order in orders)  # groups stay together
    differ = len({tuple(order) for order in [*passes, range(12)]})
    assert differ == (1 if parts == 1 else updates + 1)


def test_one_minibatch_stands_as_it_is_and_draws_nothing():
    s, generator = numbered([2, 4, 3]), torch.Generator().manual_seed(0)
    (only,) = s.minibatches(1, 1, generator)
    assert torch.equal(only.ids, s.ids) and only.old_logp is None and s.old_logp is not None
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())
    again = torch.Generator().manual_seed(0)
    parts = [[x.ids.tolist() for x in s.minibatches(2, 3, g)] for g in (generator, again)]
    assert parts[0] == parts[1]
    assert [len(x) for x in s.minibatches(1, 64, generator)] == [1, 1, 1]  # at most one per row


# ---- DAPO's dynamic sampling


class Rounds:
    """Prompts, run and judge in one: gives one round of verdicts after another; each response is
    the number of its place among all."""

    longest = 8

    def __init__(self, P, rounds):
        self.batch_size, self.count = P, 0
        self.rounds = [torch.tensor(verdicts).bool() for verdicts in rounds]

    def __next__(self):
        return self.rounds.pop(0)

    def sample(self, policy, verdicts, *_):
        n, width = verdicts.numel(), 2 + self.count % 3
        ids = torch.arange(self.count, self.count + n)[:, None].expand(n, width)
        self.count += n
        ends = torch.ones(n, dtype=torch.bool)
        return Rollout(ids=ids, mask=ids >= 0, logp=torch.zeros(n, width), finished=ends)

    def correct(self, verdicts, rollout):
        return verdicts.flatten()

    def kept(self, rollout, rows):
        return rollout[rows]

    def refill(self, group, max_rounds):
        o = SimpleNamespace(group=group, max_rounds=max_rounds, temperature=1.0)
        return dapo.dynamic_sampling(None, self, self, self, o)


def test_the_refill_holds_mixed_groups_only_and_drops_the_surplus():
    """Groups of 2, three needed: round 1 has one mixed, round 2 none, round 3 three, of which two
    are taken, in order."""
    first, second = [[1, 1], [0, 1], [0, 0]], [[1, 1], [1, 1], [0, 0]]
    rounds = Rounds(3, [first, second, [[1, 0], [1, 0], [0, 1]]])
    s, reward, figures = rounds.refill(2, 5)
    assert s.ids[:, 0].tolist() == [2, 3, 12, 13, 14, 15]
    assert reward.tolist() == [[-1, 1], [1, -1], [1, -1]]
    assert figures["num_gen_batches"] == 3 and figures["kept_fraction"] == pytest.approx(4 / 9)
    assert figures["accuracy"] == pytest.approx(10 / 18)


def test_random_refills_never_hold_a_constant_group():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        verdicts = torch.rand(30, 4, 3, generator=generator) < 0.8
        s, reward, _ = Rounds(5, verdicts.tolist()).refill(3, 30)
        assert reward.shape == (5, 3) and len(s) == 15
        assert torch.equal(2.0 * verdicts.flatten()[s.ids[:, 0]] - 1, reward.flatten())
        assert (reward.amin(1) < reward.amax(1)).all()


EASY, HARD = [[1, 1]] * 3, [[0, 0]] * 3


@pytest.mark.parametrize(
    "rounds, accuracy, mixed",
    [([EASY, EASY], 1, 0), ([HARD, HARD], 0, 0), ([[[1, 0], [1, 1]], [[1, 0]]], 4 / 6, 2)],
)
def test_a_refill_that_starves_holds_what_it_found(rounds, accuracy, mixed):
    """The rounds are used up, and no more than they are drawn."""
    rounds = Rounds(3, [*rounds, EASY])
    s, reward, figures = rounds.refill(2, 2)
    assert len(rounds.rounds) == 1 and figures["num_gen_batches"] == 2
    assert reward.shape == (mixed, 2) and len(s) == 2 * mixed
    assert figures["accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("reward, word", [("0.1", "too easy"), ("-0.1", "too hard")])
def test_a_run_that_finds_no_mixed_groups(
    reward, word, ends, few_test_prompts, monkeypatch, capsys
):
    """At the first step it is an error, and nothing is trained; later the run ends early, with its
    checkpoint and summary."""
    monkeypatch.chdir(ends)
    (ends / "same.py").write_text(f"def same(prompt, completion): return {reward}\n")
    args = [*ENDS, *"--steps 4 --batch-size 4 --group 4 --max-rounds 2 --out starved/x.pt".split()]
    shutil.rmtree("starved", ignore_errors=True)
    assert main("dapo", *args, "--reward", "same.py:same", "--log-every", 1) == 1
    (said,) = capsys.readouterr().err.splitlines()
    found = "--max-rounds 2 found 0 of the 4 mixed groups that a step needs"
    assert said == f"dapo.py: {found}: {word}, or too few rounds"
    assert not (ends / "starved/x.pt").exists()
    sampling, calls = dapo.dynamic_sampling, []

    def twice(*args):
        calls.append(1)
        starved = None, torch.zeros(0, 4), {"accuracy": 1.0}
        return sampling(*args) if len(calls) < 3 else starved

    monkeypatch.setattr(dapo, "dynamic_sampling", twice)
    assert main("dapo", *args, "--reward", "judge.py:odd", "--log-every", 3) == 0
    out = capsys.readouterr().out
    assert f"{found}: too easy" in out and "--resume" not in out
    assert "The run ends after step 2 of 4, with what it has learned" in out
    record = lines(ends / "starved/x.jsonl")
    assert [line["step"] for line in record[1:-1]] == [2] and "reward" in record[-1]["final"]
    assert load("starved/x.pt")[1]["steps"] == 2 and not (ends / "starved/x.state").exists()


def test_fewer_prompts_than_a_batch_and_fewer_responses_than_minibatches(
    ends, tmp_path, monkeypatch
):
    """A file with one training prompt: the batch is the set, for the refill too; 4 responses make
    at most 4 minibatches."""
    monkeypatch.chdir(tmp_path)
    for name in ("ends.pt", "judge.py"):
        shutil.copy(ends / name, tmp_path)
    (tmp_path / "two.jsonl").write_text('{"prompt": "Who?"}\n{"prompt": "Why?"}\n')
    args = "--task two.jsonl --steps 2 --group 4 --minibatches 64 --log-every 1".split()
    for script in ("grpo", "dapo"):
        assert main(script, *ENDS, *args, "--reward", "judge.py:odd") == 0
        line = lines(tmp_path / f"out/two/{script}.jsonl")[1]
        assert 5 < line["entropy"] < math.log(748)  # a nearly random model's


# ---- the rounds of online DPO


def test_the_best_is_compared_with_the_worst():
    reward = [[1.0, 3.0, 2.0], [0.0, -1.0, 5.0], [2.0, 2.0, 2.0]]
    reward = torch.tensor(reward, requires_grad=True)

    def places(*args):
        return [x.tolist() for x in online_dpo.choose(*args)]

    assert places(reward) == [[1, 2, 2], [0, 1, 0]]
    assert not online_dpo.choose(reward)[0].is_floating_point()  # nothing can be learned through it
    share = 1 / (1 + math.exp(-2))  # σ(3 - 1)
    assert places(reward[:1], torch.tensor([share - 1e-6])) == [[1], [0]]
    assert places(reward[:1], torch.tensor([share + 1e-6])) == [[0], [1]]
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    chosen, _ = online_dpo.choose(torch.tensor([[0.5, -0.7]]).expand(20_000, 2), draws)
    expected = 1 / (1 + math.exp(-1.2))
    assert abs((chosen == 0).float().mean().item() - expected) < 4 * 0.5 / 20_000**0.5
    swapped, lost = online_dpo.choose(reward[:2].flip(1), draws[:2])
    assert [(2 - swapped).tolist(), (2 - lost).tolist()] == places(reward[:2], draws[:2])
    with pytest.raises(AssertionError):
        online_dpo.choose(reward[:, :1])


ONLINE = "online_dpo --init ends.pt --batch-size 8 --reward judge.py:odd"


@pytest.mark.parametrize(
    "options, sampled",
    [("", [0, 0, 0, 0, 0, 0]), ("--ref-update per-round", [0, 1, 1, 3, 4, 4])],
)
def test_the_reference_is_fixed_or_the_last_round_s_policy(options, sampled, watch):
    """Six steps in four rounds: from steps 0, 1, 3 and 4. Equal rewards are drawn lots for, so
    every step moves the policy."""
    found = watch(f"{ONLINE} --rounds 4 {options}", 6)
    models = [step.models for _, (step,), _ in found]
    policies = [parameters_to_vector(x.policy.parameters()) for x in models]
    for ref, round_began in zip((x.ref for x in models), sampled, strict=True):
        same = [torch.equal(parameters_to_vector(ref.parameters()), p) for p in policies]
        assert same == [i == round_began for i in range(6)]


def test_a_round_is_sampled_at_once_and_trained_on_once(watch):
    """Two rounds of 2 and 3 steps: their batches are sampled before any of them is trained on, and
    each step has one of its own."""
    found = watch(f"{ONLINE} --rounds 2", 5)
    drawn = [rollouts for *_, rollouts in found]
    assert list(map(len, drawn)) == [2, 0, 3, 0, 0]
    lengths = [rollout.length.double().mean().item() for rollout in sum(drawn, [])]
    record = [line for line, *_ in found]
    assert [line["completions/mean_length"] for line in record] == pytest.approx(lengths)
    assert len(set(lengths)) == 5
    labels = [line["labels"] for line in record]
    assert labels[0] == labels[1] <= 16 and labels[2] == labels[4] <= 40 and labels[4] > labels[0]


def test_online_dpo_end_to_end(ends, tmp_path, call):
    """Exit code, documented finite figures, the ledger's models, a checkpoint that evaluates to the
    same."""
    for name in ("ends.pt", "judge.pt"):
        shutil.copy(ends / name, tmp_path)
    judged = "--reward judge.pt --label argmax --samples-per-prompt 3 --loss ipo".split()
    args = ["--init", "ends.pt", *TINY, "--eval-every", 2, *judged]
    assert "models held: 3" in call("online_dpo", *args, cwd=tmp_path)
    _, *steps, last = lines(tmp_path / "out/reviews/online_dpo.jsonl")
    final, log = last["final"], [line for line in steps if "loss" in line]
    held = [(model["role"], model["trainable"]) for model in final["models"]]
    assert held == [("policy", True), ("ref", False), ("reward", False)]
    keys = "sample_ms update_ms labels sampled_tokens kl win_rate score".split()
    assert all(math.isfinite(final[key]) for key in keys)
    documented(steps, final)
    assert log[0]["loss"] == pytest.approx(0.25) and log[0]["rewards/accuracies"] == 0
    assert final["labels"] == log[-1]["labels"] <= 12
    assert final["forward_passes"] == 2.5 + 1 + 1.5
    end = load("out/reviews/online_dpo.pt")[0]
    assert (end.wte.weight != load("ends.pt")[0].wte.weight).any()
    again = call("evaluate", "out/reviews/online_dpo.pt", "--device", "cpu", cwd=tmp_path)
    assert f"{final['kl']:.2f} ± {final['kl_se']:.2f}" in again
