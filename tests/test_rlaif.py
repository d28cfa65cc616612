"""Constitutional AI in rlaif.py: labels, losses and skills by hand, what each phase trains on and
what it must not read, and interruptions."""

import itertools
import math
import random
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, documented, files_in, killed, lines, main, run
from conftest import few_prompts as few
from test_steps import (
    advantages,
    agree,
    averaged,
    group_figures,
    mean,
    mean_nll,
    responses,
    score,
    sigmoid,
    summary,
    tokens,
    watching,
)

import data
from data import Stopped, constitution, reviews, skills
from data.make_vocab import main as make_vocab
from gpt import GPT, GPTConfig, load, save
from rlaif import ai_label, bradley_terry_loss, leave_one_out
from training import Compute, Run, feedback
from training.feedback import AIJudge, Pair, Writer

KIND, FAIR, WARM, SPECIFIC = skills.PRINCIPLES
REVIEWS, WORDS = data.task("reviews"), data.tokenizer()
SMALL = "--skill-steps 30 --skill-lr 0.03 --n-layer 1 --n-head 2 --n-embd 16".split()  # answers end
SHORT = (
    "--sl-steps 3 --pm-steps 3 --steps 3 --batch-size 4 --answers 24 --comparisons 24 "
    "--max-new-tokens 16 --log-every 1 --warmup 1 --device cpu"
).split()
PHASES = ("x-skills", "x-sl", "x-pm", "x")


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch):
    few(monkeypatch, 16)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A folder with a/x.pt, a whole run of a small model, and the checkpoints of its phases."""
    folder = tmp_path_factory.mktemp("rlaif")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        few(m, 16)
        assert main("rlaif", *SMALL, *SHORT, "--out", "a/x.pt") == 0
    return folder


def same(a, b, name):
    """Whether a phase's checkpoint and record are the same in both folders, times apart"""
    assert (a / f"{name}.pt").read_bytes() == (b / f"{name}.pt").read_bytes(), name
    assert lines(a / f"{name}.jsonl")[1:-1] == lines(b / f"{name}.jsonl")[1:-1], name


# ---- the equations, by hand


def test_the_label_is_the_mean_of_both_orders():
    """P(A) = e/(e + 1) of log-probs (1, 0); the options alone count, whatever the rest of the
    vocabulary has."""
    s = 1 / (1 + math.exp(-1))
    ab, ba = torch.tensor([[1.0, 0.0], [-5.0, -5.0]]), torch.tensor([[0.0, 0.0], [-2.0, -3.0]])
    assert ai_label(ab, ba).tolist() == pytest.approx([(s + 0.5) / 2, (0.5 + 1 - s) / 2])
    assert ai_label(ab - 7, ba + 3).tolist() == pytest.approx(ai_label(ab, ba).tolist())
    torch.testing.assert_close(ai_label(ba, ab), 1 - ai_label(ab, ba))  # b and a change places
    sure = torch.tensor([[9.0, 0.0]])
    assert ai_label(sure, sure.flip(1), clamp=0.4).item() == pytest.approx(0.6)
    assert ai_label(sure.flip(1), sure, clamp=0.4).item() == pytest.approx(0.4)
    assert ai_label(sure, sure).item() == pytest.approx(0.5)  # who always says A knows nothing
    assert not ai_label(ab.requires_grad_(), ba).requires_grad


def test_soft_labels_by_hand():
    """The gradient is σ(Δ) - p: at p the loss is least. p = 1: the hard label's loss."""
    delta = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    for p in (0.2, 0.5, 0.75):
        loss = bradley_terry_loss(delta, torch.zeros_like(delta), torch.full_like(delta, p))
        (gradient,) = torch.autograd.grad(loss.sum(), delta)
        torch.testing.assert_close(gradient, torch.sigmoid(delta) - p)
    one = torch.tensor([1.0])
    assert bradley_terry_loss(2 * one, one, one).item() == pytest.approx(math.log(1 + math.exp(-1)))
    with pytest.raises(AssertionError):
        bradley_terry_loss(delta, delta[:3], delta)


def test_advantages_by_hand():
    """1 - (2 + 6)/2 …"""
    reward = torch.tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 3.0]], requires_grad=True)
    adv = leave_one_out(reward)
    assert adv.tolist() == [-3.0, -1.5, 4.5, 0.0, 0.0, 0.0] and not adv.requires_grad


# ---- the skills

REVIEW = (
    " The plot is slow, but the cast feels superb. The colors are dreadful."
    " I loved the dialogues and the music. Skip it."
)


@pytest.mark.parametrize(
    "principle, critique",
    [
        (KIND, " Not kind: slow, dreadful, Skip it."),
        (FAIR, " Not fair: dreadful."),
        (WARM, " Not warm: slow, dreadful, Skip it."),
        (SPECIFIC, " Not specific: Skip it."),
    ],
)
def test_critiques_by_hand(principle, critique):
    """What breaks the principle is listed, and mended; what breaks no principle stays."""
    assert skills.criticise(principle, REVIEW) == critique
    mended = skills.revise(random.Random(0), principle, REVIEW)
    assert skills.criticise(principle, mended) == f" It is {principle[3:-1]}." and mended != REVIEW
    assert " I loved the dialogues and the music." in mended and "feels superb" in mended
    assert (" The plot is slow, but" in mended) == (principle in (FAIR, SPECIFIC))


def test_how_well_a_review_follows_by_hand():
    """-2/3, 1; -1; 2/3"""
    review = " The plot is slow and the cast is superb. The colors are dreadful. Bring a friend."
    kind = (1 + ((1 - 2 / 3) / 2 - 1 + 2 / 3) / 3) / 2
    assert skills.follows(KIND, review, "drama") == pytest.approx(kind)
    others = [skills.follows(x, review, "drama") for x in (FAIR, WARM, SPECIFIC)]
    assert others == [3 / 4, 1 / 4, 2 / 3]
    never = " The colors are never dreadful."  # that is no strong praise
    assert skills.follows(WARM, never, "drama") == 0.0


def test_demonstrations_teach_what_they_say():
    """Revisions break their principle nowhere, are of the grammar, and keep the other sentences;
    the better answer stands as A as often as B; all is a function of the seed; half of the
    dialogues are critiques and revisions."""
    rows = skills.demonstrate(REVIEWS, 1200, 7, skills.PRINCIPLES)
    assert rows == skills.demonstrate(REVIEWS, 1200, 7, skills.PRINCIPLES)
    assert rows != skills.demonstrate(REVIEWS, 1200, 8, skills.PRINCIPLES)
    revisions = [row for row in rows if row[-2] == "\nRevision:"]
    letters = [row for row in rows if row[-1] in "AB"]
    ratings = [row for row in rows if row[-1].isdigit()]
    assert (len(revisions), len(letters), len(ratings)) == (600, 400, 200)
    for prompt, answer, question, critique, _, revised in revisions:
        principle, sentences = question.split("\n")[1], reviews.parse(revised)
        assert None not in sentences and not any(skills.faults(principle, s) for s in sentences)
        assert critique == skills.criticise(principle, answer)
        assert (revised == answer) == critique.startswith(" It is")
        both = zip(reviews.parse(answer), sentences)
        assert all(old == new for old, new in both if not skills.faults(principle, old))
        assert principle != KIND or REVIEWS.reward(prompt, revised) > 0
    assert 160 < sum(row[-1] == "A" for row in letters) < 240
    for head, a, _, b, _, letter in letters:
        prompt, principle, _ = head.split("\n")
        a, b = (skills.follows(principle, y, reviews.genre_of(prompt)) for y in (a, b))
        assert letter == "BA"[a > b]
    assert {row[-1] for row in ratings} >= {"1", "5", "9"}
    only = skills.demonstrate(REVIEWS, 60, 0, [WARM])
    asks = [text for row in only for text in row if text.startswith("\n") and "." in text]
    assert all(WARM in text for text in asks)


def test_prompts_of_the_skills_are_used_nowhere_else():
    names = ("train", "test", "skills", "rest")
    splits = {name: {x for x, _ in REVIEWS.prompts(None, 0, name)} for name in names}
    assert [len(splits[name]) for name in names] == [1696, 584, 548, 1148]
    own, rest = splits["skills"], splits["rest"]
    assert own | rest == splits["train"] and not own & (rest | splits["test"])
    demonstrated = skills.demonstrate(REVIEWS, 600, 0, skills.PRINCIPLES)
    assert {row[0].split("\n")[0] for row in demonstrated} <= own


def test_a_dialogue_as_tokens():
    """What is written by the model, its end tokens included, weighs 1 a turn; what asks weighs
    nothing."""
    texts = ["A drama:", " It is kind.", "\nBetter: (", "A"]
    ids, weight = constitution.spell(texts, WORDS)
    parts = [(WORDS.encode, WORDS.answer)[i % 2](text) for i, text in enumerate(texts)]
    assert list(ids) == [i for part in parts for i in part] and ids.count(WORDS.end_id) == 2
    x, y, question, _ = map(len, parts)
    assert list(weight) == [0.0] * x + [1 / y] * y + [0.0] * question + [0.5, 0.5]
    padded, weights = constitution.pad_dialogues([(ids, weight), (ids[:3], weight[:3])])
    assert padded.shape == weights.shape == (2, len(ids))
    assert padded[1, 3:].sum() == weights[1].sum() == 0
    assert weights[0].sum().item() == pytest.approx(2)

    def draw(n, seed):
        return skills.demonstrate(REVIEWS, n, seed, skills.PRINCIPLES)

    rows = constitution.Dialogues(draw, 12, 0, WORDS, 256)[3]
    assert [len(x) for x, _ in rows] == sorted(len(x) for x, _ in rows) and len(rows) == 12
    with pytest.raises(data.UserError, match="more than the context of 64"):
        constitution.Dialogues(draw, 12, 0, WORDS, 64)


# ---- the judge

ROAD = "A drama, The Last Road:"
LONG = " Skip it. Stay away! I hated the plot and the music."
PAIRS = [
    Pair(ROAD, " The plot is superb.", " Skip it.", KIND, {}),
    Pair(ROAD, LONG, " Pure joy!", WARM, {}),
]


@pytest.fixture
def judge():
    model = GPT(GPTConfig(748, 128, 2, 2, 16), seed=3).requires_grad_(False)
    for p in model.parameters():
        p *= 6 if p.dim() > 1 else 1
    return AIJudge(model, WORDS, Compute(SimpleNamespace(device="cpu", dtype="auto")))


def test_the_judge_is_read_not_sampled(judge):
    """The two option tokens' logits at the end of the question, as (A and (B spell them, against
    the whole vocabulary's by hand."""
    letters = [WORDS.encode("(" + letter)[-1] for letter in "AB"]
    assert judge.options == letters and WORDS.encode(" A") != letters[:1]
    found = judge.compare(PAIRS)
    for row, (pair, swap) in enumerate(itertools.product(PAIRS, (False, True))):
        a, b = (pair.b, pair.a) if swap else (pair.a, pair.b)
        ids = WORDS.encode(f"{pair.prompt}\n{pair.principle}\n(A)") + WORDS.answer(a)
        ids += WORDS.encode("\n(B)") + WORDS.answer(b) + WORDS.encode("\nBetter: (")
        logits = judge.model(torch.tensor([ids]))[0, -1]
        read = found[swap][row // 2]
        assert read.tolist() == pytest.approx(logits[letters].tolist(), abs=1e-4)
        shares = logits.softmax(0)[letters]
        share = (shares[0] / shares.sum()).item()
        assert read.softmax(0)[0].item() == pytest.approx(share, abs=1e-5)
    assert judge.compare([])[0].shape == (0, 2)


# ---- the phases


def by_length(self, pairs):
    """A judge in AIJudge.compare's place that prefers the longer answer, by a nat for each twenty
    characters more."""
    more = torch.tensor([(len(pair.a) - len(pair.b)) / 20 for pair in pairs])
    return torch.stack([more, 0 * more], 1), torch.stack([-more, 0 * more], 1)


@pytest.fixture(scope="module")
def watched(done):
    """A run in w/, in float64: phase -> [(line of the record, optimizer steps, rollouts)] of its
    training steps, as test_steps.py has them; and what the writers have made, by name, with the
    weights of each. The judge prefers the longer answer."""
    made, how_many = {}, {"skills": 30, "sl": 3, "pm": 3, "rl": 3}

    def keep(f):
        def call(self, n, name, *more):
            found = f(self, n, name, *more)
            made[name] = found, self.model.state_dict()
            return found

        return call

    with pytest.MonkeyPatch.context() as m:
        m.chdir(done)
        few(m, 16)
        taken, drawn = watching(m)
        m.setattr(AIJudge, "compare", by_length)
        m.setattr(Writer, "revise", keep(Writer.revise))
        m.setattr(Writer, "pairs", keep(Writer.pairs))
        args = [*SMALL, *SHORT, "--batch-size", 8, "--micro-batch", 4, "--lr", 0.01, "--beta", 0.5]
        args += ["--clamp", 0.2, "--temperature", 0.7, "--dtype", "float64", "--out", "w/x.pt"]
        assert main("rlaif", *args) == 0
    record = [line for name in PHASES for line in lines(done / f"w/{name}.jsonl") if "loss" in line]
    steps = iter(zip(record, taken, drawn, strict=True))
    return {phase: list(itertools.islice(steps, n)) for phase, n in how_many.items()}, made


def same_weights(weights, path):
    """Whether these weights are those of a checkpoint"""
    kept = load(path)[0].state_dict()
    return all(torch.equal(x, kept[name].to(x)) for name, x in weights.items())


def test_a_dialogue_counts_by_its_turns(watched):
    """The mean over turns of each turn's mean negative log-likelihood, however the step is cut."""
    for line, (step,), _ in watched[0]["skills"][:2]:
        loss, turns = 0.0, 0.0
        for ids, weight in step.rows:
            logp, _ = tokens(step.models.policy, ids[:1], ids[1:])
            loss = loss - (torch.tensor(weight[1:]) * logp).sum()
            turns += sum(weight)
        agree(line, [step], [(loss / turns, {})])


def test_sl_cai_learns_the_revisions_and_no_critique(watched):
    """Of both rounds; nothing of answers, principles or critiques. It starts from the skills."""
    phases, made = watched
    revisions, _ = made["revisions"]
    assert {row.a for row in revisions} & {
        row.b for row in revisions
    }  # the second revises the first
    assert {row.prompt for row in revisions} <= {x for x, _ in REVIEWS.prompts(None, 0, "rest")}
    texts = {(tuple(WORDS.encode(row.prompt)), tuple(WORDS.answer(row.b))) for row in revisions}
    for line, (step,), _ in phases["sl"]:
        assert {(tuple(x), tuple(y)) for x, y in step.rows} <= texts
        agree(line, [step], [(mean_nll(step), {})])


def test_the_preference_model_learns_soft_labels(watched, done):
    """-p log σ(Δ) - (1-p) log σ(-Δ), p clamped to [0.2, 0.8], of pairs that SL-CAI writes; the
    model starts from the skills."""
    phases, made = watched
    pairs, writer = made["comparisons"]
    assert same_weights(writer, done / "w/x-sl.pt")
    labels = {}
    for pair in pairs:
        p = torch.sigmoid(torch.tensor((len(pair.a) - len(pair.b)) / 20)).item()
        texts = WORDS.encode(pair.prompt), WORDS.answer(pair.a), WORDS.answer(pair.b)
        labels[tuple(map(tuple, texts))] = min(max(p, 0.2), 0.8)
    assert len(set(labels.values())) > 2
    start = phases["pm"][0][1][0].models.reward
    assert same_weights(start.trunk.state_dict(), done / "w/x-skills.pt")
    for line, (step,), _ in phases["pm"]:
        found = []
        for x, a, b, _, p in step.rows:
            assert p == pytest.approx(labels[tuple(x), tuple(a), tuple(b)])
            r_a, r_b = (score(step.models.reward, x, y) for y in (a, b))
            loss = -p * sigmoid(r_a - r_b).log() - (1 - p) * sigmoid(r_b - r_a).log()
            right = float((r_a > r_b) == (p > 0.5))
            found.append((loss, {"accuracy": right, "margin": abs(r_a - r_b).item()}))
        agree(line, [step], [averaged(found)])


def test_rl_cai_is_reinforce(watched, done):
    """-mean A log π; A is the preference model's score, less a missing end, less β KL to SL-CAI,
    less the mean of the other three. From its second step on the policy is no longer SL-CAI's."""
    sampled = 0
    for line, (step,), (rollout, *_) in watched[0]["rl"]:
        rows, models = responses(rollout), step.models
        scores, kls, logp_y, entropies = [], [], [], []
        for (x, y, finished), drawn_with in zip(rows, rollout.logp.double().sum(1).tolist()):
            logp, entropy = tokens(models.policy, x, y, 0.7)
            scores.append(score(models.reward, x, y).item() - (0.0 if finished else 1.0))
            kls.append(drawn_with - tokens(models.ref, x, y, 0.7)[0].sum().item())
            logp_y.append(logp.sum())
            entropies += entropy
        figures = group_figures([scores[i : i + 4] for i in range(0, 32, 4)]) | summary(rows)
        returns = [r - 0.5 * k for r, k in zip(scores, kls)]
        adv = advantages([returns[i : i + 4] for i in range(0, 32, 4)], "loo")
        sampled += len(entropies)
        figures |= {"kl": mean(kls), "entropy": mean(entropies), "sampled_tokens": sampled}
        agree(line, [step], [(-mean([A * logp for A, logp in zip(adv, logp_y)]), figures)])
    assert abs(line["kl"]) > 0.01
    assert same_weights(models.ref.state_dict(), done / "w/x-sl.pt")
    assert same_weights(models.reward.state_dict(), done / "w/x-pm.pt")


def test_what_does_not_end_or_differ_is_left_out(monkeypatch):
    """Of pairs that are equal or not whole nothing is left; a revision counts where its answer,
    critique and itself have ended, in this round and those before."""
    o = SimpleNamespace(max_new_tokens=0, seed=0)
    writer = Writer(None, SimpleNamespace(o=o, block_size=256), REVIEWS, skills.PRINCIPLES)
    replies = [(list("aabcde"), [True] * 5 + [False])]
    monkeypatch.setattr(writer, "ask", lambda *_: replies.pop(0))
    (pair,) = writer.pairs(3, "x", "test")
    assert (pair.a, pair.b) == ("b", "c") and pair.principle in skills.PRINCIPLES
    ended = [True] * 3
    replies += [(["a", "b", "c"], [True, True, False]), (["A", "B", "C"], ended)]
    replies += [(["a1", "b1", "c1"], [True, False, True]), (["A1", "B1", "C1"], ended)]
    replies += [(["a2", "b2", "c2"], ended)]
    found = writer.revise(3, "x", "test", rounds=2)
    texts = [(row.a, row.critique, row.b) for row in found]
    assert texts == [("a", "A", "a1"), ("a1", "A1", "a2")]


def test_figures_of_feedback_by_hand():
    """Three pairs: both orders right; torn, right in the mean; a tie of gold, which does not
    count."""
    joy, misery, skip = " Pure joy!", " Pure misery!", " Skip it."
    answers = [(joy, skip), (misery, joy), (joy, joy)]
    pairs = [Pair("A drama, X:", a, b, KIND, {}) for a, b in answers]
    first, second = torch.tensor([0.9, 0.6, 0.9]), torch.tensor([0.7, 0.1, 0.8])
    ab = torch.stack([first, 1 - first], 1).log()
    ba = torch.stack([1 - second, second], 1).log()
    f = feedback.label_figures(REVIEWS, pairs, ab, ba, torch.tensor([True, True, False]))
    entropy = [-(p * math.log(p) + (1 - p) * math.log(1 - p)) for p in (0.8, 0.35, 0.85)]
    assert f == {
        "order_consistency": pytest.approx(2 / 3),
        "position_bias": pytest.approx((0.2 + 0.5 + 0.1) / 6),
        "label_mean": pytest.approx(2 / 3),
        "label_entropy": pytest.approx(sum(entropy) / 3),
        "label_agreement": 1.0,
        "one_order_agreement": pytest.approx(3 / 4),
        "accuracy": pytest.approx(1 / 3),
        "gold_accuracy": pytest.approx(1 / 2),
    }
    rows = [Pair("A drama, X:", a, b, KIND, {}) for a, b in ((skip, joy), (joy, joy))]
    f = feedback.revision_figures(REVIEWS, rows)  # -2 to 3
    assert f == {"revision_better": 0.5, "revision_equal": 0.5, "revision_gain": 2.5}
    assert feedback.label_figures(REVIEWS, [], *torch.zeros(2, 0, 2)) == {}
    assert feedback.revision_figures(REVIEWS, []) == {}


def test_no_gold_reward_is_read_in_training(done, monkeypatch):
    """A task whose reward raises trains through, skills included, to the same bits as one whose
    gold reward is there to be measured."""
    monkeypatch.chdir(done)

    def refuse(*args, **columns):
        raise RuntimeError("gold is read")

    monkeypatch.setattr(reviews.Reviews, "reward", refuse)
    with pytest.raises(RuntimeError, match="gold is read"):  # the figures read it
        main("rlaif", "--init", "a/x-skills.pt", *SHORT, "--out", "n/x.pt")
    monkeypatch.setattr(reviews.Reviews, "has_reward", False)
    assert main("rlaif", *SMALL, *SHORT, "--out", "n/x.pt") == 0
    for name in PHASES:
        a, b = (load(done / folder / f"{name}.pt")[0] for folder in "an")
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())), name
    final = lines(done / "n/x.jsonl")[-1]["final"]
    assert not {"reward", "label_agreement"} & set(final) and "order_consistency" in final
    assert math.isfinite(final["kl"])


FIGURES = (
    "reward ref_reward win_rate kl length ref_length score order_consistency position_bias "
    "label_mean label_entropy revision_better revision_equal revision_gain"
).split()


def test_end_to_end(done, call):
    """Documented finite figures of every phase, the models of each, a checkpoint that evaluates to
    the same against the skills."""
    _, *steps, last = lines(done / "a/x.jsonl")
    final = last["final"]
    assert all(math.isfinite(final[name]) for name in FIGURES)
    documented(steps, final)
    for name in PHASES[:3]:
        _, *more, end = lines(done / f"a/{name}.jsonl")
        documented(more, end["final"])

    def held(figures, key="models"):
        roles = [m["role"] + "*" * m["trainable"] for m in figures.get(key, [])]
        return " ".join(roles)

    phases = {phase["phase"]: phase for phase in final["phases"]}
    assert list(phases) == ["skills", "sl", "pm"]
    assert list(map(held, phases.values())) == ["policy*", "policy*", "reward*"]
    models_asked = [held(phase, "models_asked") for phase in phases.values()]
    assert models_asked == ["", "policy", "policy judge"]
    assert held(final) == "policy* ref reward"
    assert phases["skills"]["reward"] == final["ref_reward"]
    assert phases["sl"]["revisions"] > 0 and phases["pm"]["labels"] > 0
    assert final["wall_s"] >= sum(phase["wall_s"] for phase in phases.values())
    made = files_in(done / "a")
    assert made == sorted(f"{name}.{end}" for name in PHASES for end in ("pt", "jsonl"))
    said = call("evaluate", "a/x.pt", "--device", "cpu", cwd=done)
    assert f"{final['kl']:.2f} ±" in said


def test_other_judges_and_principles(done, monkeypatch):
    """--judge may have any vocabulary; --constitution may be a selection."""
    monkeypatch.chdir(done)
    make_vocab(["--size", "300", "--out", "small.tiktoken"])
    own, meta = data.tokenizer("small.tiktoken"), load("a/x-skills.pt")[1]
    model = GPT(GPTConfig(own.size, 512, 1, 1, 8), seed=1)
    save(model, "judge.pt", **(meta | {"tokenizer": own.meta}))
    (done / "one.txt").write_text("# mine\n\nBe warm.\n")
    compared, compare = [], AIJudge.compare

    def watch(self, pairs):
        compared.append((self, pairs))
        return compare(self, pairs)

    monkeypatch.setattr(AIJudge, "compare", watch)
    args = ["--init", "a/x-skills.pt", *SHORT, "--judge", "judge.pt", "--constitution", "one.txt"]
    assert main("rlaif", *args, "--clamp", 0.4, "--out", "o/x.pt") == 0
    assert all(judge.tokenizer.meta == own.meta for judge, _ in compared)
    assert {pair.principle for _, pairs in compared for pair in pairs} == {"Be warm."}
    assert max(len(pairs) for _, pairs in compared) > 10
    assert lines(done / "o/x-pm.jsonl")[1]["loss"] < 1.0


# ---- interruptions


def killed_before(method, args, monkeypatch):
    """The run dies in a phase while its data are made."""
    hold = Run.hold

    def die(self, **models):
        if self.method == method:
            raise Stopped("killed")
        hold(self, **models)

    with monkeypatch.context() as m:
        m.setattr(Run, "hold", die)
        assert main("rlaif", *args) == 1


@pytest.mark.parametrize(
    "method, at",
    [
        ("rlaif-skills", 25),
        ("rlaif-sl", None),
        ("rlaif-sl", 3),
        ("rlaif-pm", None),
        ("rlaif-pm", 2),
        ("rlaif", 3),
    ],
)
@pytest.mark.machine
def test_resume_between_and_inside_phases_gives_the_same_bits(
    method, at, done, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    args = [*SMALL, *SHORT, "--save-every", 1, "--out", "a/x.pt"]
    before = PHASES[: PHASES.index(f"x{method[5:]}")]
    for name in before:  # what has been made before
        for end in ("pt", "jsonl"):
            shutil.copy(done / f"a/{name}.{end}", f"a/{name}.{end}")
    again = [*args, "--resume"] if before else args
    if at:
        killed(at, "rlaif", again, monkeypatch)
    else:
        killed_before(method, again, monkeypatch)
    assert not (tmp_path / "a/x.pt").exists()
    capsys.readouterr()
    if method == "rlaif-pm":
        assert main("rlaif", *args, "--resume", "--beta", 0.3) == 2
        assert "x-skills.pt belongs to a finished run with --beta 0.05" in capsys.readouterr().err
    assert main("rlaif", *args, "--resume") == 0
    said = capsys.readouterr().out
    assert ("resumed after step" in said) == bool(at) and said.count("has ended") == len(before)
    for name in PHASES:
        same(tmp_path / "a", done / "a", name)
    assert main("rlaif", *args, "--resume") == 0
    assert "this run has finished" in capsys.readouterr().out


@pytest.mark.machine
def test_stale_phases_are_made_anew(done, tmp_path, monkeypatch, capsys):
    """Interrupted in SL-CAI, beside the later phases of an earlier run with other options: --resume
    takes none of these."""
    args = [*SMALL, *SHORT, "--sl-lr", 0.01, "--save-every", 1, "--out", "a/x.pt"]
    for folder in ("cut", "whole"):
        (tmp_path / folder).mkdir()
    shutil.copytree(done / "a", tmp_path / "cut/a")
    monkeypatch.chdir(tmp_path / "cut")
    killed(33, "rlaif", args, monkeypatch)
    shutil.copy("a/x-sl.state", "a/x-pm.state")  # as an earlier interruption would have left
    assert main("rlaif", *args, "--resume") == 0
    assert capsys.readouterr().out.count("has ended") == 1
    monkeypatch.chdir(tmp_path / "whole")
    assert main("rlaif", *args) == 0
    for name in PHASES:
        same(tmp_path / "cut/a", tmp_path / "whole/a", name)


@pytest.mark.machine
@pytest.mark.parametrize("at, more", [(3, []), (33, []), (37, ["--sl-lr", 0.01])])
def test_killed_before_the_first_save_beside_an_older_run(
    at, more, done, tmp_path, monkeypatch, capsys
):
    """The older run's record is gone, and its checkpoint is none of this one's: --resume begins the
    phase anew, and makes those after it anew."""
    shutil.copytree(done / "a", tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    args = [*SMALL, *SHORT, *more, "--out", "a/x.pt"]
    killed(at, "rlaif", args, monkeypatch)
    assert not list((tmp_path / "a").glob("*.state"))
    capsys.readouterr()
    assert main("rlaif", *args, "--resume") == 0
    said = capsys.readouterr().out
    ended = (at > 30) + (at > 33) + (at > 36)
    assert said.count("has ended") == ended and "finished" not in said
    if not more:
        for name in PHASES:
            same(tmp_path / "a", done / "a", name)
        steps = [line["step"] for line in lines(tmp_path / "a/x.jsonl")[1:-1]]
        assert steps == [1, 2, 3]


@pytest.mark.slow
def test_ten_kills(tmp_path):
    """kill -9 at ten random moments of a run of all phases, each followed by --resume: every
    checkpoint is that of a run left alone."""
    args = [*SMALL, *SHORT, "--save-every", 2, "--sl-steps", 20, "--pm-steps", 20, "--steps", 20]
    args = list(map(str, [*args, "--out", "a/x.pt"]))
    cut, kept = tmp_path / "cut", tmp_path / "whole"
    for folder in (cut, kept):
        folder.mkdir()
    start = time.time()
    run("rlaif.py", *args, cwd=kept)
    wall, rng, kills = time.time() - start, random.Random(0), 0
    while kills < 10:
        command = [sys.executable, ROOT / "rlaif.py", *args, "--resume"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, cwd=cut, **quiet)
        start = time.time()
        try:
            process.wait(rng.uniform(0.3, 1.0) * wall)
            wall = time.time() - start  # the machine is less busy than it was
            shutil.rmtree(cut / "a")  # it got through: once more from the start
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    run("rlaif.py", *args, "--resume", cwd=cut)
    for name in PHASES:
        same(cut / "a", kept / "a", name)


@pytest.mark.slow
def test_the_whole_pipeline_teaches(tmp_path):
    """With the defaults: labels that agree with the gold reward more often than 0.7, each phase
    better than the one before, and the last at least 0.3 above the skills; in less than five
    minutes where nothing else runs."""
    run("rlaif.py", "--device", "cpu", cwd=tmp_path)
    f = lines(tmp_path / "out/reviews/rlaif.jsonl")[-1]["final"]
    assert f["label_agreement"] > 0.7 and f["label_agreement"] > f["one_order_agreement"]
    assert f["revision_gain"] > 0.5 and f["win_rate"] > 0.7
    assert f["ref_reward"] + 0.3 < f["phases"][1]["reward"] < f["reward"] - 0.1
    assert f["phases"][2]["gold_accuracy"] > 0.7
