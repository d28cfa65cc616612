"""Shared by the tests: how a script is run, and folders with tiny checkpoints."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches a hub, but for one of its own

import training  # noqa: E402
from data import Stopped  # noqa: E402
from training import Run  # noqa: E402

TRAIN = "--steps 3 --batch-size 4 --log-every 1 --warmup 1 --device cpu".split()
TINY = [*TRAIN, "--max-new-tokens", "4"]  # of a script that samples
EIGHT = ["--optimizer", "adamw8bit"]
BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(
    not BITSANDBYTES, reason="pip install -r requirements-gpu.txt"
)


def run(script, *args, cwd, ok=True, **more):
    """Runs a script as its user would; -> the finished process, its output as text."""
    done = subprocess.run(
        [sys.executable, ROOT / script, *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        **more,
    )
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def main(script, *args):
    """Runs a script in this process as its command does; -> its exit code."""
    try:
        training.command(importlib.import_module(script).main, [str(a) for a in args])
    except SystemExit as e:
        if e.code == 130:  # where the process would end, and signals are ignored
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return e.code or 0
    return 0


def lines(path):
    """-> the lines of a record, without the time that a step took, which is never the same"""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: x for k, x in line.items() if k != "step_ms"} for line in found]


def documented(steps, final):
    """docs/metrics.md names every key of a record's lines and of its final figures."""
    text = (ROOT / "docs/metrics.md").read_text()
    for key in {key for line in steps for key in line} | set(final):
        assert f"`{key}`" in text, f"{key} is logged but not in docs/metrics.md"


def killed(at, script, args, monkeypatch):
    """Runs a script that is killed at its optimizer step number `at`."""
    calls, update = [], Run.update

    def die(self, *rest, **more):
        calls.append(1)
        if len(calls) == at:
            raise Stopped("killed")
        update(self, *rest, **more)

    with monkeypatch.context() as m:
        m.setattr(Run, "update", die)
        assert main(script, *args) == 1


def files_in(folder):
    """-> the names of a folder's files, without the locks of runs, which stay behind"""
    return sorted(x.name for x in Path(folder).iterdir() if x.suffix != ".lock")


def few_prompts(monkeypatch, n):
    """The default of --eval-prompts, where the figures at the end of a run are not looked at"""
    default = training.Options.__dataclass_fields__["eval_prompts"]
    monkeypatch.setattr(default, "default", n)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, *args, cwd=folder): its main in this process, which must succeed; -> what it
    printed."""

    def call(script, *args, cwd):
        monkeypatch.chdir(cwd)
        code, said = main(script, *args), capsys.readouterr()
        assert code == 0, said.out + said.err
        return said.out

    return call


def first_gradient(script, args, monkeypatch, sample=None):
    """-> the gradient of the first optimizer step, all parameters, and its metrics. sample: in
    place of sampling.sample."""
    seen = []

    def update(self, optimizer):
        trained = [m for m in self.models.values() if next(m.parameters()).requires_grad]
        parameters = [p for model in trained for p in model.parameters()]
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        seen.append((gradient, self.figures.means()))
        raise Stopped("seen")

    with monkeypatch.context() as m:
        m.setattr(Run, "update", update)
        if sample:
            m.setattr("training.sampling.sample", sample)
        assert main(script, *args, "--dtype", "float64", "--out", "grad/x.pt") == 1
    return seen[0]


@pytest.fixture(autouse=True)
def threads():
    """One: where others share the cores, threads that wait for each other cost more than they do"""
    torch.set_num_threads(1)


def trained(folder, *args):
    """Runs sft.py in this process. -> the folder, which has its checkpoint"""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        assert main("sft", *args) == 0
    return folder


JUDGE = """
def odd(prompt, completion, **columns):
    return 1.0 if len(completion) % 2 else -1.0

def constant(prompt, completion):
    return 0.1
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with out/reviews/sft.pt, three steps of a tiny model."""
    small = "--n-layer 2 --n-head 2 --n-embd 16"
    return trained(tmp_path_factory.mktemp("tiny"), *TINY, *small.split())


ENDS = ["--init", "ends.pt", "--max-new-tokens", "8", "--device", "cpu"]
BATCH = ["--batch-size", 8, "--group", 4, "--reward", "judge.py:odd"]


@pytest.fixture(scope="session")
def ends(tiny):
    """`tiny` with ends.pt, the same model with about one end token in five, so that its responses
    have many lengths; judge.py, rewards that do not ask for sense; and judge.pt, a reward model of
    random weights."""
    from gpt import ScalarGPT, load, save

    model, meta = load(tiny / "out/reviews/sft.pt")
    with torch.no_grad():
        model.norm.bias += 1.0
        model.wte.weight[-1] += 0.32
    save(model, tiny / "ends.pt", **meta)
    save(ScalarGPT(model.config, seed=3), tiny / "judge.pt", **meta)
    (tiny / "judge.py").write_text(JUDGE)
    return tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with out/exact/sft.pt, 150 steps of 1,024 rows."""
    how = "--task exact --steps 150 --batch-size 1024 --device cpu"
    return trained(tmp_path_factory.mktemp("world"), *how.split())
