"""The distillation of distill.py: losses by hand, gradients by enumeration, the states that it
trains on, and its fixed point."""

import math

import pytest
import torch
from conftest import ENDS, TINY, few_prompts, lines, main
from test_gradients import TOKENIZER, WORLD, cosine, gradient, small

import data
import distill
from distill import divergence, jsd, kl, sampled_loss
from gpt import GPT, GPTConfig, load, save
from training import Rollout, checkpoint, teacher
from training.sampling import sample

LOG = math.log
LOSSES = ("reverse", "forward", "jsd", "sampled")


def logp(*p):
    return torch.tensor(p, dtype=torch.float64).log()


@pytest.fixture(autouse=True)
def few_test_prompts(monkeypatch):
    few_prompts(monkeypatch, 8)


# ---- by hand

P, T = (3 / 4, 1 / 4), (1 / 2, 1 / 2)  # the student's distribution over two tokens, the teacher's


def test_divergences_by_hand():
    """KL(π‖π_T) = ¾ log 3/2 + ¼ log 1/2; KL(π_T‖π) = ½ log 2/3 + ½ log 2. With β = ¼ the mixture is
    ¼·½ + ¾·¾ = 11/16 and 5/16; JSD = ¼ KL(π_T‖m) + ¾ KL(π‖m)."""
    both = logp(P), logp(T)
    reverse, forward = 0.75 * LOG(1.5) + 0.25 * LOG(0.5), 0.5 * LOG(2 / 3) + 0.5 * LOG(2)
    theirs = 0.5 * LOG(8 / 11) + 0.5 * LOG(8 / 5)
    own = 0.75 * LOG(12 / 11) + 0.25 * LOG(4 / 5)
    expected = {"reverse": reverse, "forward": forward, "jsd": 0.25 * theirs + 0.75 * own}
    for loss, value in expected.items():
        found = divergence(*both, loss, beta=0.25)
        assert found.shape == (1,) and found.item() == pytest.approx(value, abs=1e-12)
    for beta in (1e-6, 1 - 1e-6):  # at its ends, the two KLs
        limit = jsd(*both, beta).item() / min(beta, 1 - beta)
        assert limit == pytest.approx(forward if beta < 0.5 else reverse, rel=1e-4)
    with pytest.raises(AssertionError, match="one vocabulary"):
        kl(logp((0.5, 0.5)), logp((0.5, 0.25, 0.25)))


@pytest.mark.parametrize("loss", LOSSES[:3])
def test_equal_distributions_move_nothing(loss):
    z = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    found = divergence(z.log_softmax(1), z.detach().log_softmax(1), loss, beta=0.3)
    torch.testing.assert_close(found.detach(), torch.zeros(5).double())
    assert torch.autograd.grad(found.sum(), z)[0].abs().max() < 1e-12


def test_gradients_by_hand():
    """In the logits z: forward π - π_T; reverse π (log π/π_T - KL(π‖π_T))."""
    z = logp(P).requires_grad_()
    for loss in ("reverse", "forward"):
        (found,) = torch.autograd.grad(divergence(z.log_softmax(1), logp(T), loss).sum(), z)
        value = kl(logp(P), logp(T)).item()
        by_hand = [p * (LOG(p / t) - value) for p, t in zip(P, T)]
        by_hand = by_hand if loss == "reverse" else [p - t for p, t in zip(P, T)]
        assert found[0].tolist() == pytest.approx(by_hand, abs=1e-12)


def test_the_sampled_loss_by_hand():
    """π = ½, π_old = ¼, π_T = ⅛: ρ = 2, A = log ¼, the loss is 2 log 4, and its gradient in log π
    the same: A has none."""
    own = torch.tensor([[LOG(0.5)]], requires_grad=True)
    loss = sampled_loss(own, torch.tensor([[LOG(0.25)]]), torch.tensor([[LOG(0.125)]]))
    assert loss.item() == pytest.approx(2 * LOG(4))
    loss.backward()
    assert own.grad.item() == pytest.approx(2 * LOG(4))


@pytest.mark.parametrize("stale", [False, True])
def test_the_sampled_token_s_mean_gradient_is_that_of_reverse(stale):
    """The expectation over all tokens of a state, drawn from π_old: exactly, at each state."""
    draws = torch.Generator().manual_seed(1)
    z, theirs, before = (torch.randn(3, 6, generator=draws).double() for _ in range(3))
    z.requires_grad_()
    own, theirs = z.log_softmax(1), theirs.log_softmax(1)
    old = before.log_softmax(1) if stale else own.detach()
    mean = (old.exp() * sampled_loss(own, old, theirs)).sum()
    (found,) = torch.autograd.grad(mean, z, retain_graph=True)
    (exact,) = torch.autograd.grad(divergence(own, theirs).sum(), z)
    assert exact.abs().max() > 0.01
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


# ---- the states


def two_models():
    """-> a student, a wider teacher, and a batch of responses"""
    student = GPT(GPTConfig(11, 16, 1, 2, 8), seed=0).double()
    wider = GPT(GPTConfig(11, 16, 2, 2, 12), seed=1).double().requires_grad_(False)
    with torch.no_grad():
        student.wte.weight *= 20
        wider.wte.weight *= 20
    rows = [((1, 2, 3), (4, 5, 0)), ((1, 2), (6, 0)), ((1, 2, 3), (4, 7))]
    return student, wider, data.pad(rows)


@pytest.mark.parametrize("states", [100, 2])
def test_the_states_are_those_of_plain_logits(states, monkeypatch):
    """In one chunk and in several: the value, off the response 0, and the gradient; no table has
    more states than a chunk."""
    monkeypatch.setitem(teacher.TABLE, "cpu", states * 4 * 11)
    student, wider, batch = two_models()
    seen = []

    def f(own, theirs):
        seen.append((len(own), theirs.requires_grad))
        return divergence(own, theirs, "jsd", 0.3), own[:, 0].detach()

    found, _ = teacher.compared(student, wider, batch, f, temperature=0.7)
    plain = [(m(batch.ids) / 0.7).log_softmax(-1)[:, :-1] for m in (student, wider)]
    plain = torch.nn.functional.pad(divergence(*plain, "jsd", 0.3), (1, 0)) * batch.mask
    torch.testing.assert_close(found, batch.unfold(plain))
    expected = gradient(plain.sum(), student)
    torch.testing.assert_close(gradient(found.sum(), student), expected)
    assert expected.abs().max() > 1e-3 and {x for _, x in seen} == {False}
    assert max(n for n, _ in seen) == min(states, 7)  # 3 + 2 + 2 states
    assert len(seen) == (1 if states == 100 else 4 + 4)  # each again in the backward pass


def options(*argv):
    return distill.parse(distill.Options, ["--device", "cpu", *argv], distill.PRESETS)


@pytest.fixture(scope="module")
def drawn():
    """20,480 samples of a policy on `exact`, a teacher, and by enumeration the gradient of
    Σ_s P(s) KL(π_θ‖π_T at s), whose P(s), how often the state is visited, has none."""
    policy, other = small(0).double(), small(1).double().requires_grad_(False)
    prompts, generator = [TOKENIZER.encode(x) for x in WORLD.contexts], torch.Generator()
    s = sample(policy, prompts, 3, TOKENIZER.ends, 1.0, generator.manual_seed(0), 5120)
    rows, _ = data.encode(WORLD.rows, TOKENIZER, 8)
    every = data.pad(rows)
    with torch.no_grad():
        p = policy.logprobs(every.ids, every.mask).sum(1, keepdim=True).exp() / 4
    (table,) = teacher.compared(policy, other, every, lambda a, b: (divergence(a, b),))
    return policy, other, s, gradient((p * table).sum(), policy)


@pytest.mark.parametrize("loss, near", [("reverse", 0.9999), ("sampled", 0.99), ("forward", -1)])
def test_mean_gradients_against_enumeration(loss, near, drawn):
    policy, other, s, exact = drawn
    batch = Rollout(ids=s.ids, mask=s.mask, logp=s.logp, old_logp=None)
    losses, _ = distill.compute_loss(policy, other, batch, options("--loss", loss))
    found = gradient((losses * s.mask).sum() / len(s), policy)
    assert cosine(found, exact) > near
    if loss == "forward":
        assert cosine(found, exact) < 0.98  # another direction
    else:
        assert (found.norm() / exact.norm()).item() == pytest.approx(1, abs=0.05)


def test_figures_are_exact_kls_and_entropies(drawn):
    """kl_teacher is a sum over a response's states of KL(π_θ‖π_T), whatever the loss; with sampled
    it is that of the drawn tokens' log-ratios, which agrees in the mean."""
    policy, other, s, _ = drawn
    batch = Rollout(ids=s.ids, mask=s.mask, logp=s.logp, old_logp=None)
    found = {}
    with torch.no_grad():
        for loss in LOSSES:
            _, found[loss] = distill.compute_loss(policy, other, batch, options("--loss", loss))
        rows = data.encode(WORLD.rows, TOKENIZER, 8)[0]
        every = data.pad(rows)
        log_p, log_t = (m.logprobs(every.ids, every.mask).sum(1) for m in (policy, other))
        total = (log_p.exp() * (log_p - log_t)).sum() / 4
    for loss in LOSSES:
        x = found[loss]["kl_teacher"]
        assert abs(x.mean() - total) < 4 * x.std() / len(x) ** 0.5
        torch.testing.assert_close(found[loss]["entropy"], found["sampled"]["entropy"])
    assert torch.equal(found["jsd"]["kl_teacher"], found["reverse"]["kl_teacher"])


@pytest.mark.parametrize("agg", ["seq_mean", "token_mean"])
def test_weights_by_hand(agg):
    """Responses of 1 and 3 tokens."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    both = Rollout(ids=torch.zeros(2, 3).long(), mask=mask, logp=torch.zeros(2, 3))
    found = distill.token_weight(both[1:], both, agg)
    assert found[0].tolist() == pytest.approx([1 / 6] * 3 if agg == "seq_mean" else [1 / 4] * 3)


# ---- the run

SMALL = [*ENDS, "--teacher", "out/reviews/sft.pt", "--batch-size", 4, "--group", 4]
SMALL += "--steps 1 --eval-prompts 8 --log-every 1".split()


def micro_batches(monkeypatch, *args):
    """-> the batches that compute_loss has seen"""
    seen, compute_loss = [], distill.compute_loss

    def kept(policy, teacher, batch, o):
        seen.append(batch)
        return compute_loss(policy, teacher, batch, o)

    with monkeypatch.context() as m:
        m.setattr(distill, "compute_loss", kept)
        assert main("distill", *SMALL, *args, "--out", "distill/x.pt") == 0
    return seen


def test_given_answers_take_a_share_of_the_prompts(ends, monkeypatch):
    """Half of 4 prompts: 8 of 16 rows are answers of the task, which end; kl_teacher is a mean over
    the others."""
    monkeypatch.chdir(ends)
    more = ["--answers", 0.5, "--max-new-tokens", 40]
    (batch,) = micro_batches(monkeypatch, *more, "--micro-tokens", 0)
    assert batch.own.tolist() == [True] * 8 + [False] * 8
    texts = [data.tokenizer().decode(x[m].tolist()) for x, m in zip(batch.ids, batch.mask)]
    known = {y for _, y in data.task("reviews").demonstrations(8, "0 step 0")}
    assert set(texts[8:]) == known and not known & set(texts[:8])
    assert batch.finished[8:].all()
    line = lines(ends / "distill/x.jsonl")[1]
    models = [load(path)[0] for path in ("ends.pt", "out/reviews/sft.pt")]
    with torch.no_grad():
        _, metrics = distill.compute_loss(*models, batch, options())
    expected = metrics["kl_teacher"][:8].mean().item()
    assert line["kl_teacher"] == pytest.approx(expected, rel=1e-4)


def test_stale_samples_have_the_log_probs_they_were_drawn_with(ends, monkeypatch):
    """Four minibatches: ρ = 1 at the first step, and at the others π_old is what sampled."""
    monkeypatch.chdir(ends)
    more = ["--loss", "sampled", "--minibatches", 4, "--warmup", 0, "--lr", 0.01]
    first, *others = micro_batches(monkeypatch, *more)
    assert first.old_logp is None and len(others) == 3
    for batch in others:
        torch.testing.assert_close(batch.old_logp, batch.logp, rtol=0, atol=1e-4)
    (batch,) = micro_batches(monkeypatch, "--loss", "sampled", "--micro-tokens", 0)
    assert batch.old_logp is None


def test_the_student_is_made_of_half_the_width(ends, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls, (model, meta) = [], load(ends / "ends.pt")
    save(model, tmp_path / "teacher.pt", **meta)

    def run_path(path, run_name):
        calls.append(" ".join(checkpoint.sys.argv))
        args = "--steps 2 --batch-size 4 --n-layer 1 --n-head 2 --n-embd 8 --name half"
        assert main("sft", *args.split(), "--device", "cpu") == 0

    monkeypatch.setattr(checkpoint.runpy, "run_path", run_path)
    assert main("distill", *TINY, "--teacher", "teacher.pt", "--group", 2) == 0
    (call,) = calls
    assert call.endswith("sft.py --task reviews --device cpu --dtype auto --name half --n-embd 8")
    final = lines(tmp_path / "out/reviews/distill.jsonl")[-1]["final"]
    sizes = {m["role"]: (m["parameters"], m["trainable"]) for m in final["models"]}
    assert sizes["policy"][1] and not sizes["teacher"][1]
    assert sizes["policy"][0] < sizes["teacher"][0]
    said = capsys.readouterr().out
    assert "starts from out/reviews/sft-half.pt" in said and "teacher.pt is the teacher" in said
    assert math.isfinite(final["kl_teacher"]) and math.isfinite(final["kl"])


WRONG = """
--answers 0.1 | --answers 0.1 of --batch-size 4 prompts is less than one
--answers 1 | --answers: must be less than 1
--answers 0.5 --loss sampled | --answers is read with --loss reverse or forward or jsd only
--jsd-beta 0.1 | --jsd-beta is read with --loss jsd only, not with reverse
--jsd-beta 1 --loss jsd | --jsd-beta: must be less than 1
--reward rm | --reward
--teacher exact.pt | --teacher exact.pt has another vocabulary (4 tokens) than ends.pt
--teacher short.pt | --teacher short.pt has a context of 16, but the student needs 256
--teacher none.pt | none.pt: no such file
--teacher judge.pt | judge.pt is a reward model; give a language model
--task bare.jsonl --answers 0.5 | --answers 0.5 needs the rows' own answers: bare.jsonl:
--task bare.jsonl --init= | --init is empty
"""


@pytest.mark.parametrize("row", [row.split(" | ") for row in WRONG.strip().splitlines()])
def test_a_mistake_is_one_line(row, ends, monkeypatch, capsys):
    monkeypatch.chdir(ends)
    (ends / "bare.jsonl").write_text("".join(f'{{"prompt": "p {i}"}}\n' for i in range(40)))
    for name, config, own in (("exact", GPTConfig(4, 8, 1, 1, 8), TOKENIZER.meta),):
        save(GPT(config), f"{name}.pt", **load("ends.pt")[1] | {"task": "exact", "tokenizer": own})
    model, meta = load("ends.pt")
    save(GPT(GPTConfig(model.config.vocab_size, 16, 1, 1, 8)), "short.pt", **meta)
    assert main("distill", *SMALL, *row[0].split(), "--out", "distill/wrong.pt") == 2
    said = capsys.readouterr().err
    assert row[1] in said and said.count("\n") == 1
    assert not (ends / "distill/wrong.pt").exists()


def test_a_file_needs_a_student_and_a_teacher(ends, monkeypatch, capsys):
    monkeypatch.chdir(ends)
    (ends / "bare.jsonl").write_text('{"prompt": "p"}\n{"prompt": "q"}\n')
    assert main("distill", *TINY, "--task", "bare.jsonl", "--teacher", "ends.pt") == 2
    assert "the student, --init, and its teacher, --teacher, are needed" in capsys.readouterr().err


# ---- where it ends


def distance(folder, monkeypatch, loss, *args):
    """-> KL(π‖π_T) at the end, by enumeration; the teacher is SFT's policy, and the student has
    random weights"""
    monkeypatch.chdir(folder)
    model, meta = load("out/exact/sft.pt")
    with torch.no_grad():
        start = GPT(model.config, seed=5)
        start.wte.weight *= 2
    save(start, "random.pt", **meta)
    args = ["--task", "exact", "--init", "random.pt", "--loss", loss, *args]
    args += "--teacher out/exact/sft.pt --device cpu --eval-every 0 --out near.pt".split()
    assert main("distill", *args) == 0
    return lines(folder / "near.jsonl")[-1]["final"]["kl_teacher"]


@pytest.mark.parametrize("loss", LOSSES)
def test_it_comes_nearer_to_the_teacher(loss, world, monkeypatch):
    far = distance(world, monkeypatch, loss, "--steps", 1, "--lr", 1e-9, "--group", 2)
    near = distance(
        world, monkeypatch, loss, "--steps", 25, "--warmup", 3, "--lr", 5e-3, "--group", 24
    )
    assert far > 0.2 and near < 0.4 * far, (far, near)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_the_fixed_point_is_the_teacher(loss, world, monkeypatch):
    """With the defaults, from random weights: KL(π‖π_T) below 0.005 nats."""
    assert distance(world, monkeypatch, loss) < 0.005
