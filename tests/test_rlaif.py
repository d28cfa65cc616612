"""Constitutional AI: labels, losses and skills by hand; what each phase trains on, and what it does not read; interruptions."""
import itertools
import math
import random
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, documented, lines, main, run

import common
import data
import evaluate
import rlaif
from data import Pair, reviews, skills
from data.make_vocab import main as make_vocab
from gpt import GPT, GPTConfig, load, save
from rlaif import Judge, ai_label, bradley_terry_loss, expected_rating, leave_one_out

KIND, FAIR, WARM, SPECIFIC = skills.PRINCIPLES
SMALL = ["--skill-steps", 30, "--skill-lr", 0.03, "--n-layer", 1, "--n-head", 2, "--n-embd", 16]  # enough to end an answer
DIRECT = ["--sl-steps", 3, "--steps", 3, "--batch-size", 4, "--answers", 24, "--max-new-tokens", 16, "--log-every", 1, "--warmup", 1,
          "--device", "cpu"]  # fmt: skip
SHORT = [*DIRECT, "--pm-steps", 3, "--comparisons", 24]
PHASES = ("x-skills", "x-sl", "x-pm", "x")


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    for module in (rlaif, evaluate):
        monkeypatch.setattr(module, "PROMPTS", 16)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with a/x.pt, a whole run of a small model, and the checkpoints of its phases."""
    folder = tmp_path_factory.mktemp("rlaif")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setattr(rlaif, "PROMPTS", 16)
        m.setattr(evaluate, "PROMPTS", 16)
        assert main("rlaif", *SMALL, *SHORT, "--out", "a/x.pt") == 0
    return folder


# ---- the equations, by hand


def test_the_label_is_the_mean_of_both_orders():
    """P(A) = e/(e + 1) of log-probs (1, 0); the options alone count, whatever the rest of the vocabulary has."""
    s = 1 / (1 + math.exp(-1))
    ab, ba = torch.tensor([[1.0, 0.0], [-5.0, -5.0]]), torch.tensor([[0.0, 0.0], [-2.0, -3.0]])
    assert ai_label(ab, ba).tolist() == pytest.approx([(s + 0.5) / 2, (0.5 + 1 - s) / 2])
    assert ai_label(ab - 7, ba + 3).tolist() == pytest.approx(ai_label(ab, ba).tolist())
    torch.testing.assert_close(ai_label(ba, ab), 1 - ai_label(ab, ba))  # b and a have changed places
    sure = torch.tensor([[9.0, 0.0]])
    assert ai_label(sure, sure.flip(1), clamp=0.4).item() == pytest.approx(0.6)
    assert ai_label(sure.flip(1), sure, clamp=0.4).item() == pytest.approx(0.4)
    assert ai_label(sure, sure).item() == pytest.approx(0.5)  # who always says A knows nothing
    assert not ai_label(ab.requires_grad_(), ba).requires_grad


def test_soft_labels_by_hand():
    """p = ½: least at Δ = 0, where it is log 2; p = ¾: least at Δ = log 3; p = 1: the hard label's loss."""
    delta = torch.linspace(-4, 4, 81, dtype=torch.float64, requires_grad=True)
    for p, least in ((0.5, 0.0), (0.75, math.log(3)), (0.2, -math.log(4))):
        loss = bradley_terry_loss(delta, torch.zeros_like(delta), torch.full_like(delta, p))
        assert abs(delta[loss.argmin()].item() - least) <= 0.051
        (gradient,) = torch.autograd.grad(loss.sum(), delta)
        torch.testing.assert_close(gradient, torch.sigmoid(delta) - p)
    one = [torch.tensor([x], dtype=torch.float64) for x in (2.0, 1.0, 1.0)]
    assert bradley_terry_loss(*one).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert bradley_terry_loss(one[0], one[0], 0.5 * one[1]).item() == pytest.approx(math.log(2))
    with pytest.raises(AssertionError):
        bradley_terry_loss(delta, delta[:3], delta)


def test_ratings_and_advantages_by_hand():
    logp = torch.full((4, 9), -50.0)
    logp[0, 0] = logp[1, 8] = logp[2, 2] = logp[2, 6] = 0.0  # 1; 9; 3 or 7, as likely
    logp[3] = 1.0  # all alike
    assert expected_rating(logp).tolist() == pytest.approx([-1.0, 1.0, 0.0, 0.0], abs=1e-6)
    adv = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]], requires_grad=True))
    assert adv.tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0] and not adv.requires_grad  # 1 - (2 + 6)/2 …


# ---- the skills


@pytest.mark.parametrize("principle, critique, revised", [
    (KIND, " Not kind: slow, dreadful, Skip it.", " The plot is X, but the cast feels superb. I loved the dialogues and the music. X"),
    (FAIR, " Not fair: dreadful.", " The plot is slow, but the cast feels superb. I loved the X and the music. X"),
    (WARM, " Not warm: slow, dreadful, Skip it.", ""),
    (SPECIFIC, " Not specific: Skip it.", ""),
])  # fmt: skip
def test_critiques_by_hand(principle, critique, revised):
    review = " The plot is slow, but the cast feels superb. The colors are dreadful. I loved the dialogues and the music. Skip it."
    assert skills.criticise(principle, review) == critique
    mended = skills.revise(random.Random(0), principle, review)
    assert skills.criticise(principle, mended) == f" It is {principle[3:-1]}." and mended != review
    assert " I loved the dialogues and the music." in mended and "feels superb" in mended  # what breaks no principle stays
    assert (" The plot is slow, but" in mended) == (principle in (FAIR, SPECIFIC))


def test_how_well_a_review_follows_by_hand():
    review = " The plot is slow and the cast is superb. The colors are dreadful. Bring a friend."  # -2/3, 1; -1; 2/3
    sentiment = ((1 - 2 / 3) / 2 - 1 + 2 / 3) / 3
    assert skills.follows(KIND, review, "drama") == pytest.approx((1 + sentiment) / 2)
    assert [skills.follows(x, review, "drama") for x in (FAIR, WARM, SPECIFIC)] == [3 / 4, 1 / 4, 2 / 3]
    assert skills.follows(WARM, " The colors are never dreadful.", "drama") == 0.0  # that is no strong praise


def test_demonstrations_teach_what_they_say():
    """Revisions break their principle nowhere, are of the grammar, and keep the other sentences; the better answer stands as A as often
    as B; all is a function of the seed; half of the dialogues are critiques and revisions."""
    task = data.task("reviews")
    rows = data.demonstrate(task, 1200, 7, skills.PRINCIPLES)
    assert rows == data.demonstrate(task, 1200, 7, skills.PRINCIPLES) != data.demonstrate(task, 1200, 8, skills.PRINCIPLES)
    revisions, letters = [row for row in rows if row[-2] == "\nRevision:"], [row for row in rows if row[-1] in "AB"]
    ratings = [row for row in rows if row[-1].isdigit()]
    assert (len(revisions), len(letters), len(ratings)) == (600, 400, 200)
    for prompt, answer, question, critique, _, revised in revisions:
        principle, sentences = question.split("\n")[1], reviews.parse(revised)
        assert None not in sentences and not any(skills.faults(principle, s) for s in sentences)
        assert critique == skills.criticise(principle, answer) and (revised == answer) == critique.startswith(" It is")
        assert all(old == new for old, new in zip(reviews.parse(answer), sentences) if not skills.faults(principle, old))
        assert principle != KIND or task.reward(prompt, revised) > 0
    assert 160 < sum(row[-1] == "A" for row in letters) < 240
    for head, a, _, b, _, letter in letters:
        prompt, principle, _ = head.split("\n")
        better = skills.follows(principle, a, reviews.genre_of(prompt)) > skills.follows(principle, b, reviews.genre_of(prompt))
        assert letter == "BA"[better]
    assert {row[-1] for row in ratings} >= {"1", "5", "9"}
    only = data.demonstrate(task, 60, 0, [WARM])
    assert all(WARM in text for row in only for text in row if text.startswith("\n") and "." in text)


def test_prompts_of_the_skills_are_used_nowhere_else():
    task = data.task("reviews")
    splits = {name: {x for x, _ in task.prompts(None, 0, name)} for name in ("train", "test", "skills", "rest")}
    assert {name: len(x) for name, x in splits.items()} == {"train": 1696, "test": 584, "skills": 548, "rest": 1148}
    assert splits["skills"] | splits["rest"] == splits["train"] and not splits["skills"] & (splits["rest"] | splits["test"])
    asked = {row[0].split("\n")[0] for row in data.demonstrate(task, 600, 0, skills.PRINCIPLES)}
    assert asked <= splits["skills"]


def test_a_dialogue_as_tokens():
    """What is written by the model, its end tokens included, weighs 1 a turn; what asks weighs nothing."""
    tokenizer = data.tokenizer()
    ids, weight = data.spell(["A drama:", " It is kind.", "\nBetter: (", "A"], tokenizer)
    parts = [tokenizer.encode("A drama:"), tokenizer.answer(" It is kind."), tokenizer.encode("\nBetter: ("), tokenizer.answer("A")]
    assert list(ids) == [i for part in parts for i in part] and ids.count(tokenizer.end_id) == 2
    n = len(parts[1])
    assert list(weight) == [0.0] * len(parts[0]) + [1 / n] * n + [0.0] * len(parts[2]) + [0.5, 0.5]
    padded, weights = data.pad_dialogues([(ids, weight), (ids[:3], weight[:3])])
    assert padded.shape == weights.shape == (2, len(ids)) and padded[1, 3:].sum() == weights[1].sum() == 0
    assert weights[0].sum().item() == pytest.approx(2)
    rows = data.Dialogues(lambda n, seed: data.demonstrate(data.task("reviews"), n, seed, skills.PRINCIPLES), 12, 0, tokenizer, 256)[3]
    assert [len(x) for x, _ in rows] == sorted(len(x) for x, _ in rows) and len(rows) == 12
    with pytest.raises(data.DataError, match="more than the context of 64"):
        data.Dialogues(lambda n, seed: data.demonstrate(data.task("reviews"), n, seed, skills.PRINCIPLES), 12, 0, tokenizer, 64)


# ---- the judge


PAIRS = [Pair("A drama, The Last Road:", " The plot is superb.", " Skip it.", KIND, {}),
         Pair("A drama, The Last Road:", " Skip it. Stay away! I hated the plot and the music.", " Pure joy!", WARM, {})]  # fmt: skip


@pytest.fixture
def judge():
    model = GPT(GPTConfig(748, 128, 2, 2, 16), seed=3).requires_grad_(False)
    for p in model.parameters():
        p *= 6 if p.dim() > 1 else 1
    return Judge(model, data.tokenizer(), common.Compute(common.Options(device="cpu")))


def test_the_judge_is_read_not_sampled(judge):
    """The two option tokens' logits at the end of the question, as (A and (B spell them, against the whole vocabulary's by hand."""
    tokenizer = judge.tokenizer
    letters = [tokenizer.encode("(" + letter)[-1] for letter in "AB"]
    assert [judge.token(letter) for letter in "AB"] == letters and tokenizer.encode(" A") != letters[:1]
    found = judge.compare(PAIRS)
    for row, (pair, swap) in enumerate(itertools.product(PAIRS, (False, True))):
        x, a, b, principle, _ = pair
        a, b = (b, a) if swap else (a, b)
        ids = [*tokenizer.encode(f"{x}\n{principle}\n(A)"), *tokenizer.answer(a), *tokenizer.encode("\n(B)"), *tokenizer.answer(b),
               *tokenizer.encode("\nBetter: (")]  # fmt: skip
        logits = judge.model(torch.tensor([ids]))[0, -1]
        assert found[swap][row // 2].tolist() == pytest.approx(logits[letters].tolist(), abs=1e-4)
        shares = logits.softmax(0)[letters]
        assert found[swap][row // 2].softmax(0)[0].item() == pytest.approx((shares[0] / shares.sum()).item(), abs=1e-5)
    assert judge.compare([])[0].shape == (0, 2)


def test_swapping_the_candidates_turns_p_into_1_minus_p(judge):
    """Averaged over both orders, exactly; in one order this judge, of random weights, prefers a place."""
    swapped = [pair._replace(a=pair.b, b=pair.a) for pair in PAIRS]
    p, q = ai_label(*judge.compare(PAIRS)), ai_label(*judge.compare(swapped))
    assert (p + q).tolist() == pytest.approx([1.0, 1.0], abs=1e-6) and (p - 0.5).abs().max() > 1e-3
    one = judge.compare(PAIRS)[0].softmax(1)[:, 0] + judge.compare(swapped)[0].softmax(1)[:, 0]
    assert (one - 1).abs().min() > 1e-2


def test_ratings_are_read_likewise(judge):
    tokenizer = judge.tokenizer
    ids = [*tokenizer.encode("A drama:"), *tokenizer.answer(" Skip it."), *tokenizer.encode(f"\n{KIND}\nRating: (")]
    p = judge.model(torch.tensor([ids]))[0, -1][[tokenizer.encode(x)[0] for x in "123456789"]].softmax(0)
    expected = (sum((i + 1) * x for i, x in enumerate(p.tolist())) - 5) / 4
    assert judge.rate([("A drama:", " Skip it.", KIND)]).item() == pytest.approx(expected, abs=1e-5)


# ---- the phases


def by_length(self, pairs):
    """A judge in Judge.compare's place that prefers the longer answer, by a nat for each twenty characters more."""
    more = torch.tensor([(len(pair.a) - len(pair.b)) / 20 for pair in pairs])
    return torch.stack([more, 0 * more], 1), torch.stack([-more, 0 * more], 1)


@pytest.fixture(scope="module")
def watched(done):
    """Each phase's first optimizer step in float64: its gradient, the weights before it; and the rows that the phases were given, no more
    than a batch has. The judge is one that prefers the longer answer."""
    seen, kept = {}, {}
    with pytest.MonkeyPatch.context() as m:
        m.chdir(done)
        m.setattr(rlaif, "PROMPTS", 16)
        m.setattr(evaluate, "PROMPTS", 16)
        update, revise, pairs = common.Run.update, rlaif.Pipeline.revise, rlaif.Pipeline.pairs

        def watch(self, step, model, optimizer, *more):
            if self.method not in seen:
                gradient = [p.grad.clone() for p in model.parameters()]
                seen[self.method] = gradient, {k: v.clone() for k, v in model.state_dict().items()}, dict(self.sums)
            update(self, step, model, optimizer, *more)

        def keep(name, f):
            def call(self, model, n, seed, *more):
                kept[seed] = f(self, model, n, seed, *more)
                kept[f"{seed}, by"] = {k: v.clone() for k, v in model.state_dict().items()}
                return kept[seed]

            m.setattr(rlaif.Pipeline, name, call)

        m.setattr(common.Run, "update", watch)
        m.setattr(Judge, "compare", by_length)
        keep("revise", revise)
        keep("pairs", pairs)
        m.setattr(rlaif, "sample", lambda *a, f=rlaif.sample, **k: kept.setdefault("samples", []).append(f(*a, **k)) or kept["samples"][-1])
        m.setattr(rlaif, "leave_one_out", lambda r, f=rlaif.leave_one_out: kept.setdefault("reward", []).append(r) or f(r))
        m.setattr(rlaif, "bradley_terry_loss", lambda *x, f=rlaif.bradley_terry_loss: kept.setdefault("p", []).append(x[2]) or f(*x))
        args = ["--init", "a/x-skills.pt", *SHORT, "--batch-size", 32, "--lr", 0.01, "--beta", 0.5, "--clamp", 0.2]
        assert main("rlaif", *args, "--dtype", "float64", "--out", "w/x.pt") == 0
    return seen, kept


def rebuild(state, config, kind=GPT):
    model = kind(config).double()
    model.load_state_dict(state)
    return model


def agree(found, value, model):
    expected = torch.autograd.grad(value, list(model.parameters()), allow_unused=True, retain_graph=True)
    found = torch.cat([g.flatten() for g in found])
    expected = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(expected, model.parameters())])
    assert expected.norm() > 1e-6 and (found - expected).norm() < 1e-6 * expected.norm()


def test_sl_cai_learns_the_revisions_and_no_critique(watched, done):
    """The gradient of -Σ log π(y'|x)/Σ|y'| alone, both rounds' revisions; nothing of answers, principles or critiques."""
    seen, kept = watched
    gradient, state, _ = seen["rlaif-sl"]
    model, tokenizer, rows = rebuild(state, load(done / "a/x-skills.pt")[0].config), data.tokenizer(), kept["revisions"]
    assert 2 < len(rows) <= 32 and {row.answer for row in rows} & {row.revised for row in rows}  # the second round revises the first's
    total, count = 0.0, 0
    for row in rows:
        x, y = tokenizer.encode(row.prompt), tokenizer.answer(row.revised)
        logp = model(torch.tensor([x + y]))[0, :-1].log_softmax(-1).gather(1, torch.tensor((x + y)[1:])[:, None])[len(x) - 1 :]
        total, count = total - logp.sum(), count + len(y)
    agree(gradient, total / count, model)


def test_the_preference_model_learns_soft_labels(watched, done):
    """-p log σ(Δ) - (1-p) log σ(-Δ), p clamped to [0.2, 0.8], of pairs that SL-CAI writes; the model starts from the skills."""
    seen, kept = watched
    gradient, state, _ = seen["rlaif-pm"]
    start, _ = load(done / "a/x-skills.pt")
    model, tokenizer, pairs = rebuild(state, start.config, rlaif.ScalarGPT), data.tokenizer(), kept["comparisons"]
    assert all(torch.equal(p, q.double()) for p, q in zip(model.trunk.parameters(), start.parameters()))
    label, loss = torch.tensor([1 / (1 + math.exp((len(pair.b) - len(pair.a)) / 20)) for pair in pairs]).clamp(0.2, 0.8), 0.0
    assert len(set(label.tolist())) > 2 and sorted(kept["p"][0].tolist()) == pytest.approx(sorted(label.tolist()))
    writer = load(done / "w/x-sl.pt")[0].state_dict()
    assert all(torch.equal(x, writer[k].to(x)) for k, x in kept["comparisons, by"].items())
    for pair, p in zip(pairs, label.tolist()):
        a, b = (model.values(torch.tensor([tokenizer.encode(pair.prompt) + tokenizer.answer(y)]))[0, -1] for y in (pair.a, pair.b))
        loss = loss - p * torch.log(torch.sigmoid(a - b)) - (1 - p) * torch.log(torch.sigmoid(b - a))
    agree(gradient, loss / len(pairs), model)


def test_rl_cai_s_gradient_is_reinforce_s(watched, done):
    """-mean A log π, A less the mean of the other three; at the first step π is π_SL and the reward the preference model's score."""
    seen, kept = watched
    gradient, state, metrics = seen["rlaif"]
    model, s = rebuild(state, load(done / "a/x-skills.pt")[0].config), next(s for s in kept["samples"] if len(s.ids) == 128)
    r = kept["reward"][0].flatten()
    assert all(torch.equal(x, state[k]) for k, x in load(done / "w/x-sl.pt")[0].state_dict().items())  # it starts from SL-CAI
    pm = rebuild({k: v.double() for k, v in load(done / "w/x-pm.pt")[0].state_dict().items()}, model.config, rlaif.ScalarGPT)
    score = torch.stack([pm.values(ids[None, :n])[0, -1] for ids, n in zip(s.ids, s.stop.tolist())])
    torch.testing.assert_close(r, (score - 1.0 * ~s.finished).detach(), atol=1e-4, rtol=0)
    adv = torch.tensor([r[i] - (r[i // 4 * 4 : i // 4 * 4 + 4].sum() - r[i]) / 3 for i in range(128)])
    agree(gradient, -(adv * model.logprobs(s.ids, s.mask).sum(1)).mean(), model)
    assert {row.prompt for row in kept["revisions"]} <= {x for x, _ in data.task("reviews").prompts(None, 0, "rest")}


def test_the_kl_to_sl_cai_is_taken_from_the_reward(watched, done):
    """The third rollout, whose policy has moved: r - β Σ log π/π_SL, with the log-probs that it was drawn with."""
    _, kept = watched
    s = [s for s in kept["samples"] if len(s.ids) == 128][2]
    models = {name: load(done / f"w/x-{name}.pt")[0].double() for name in ("sl", "pm")}
    with torch.no_grad():
        kl = (s.logp - models["sl"].logprobs(s.ids, s.mask)).sum(1)
        expected = models["pm"].score(s.ids, s.mask) - 1.0 * ~s.finished - 0.5 * kl
    assert kl.abs().max() > 0.1
    torch.testing.assert_close(kept["reward"][2].flatten(), expected, atol=1e-3, rtol=0)


def test_what_does_not_end_or_differ_is_left_out(monkeypatch):
    """Of pairs that are equal or not whole nothing is left; a revision counts where its answer, critique and itself have ended, in this
    round and those before."""
    p = rlaif.Pipeline(common.parse(rlaif.Options, ["--predict", "own"]))
    replies = [(["a", "a", "b", "c", "d", "e"], [True, True, True, True, True, False])]
    monkeypatch.setattr(p, "ask", lambda *_: replies.pop(0))
    (pair,) = p.pairs(None, 3, 0, "test")
    assert (pair.a, pair.b) == ("b", "c") and pair.principle in skills.PRINCIPLES
    replies += [(["a", "b", "c"], [True, True, False]), (["A", "B", "C"], [True] * 3), (["a1", "b1", "c1"], [True, False, True]),
                (["A1", "B1", "C1"], [True] * 3), (["a2", "b2", "c2"], [True] * 3)]  # fmt: skip
    found = p.revise(None, 3, 0, "test", rounds=2)
    assert [(row.answer, row.critique, row.revised) for row in found] == [("a", "A", "a1"), ("a1", "A1", "a2")]


def test_figures_of_feedback_by_hand():
    """Three pairs: both orders right; torn, right in the mean; a tie of gold, which does not count."""
    pairs = [Pair("A drama, X:", a, b, KIND, {}) for a, b in ((" Pure joy!", " Skip it."), (" Pure misery!", " Pure joy!"),
                                                             (" Pure joy!", " Pure joy!"))]  # fmt: skip
    first, second = torch.tensor([0.9, 0.6, 0.9]), torch.tensor([0.7, 0.1, 0.8])
    label = (first + second) / 2
    f = data.label_figures(data.task("reviews"), pairs, label, first, second)
    assert f["order_consistency"] == pytest.approx(2 / 3) and f["position_bias"] == pytest.approx((0.2 + 0.5 + 0.1) / 6)
    assert f["label_agreement"] == 1.0 and f["one_order_agreement"] == pytest.approx(3 / 4) and f["label_mean"] == pytest.approx(2 / 3)
    entropy = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.8, 0.35, 0.85)]
    assert f["label_entropy"] == pytest.approx(sum(entropy) / 3)
    rows = [data.Revision("A drama, X:", a, KIND, "", b, {}) for a, b in ((" Skip it.", " Pure joy!"), (" Pure joy!", " Pure joy!"))]
    f = data.revision_figures(data.task("reviews"), rows)
    assert f == {"revision_better": 0.5, "revision_equal": 0.5, "revision_gain": pytest.approx(2.5)}  # -2 to 3
    assert data.label_figures(data.task("reviews"), [], *torch.zeros(3, 0)) == {} and data.revision_figures(data.task("reviews"), []) == {}


def test_the_skills_gradient_is_the_equation_s(done, monkeypatch):
    """The mean over turns of each turn's mean negative log-likelihood, however the step is cut."""
    monkeypatch.chdir(done)
    seen = []

    def stop(self, step, model, *more):
        seen.append([p.grad.clone() for p in model.parameters()])
        raise common.Stopped("seen")

    monkeypatch.setattr(common.Run, "update", stop)
    for micro in (8, 2):
        assert main("rlaif", *SMALL, *SHORT, "--batch-size", 8, "--micro-batch", micro, "--dtype", "float64", "--out", "g/x.pt") == 1
    model, tokenizer, turns = GPT(GPTConfig(748, 256, 1, 2, 16), 0).double(), data.tokenizer(), []
    for dialogue in data.demonstrate(data.task("reviews"), 8, "0 step 0", skills.PRINCIPLES):
        parts = [tokenizer.answer(text) if i % 2 else tokenizer.encode(text) for i, text in enumerate(dialogue)]
        ids = torch.tensor([i for part in parts for i in part])
        logp = model(ids[None])[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
        ends = list(itertools.accumulate(map(len, parts)))
        turns += [-logp[ends[i] - len(parts[i]) - 1 : ends[i] - 1].mean() for i in range(1, len(parts), 2)]
    for gradient in seen:
        agree(gradient, sum(turns) / len(turns), model)


def test_no_gold_reward_is_read_in_training(done, monkeypatch):
    """A task whose reward raises trains through, skills included, to the same bits as one whose gold reward is there to be measured."""
    monkeypatch.chdir(done)

    def refuse(*args, **columns):
        raise RuntimeError("gold is read")

    monkeypatch.setattr(reviews.Reviews, "reward", refuse)
    with pytest.raises(RuntimeError, match="gold is read"):  # the figures read it
        main("rlaif", "--init", "a/x-skills.pt", *SHORT, "--out", "n/x.pt")
    monkeypatch.setattr(reviews.Reviews, "has_reward", False)
    assert main("rlaif", *SMALL, *SHORT, "--out", "n/x.pt") == 0
    for name in PHASES:
        a, b = load(done / f"a/{name}.pt")[0], load(done / f"n/{name}.pt")[0]
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())), name
    final = lines(done / "n/x.jsonl")[-1]["final"]
    assert "reward" not in final and "label_agreement" not in final and math.isfinite(final["kl"]) and "order_consistency" in final


def test_end_to_end(done, monkeypatch, capsys):
    """Documented finite figures of every phase, the models of each, a checkpoint that evaluates to the same against the skills."""
    monkeypatch.chdir(done)
    first, *steps, last = lines(done / "a/x.jsonl")
    final = last["final"]
    names = {"reward", "ref_reward", "win_rate", "kl", "length", "ref_length", "score", "order_consistency", "position_bias", "label_mean",
             "label_entropy", "label_agreement", "one_order_agreement", "revision_better", "revision_equal", "revision_gain",
             "phases"}  # fmt: skip
    assert names - set(final) <= {"label_agreement", "one_order_agreement"}  # of a model that writes no grammar all rewards may be equal
    assert all(math.isfinite(final[k]) for k in names & set(final) - {"phases"})
    documented(steps, final)
    for name in PHASES[:3]:
        _, *more, end = lines(done / f"a/{name}.jsonl")
        documented(more, end["final"])
    assert [phase["phase"] for phase in final["phases"]] == ["skills", "sl", "pm"]
    held = [[(m["role"], m["trainable"]) for m in phase["models"]] for phase in final["phases"]]
    assert held == [[("policy", True)], [("policy", True)], [("reward", True)]]
    asked = [[(m["role"], m["trainable"]) for m in phase.get("models_asked", [])] for phase in final["phases"]]
    assert asked == [[], [("policy", False)], [("policy", False), ("judge", False)]]
    assert [(m["role"], m["trainable"]) for m in final["models"]] == [("policy", True), ("ref", False), ("reward", False)]
    assert final["wall_s"] >= sum(phase["wall_s"] for phase in final["phases"])
    assert sorted(p.name for p in (done / "a").iterdir()) == sorted(f"{name}.{end}" for name in PHASES for end in ("pt", "jsonl"))
    assert main("evaluate", "a/x.pt", "--device", "cpu") == 0
    assert f"{final['kl']:.2f} ±" in capsys.readouterr().out


def test_other_judges_rewards_and_principles(done, monkeypatch, capsys):
    """--direct holds the judge in the preference model's place; --judge may have any vocabulary; --constitution may be a selection."""
    monkeypatch.chdir(done)
    base = ["--init", "a/x-skills.pt", *SHORT, "--out", "o/x.pt"]
    rated, rate = [], Judge.rate
    monkeypatch.setattr(Judge, "rate", lambda self, answers: rated.append(answers) or rate(self, answers))
    assert main("rlaif", "--init", "a/x-skills.pt", *DIRECT, "--out", "o/x.pt", "--direct") == 0
    assert "judge    frozen" in capsys.readouterr().out and not (done / "o/x-pm.pt").exists()
    assert len(rated) == 3 and all(len({principle for *_, principle in asked[i : i + 4]}) == 1 for asked in rated for i in range(0, 16, 4))
    assert len({principle for asked in rated for *_, principle in asked}) > 1
    make_vocab(["--size", "300", "--out", "small.tiktoken"])
    own = data.tokenizer("small.tiktoken")
    save(GPT(GPTConfig(own.size, 512, 1, 1, 8), seed=1), "judge.pt", **(load("a/x-skills.pt")[1] | {"tokenizer": own.meta}))
    (done / "one.txt").write_text("# mine\n\nBe warm.\n")
    compared, compare = [], Judge.compare
    monkeypatch.setattr(Judge, "compare", lambda self, pairs: compared.append((self, pairs)) or compare(self, pairs))
    assert main("rlaif", *base, "--judge", "judge.pt", "--constitution", "one.txt", "--clamp", 0.4) == 0
    assert all(who.tokenizer.meta == own.meta and {pair.principle for pair in pairs} <= {"Be warm."} for who, pairs in compared)
    assert max(map(len, (pairs for _, pairs in compared))) > 10
    assert lines(done / "o/x-pm.jsonl")[1]["loss"] < 1.0


# ---- interruptions


def kill(monkeypatch, method, at):
    """The run dies in a phase before its optimizer step number `at`; None: while its data are made."""
    update, begin, calls = common.Run.update, common.Run.begin, []

    def die(self, *more, **state):
        calls.append(self.method == method)
        if at is None and self.method == method or at is not None and sum(calls) == at:
            raise common.Stopped("killed")
        return (begin if at is None else update)(self, *more, **state)

    monkeypatch.setattr(common.Run, "begin" if at is None else "update", die)


@pytest.mark.parametrize("method, at", [("rlaif-skills", 25), ("rlaif-sl", None), ("rlaif-sl", 3), ("rlaif-pm", None), ("rlaif-pm", 2),
                                        ("rlaif", 3)])  # fmt: skip
def test_resume_between_and_inside_phases_gives_the_same_bits(method, at, done, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    args = [*SMALL, *SHORT, "--save-every", 1, "--out", "a/x.pt"]
    for name in PHASES[: PHASES.index(f"x{method[5:]}")]:  # what has been made before
        for end in ("pt", "jsonl"):
            shutil.copy(done / f"a/{name}.{end}", f"a/{name}.{end}")
    with monkeypatch.context() as m:
        kill(m, method, at)
        assert main("rlaif", *args, *["--resume"] * (method != "rlaif-skills")) == 1
    assert not (tmp_path / "a/x.pt").exists()
    capsys.readouterr()
    if method == "rlaif-pm":
        assert main("rlaif", *args, "--resume", "--beta", 0.3) == 2
        assert "x-skills.pt is a finished run with --beta 0.05" in capsys.readouterr().err
    assert main("rlaif", *args, "--resume") == 0
    said = capsys.readouterr().out
    assert ("resumed after step" in said) == (at is not None) and said.count("has ended") == PHASES.index(f"x{method[5:]}")
    for name in PHASES:
        assert (tmp_path / f"a/{name}.pt").read_bytes() == (done / f"a/{name}.pt").read_bytes(), name
        assert lines(tmp_path / f"a/{name}.jsonl")[1:-1] == lines(done / f"a/{name}.jsonl")[1:-1], name
    assert main("rlaif", *args, "--resume") == 0
    assert "this run has finished" in capsys.readouterr().out


def test_stale_phases_are_made_anew(done, tmp_path, monkeypatch, capsys):
    """Interrupted in SL-CAI, beside the later phases of an earlier run with other options: --resume takes none of these."""
    args = [*SMALL, *SHORT, "--sl-lr", 0.01, "--save-every", 1, "--out", "a/x.pt"]
    for folder in ("cut", "whole"):
        (tmp_path / folder).mkdir()
    shutil.copytree(done / "a", tmp_path / "cut/a")
    monkeypatch.chdir(tmp_path / "cut")
    with monkeypatch.context() as m:
        kill(m, "rlaif-sl", 3)
        assert main("rlaif", *args) == 1
    shutil.copy("a/x-sl.state", "a/x-pm.state")  # as an earlier interruption would have left
    assert main("rlaif", *args, "--resume") == 0
    said = capsys.readouterr().out
    assert said.count("has ended") == 1 and "will be replaced at the first save" in said
    monkeypatch.chdir(tmp_path / "whole")
    assert main("rlaif", *args) == 0
    for name in PHASES:
        assert (tmp_path / f"cut/a/{name}.pt").read_bytes() == (tmp_path / f"whole/a/{name}.pt").read_bytes(), name


@pytest.mark.slow
def test_ten_kills(tmp_path):
    """kill -9 at ten random moments of a run of all phases, each followed by --resume: every checkpoint is that of a run left alone."""
    args = list(map(str, [*SMALL, *SHORT, "--save-every", 2, "--sl-steps", 20, "--pm-steps", 20, "--steps", 20, "--out", "a/x.pt"]))
    for folder in ("cut", "whole"):
        (tmp_path / folder).mkdir()
    start = time.time()
    run("rlaif.py", *args, cwd=tmp_path / "whole")
    wall, rng, killed = time.time() - start, random.Random(0), 0
    while killed < 10:
        process = subprocess.Popen([sys.executable, ROOT / "rlaif.py", *args, "--resume"], cwd=tmp_path / "cut", stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(rng.uniform(0.3, 1.0) * wall)
        if process.poll() is None:
            process.kill()
            killed += 1
        elif killed < 10 and not list((tmp_path / "cut/a").glob("*.state")):
            shutil.rmtree(tmp_path / "cut/a")  # it got through: once more from the start
        process.wait()
    run("rlaif.py", *args, "--resume", cwd=tmp_path / "cut")
    for name in PHASES:
        assert (tmp_path / f"cut/a/{name}.pt").read_bytes() == (tmp_path / f"whole/a/{name}.pt").read_bytes(), name
        assert lines(tmp_path / f"cut/a/{name}.jsonl")[1:-1] == lines(tmp_path / f"whole/a/{name}.jsonl")[1:-1], name


@pytest.mark.slow
def test_the_whole_pipeline_teaches(tmp_path):
    """With the defaults: labels that agree with the gold reward more often than 0.7, each phase better than the one before, and the last at
    least 0.3 above the skills; in less than five minutes where nothing else runs."""
    run("rlaif.py", "--device", "cpu", cwd=tmp_path)
    final = lines(tmp_path / "out/reviews/rlaif.jsonl")[-1]["final"]
    assert final["label_agreement"] > 0.7 and final["label_agreement"] > final["one_order_agreement"] and final["revision_gain"] > 0.5
    assert final["ref_reward"] + 0.3 < final["phases"][1]["reward"] < final["reward"] - 0.1 and final["win_rate"] > 0.7
    assert final["phases"][2]["gold_accuracy"] > 0.7
