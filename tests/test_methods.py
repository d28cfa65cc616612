"""The tests that every method gets once it has a row in analysis/rows.py; also how one is added."""

import importlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import many
import pytest
import torch
from conftest import ENDS, ROOT, TRAIN, first_gradient, lines, main
from house import METHODS

from analysis import rows
from data import Stopped
from training import cut

SCRIPTS = [script for script in METHODS if script != "rlaif"]  # four stages: see test_rlaif.py
SPECIAL = {  # what a method is given besides
    "ppo": "--minibatches 2",
    "dapo": "--max-rounds 20",
    "online_dpo": "--samples-per-prompt 4",
    "distill": "--teacher out/reviews/sft.pt",
}


def arguments(script):
    """-> the options of a small run of three steps in float64"""
    row = next(row for row in rows.EVERY.values() if row.script == script)
    args = [*TRAIN, "--eval-prompts", 6, "--dtype", "float64"]
    args += ENDS if script != "reward_model" else ENDS[:2]
    args += ["--reward", "judge.py:odd"] if row.judged else []
    args += ["--group", 4] if row.grouped else []
    return [*args, *SPECIAL.get(script, "").split()]


def test_every_method_is_registered_once():
    """Its script, its row in analysis/rows.py, and in README's table."""
    without_row = set(METHODS) - set(rows.METHODS)
    assert not without_row, f"give {without_row} a row in analysis/rows.py"
    without_script = set(rows.METHODS) - set(METHODS)
    assert not without_script, f"rows of {without_script}, which is no script with PRESETS"
    looks = [row.look for row in rows.EVERY.values()]
    twice = {look for look in looks if looks.count(look) > 1}
    assert not twice, f"give each row of analysis/rows.py a look of its own: {twice}"
    for name, row in rows.EVERY.items():
        assert not row.like or rows.EVERY[row.like].models == row.models, name


# ---- the gradient

ON_POLICY = {row.script for row in rows.EVERY.values() if row.data == rows.REWARDS}


class Replay:
    """torch.Tensor.detach that remembers what it gave, and gives the same in later passes: π_old,
    which is π_θ at a rollout's first step, stays as it is while the weights are moved."""

    def __init__(self):
        self.detach, self.kept, self.again = torch.Tensor.detach, [], None

    def __call__(self, tensor):
        if self.again:
            return next(self.again)
        self.kept.append(self.detach(tensor))
        return self.kept[-1]


def central_difference(f, parameters, direction, h=1e-5):
    """-> (f(θ + hv) - f(θ - hv)) / 2h"""
    values = []
    for step in (h, -2 * h, h):
        with torch.no_grad():
            for p, v in zip(parameters, direction):
                p += step * v
        values.append(f())
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_gradient_of_the_loss_is_its_slope(script, ends, monkeypatch):
    """On the first micro-batch of a run, along a random direction: compute_loss's gradient and the
    central difference of its loss. No number in it is anything but finite."""
    module, seen = importlib.import_module(script), []
    compute_loss = module.compute_loss

    def checked(*args, **more):
        if not torch.is_grad_enabled() or seen:
            return compute_loss(*args, **more)
        models = [x for x in (*args, *more.values()) if isinstance(x, torch.nn.Module)]
        parameters = [p for model in models for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(0)
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        replay = Replay()

        def loss():
            replay.again = iter(replay.kept)
            return compute_loss(*args, **more)[0].sum().item()

        with monkeypatch.context() as m:
            if script in ON_POLICY:
                m.setattr(torch.Tensor, "detach", lambda x: replay(x))
            losses, metrics = compute_loss(*args, **more)
            gradient = torch.autograd.grad(losses.sum(), parameters)
            slope = central_difference(loss, parameters, direction)
        expected = sum((g * v).sum().item() for g, v in zip(gradient, direction))
        seen.append((expected, slope))
        assert all(torch.isfinite(x.double()).all() for x in (losses, *metrics.values()))
        raise Stopped("seen")

    monkeypatch.chdir(ends)
    monkeypatch.setattr(module, "compute_loss", checked)
    assert main(script, *arguments(script), "--out", "slope/x.pt") == 1
    [(expected, slope)] = seen
    assert abs(expected) > 1e-3 and slope == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("more", [("--micro-batch", 2), ("--micro-tokens", 40)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_micro_batches_do_not_change_the_gradient(script, more, ends, monkeypatch):
    """Nor the figures of the first step."""
    monkeypatch.chdir(ends)
    uncut, figures = first_gradient(script, arguments(script), monkeypatch)
    parts, taken = [], cut.taken
    monkeypatch.setattr(cut, "taken", lambda rows, part: parts.append(part) or taken(rows, part))
    micro, other = first_gradient(script, [*arguments(script), *more], monkeypatch)
    by_tokens = any(torch.is_tensor(part) for part in parts)
    assert uncut.abs().max() > 1e-6 and by_tokens == (more[0] == "--micro-tokens")
    torch.testing.assert_close(micro, uncut, rtol=1e-9, atol=1e-12)
    assert other.keys() == figures.keys()
    for name, x in figures.items():
        assert other[name] == pytest.approx(x, rel=1e-9, abs=1e-9), name


# ---- two processes


@pytest.fixture(scope="module")
def both(ends, tmp_path_factory):
    """A folder with the checkpoints of every method in two processes, and in one"""
    folder = tmp_path_factory.mktemp("methods")
    (folder / "out/reviews").mkdir(parents=True)
    for name in ("ends.pt", "judge.py", "out/reviews/sft.pt"):
        shutil.copy(ends / name, folder / name)
    cases = [[script, *map(str, arguments(script)), "--out", script] for script in SCRIPTS]
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command, how = [*torchrun, ROOT / "tests/many.py", "cases.json"], {"cwd": folder}
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        many.main(["cases.json"])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_are_one(script, both):
    one, two = (torch.load(both / f"{script}-{n}.pt", weights_only=True)["model"] for n in (1, 2))
    assert max((one[key] - two[key]).abs().max() for key in one) <= 1e-11


# ---- a new one

CPO = [  # simpo.py -> cpo.py
    (
        r'^""".*?^"""',
        '"""CPO: Contrastive Preference Optimization (arXiv:2401.08417).\n\n'
        "    L = -log σ(β(log π_θ(y_w) - log π_θ(y_l))) - α log π_θ(y_w)/|y_w|\n\n"
        '    python cpo.py --beta 0.1\n"""',
    ),
    (
        r"def simpo_loss.*?\n\n\n",
        '''def cpo_loss(logp_w, logp_l, len_w, beta=0.1, alpha=1.0):
    """CPO, arXiv:2401.08417. logp_*: (B,) log-probs of responses, in nats; len_w: (B,) tokens of
    the chosen one. Returns (B,) losses."""
    return -F.logsigmoid(beta * (logp_w - logp_l)) - alpha * logp_w / len_w


''',
    ),
    (
        r"    beta: float.*?\n\n\n",
        """    beta: float = opt(0.1, "β: scale of the log-probs", above=0)
    alpha: float = opt(1.0, "α: weight of the NLL of chosen, a mean over tokens", low=0)


""",
    ),
    (r"gamma_beta_ratio=0.25, ", ""),
    (r"len_w, len_l = ", "len_w, _ = "),
    (r"    gamma = .*?\n\n", "    losses = cpo_loss(logp_w, logp_l, len_w, o.beta, o.alpha)\n\n"),
    (r" / len_w\)\.detach", ").detach"),
    (r" / len_l\)\.detach", ").detach"),
    (r"    data\.say\(.*?\n", ""),
    (r'Run\("simpo"', 'Run("cpo"'),
]
ROW = '    "cpo": Row("cpo", PAIRS, "policy*", "pink *", "", "beta"),\n'
README = "| `cpo.py` | CPO [2401.08417](https://arxiv.org/abs/2401.08417) | 1: policy | prompt, "
README += "chosen, rejected | −log σ(β(log π_θ(y_w) − log π_θ(y_l))) − α log π_θ(y_w)/\\|y_w\\| |\n"


def sources(folder):
    """-> {the name of a file: its content}, of what git would keep"""
    kept = (".py", ".md", ".txt", ".toml", ".json", ".jinja", ".tiktoken")
    files = [x for x in Path(folder).rglob("*") if x.suffix in kept and x.is_file()]
    names = {str(x.relative_to(folder)): x for x in files}
    return {name: x.read_bytes() for name, x in names.items() if name[0] != "."}


def add_before(path, before, line):
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, line + before))


@pytest.mark.slow
def test_a_new_method_is_three_files(tmp_path):
    """CPO: its script, its row, its line in README. It trains, goes on with --resume, is evaluated,
    compared and predicted, and the tests that every method gets pass, as those of the house do."""
    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns(".*", "out", "__pycache__", "build")
    shutil.copytree(ROOT, copy, ignore=ignored)
    before = sources(copy)
    text = (copy / "simpo.py").read_text()
    for old, new in CPO:
        text, found = re.subn(old, new.replace("\\", r"\\"), text, flags=re.M | re.S)
        assert found, old
    (copy / "cpo.py").write_text(text)
    add_before(copy / "analysis/rows.py", '    "orpo": Row(', ROW)
    add_before(copy / "README.md", "| `orpo.py` |", README)
    touched = {name for name, x in sources(copy).items() if before.get(name) != x}
    assert touched == {"cpo.py", "analysis/rows.py", "README.md"}

    def run(*command, code=0):
        command = [sys.executable, *command]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    small = [*TRAIN, "--max-new-tokens", "4", "--eval-prompts", "8"]
    run(copy / "sft.py", *small, "--n-layer", "1", "--n-embd", "16")
    run(copy / "cpo.py", *small, "--save-every", "2", "--alpha", "0.5")
    final = lines(tmp_path / "out/reviews/cpo.jsonl")[-1]["final"]
    assert math.isfinite(final["kl"]) and [m["role"] for m in final["models"]] == ["policy"]
    assert "finished" in run(
        copy / "cpo.py", *small, "--save-every", "2", "--alpha", "0.5", "--resume"
    )
    assert "cpo" in run(copy / "evaluate.py", "out/reviews/cpo.pt", "--eval-prompts", "8")
    exact = ["--task", "exact", "--methods", "simpo", "cpo"]
    run(copy / "sft.py", *TRAIN, *exact[:2])
    for more in (["--init", "out/exact/sft.pt", "--budget", "512"], ["--predict", "own"]):
        assert re.search(r"\| cpo +\|", run(copy / "compare.py", *exact, *more))
    page = (ROOT / "docs/add-a-method.md").read_text()
    [tests] = re.findall(r"^pytest (-m .* -k .*cpo.*)$", page, re.M)
    assert "not kills" in tests  # nor does it run this test, whose name has no cpo
    said = run("-m", "pytest", "-p", "no:cacheprovider", *shlex.split(tests), copy / "tests")
    assert "failed" not in said and int(re.search(r"(\d+) passed", said)[1]) > 30, said
