"""The loggers of --log-to: what TensorBoard and Weights & Biases receive, and that --resume
continues their curves."""

import importlib.util
import json
import shutil

import pytest
from conftest import TINY, killed, lines, main

from data import UserError
from training import distributed, files, loggers
from training.files import Files

pytestmark = pytest.mark.machine

RUN = [*TINY, "--eval-every", "2", "--save-every", "1", "--out", "a/x.pt"]


def test_names_are_trls():
    step = {"step": 3, "loss": 0.5, "lr": 1e-3, "step_ms": 250.0, "kl": 2.0, "reward": 1.0}
    common = {"loss": 0.5, "learning_rate": 1e-3, "step_time": 0.25}
    assert loggers.scalars("kto", step) == common | {"kl": 2.0, "reward": 1.0}
    judged = {"objective/kl": 2.0, "objective/scores": 1.0}
    assert loggers.scalars("ppo", step) == common | judged
    closing = {"final": {"kl": 2.0, "models": [{}], "ended": True}}
    assert loggers.scalars("ppo", closing) == {"final/kl": 2.0}
    assert loggers.scalars("ppo", {"step": 3, "eval": {"kl": 2.0}}) == {"eval/kl": 2.0}
    assert loggers.scalars("ppo", {"method": "ppo", "options": {}, "processes": 1}) == {}


@pytest.mark.parametrize("how", ["tensorboard", "wandb"])
def test_a_missing_package_is_told_before_anything_is_written(how, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main("dpo", "--log-to", how) == 2
    error = capsys.readouterr().err
    assert f"needs the package {how}" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_is_no_place_for_curves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x.tb", "y.tb/notes.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        with pytest.raises(UserError, match=f"--out {name[0]}.pt would overwrite {name[:4]}, "):
            loggers.TensorBoard("dpo", f"{name[0]}.pt")
    (tmp_path / "z.tb").mkdir()
    (tmp_path / "z.tb/events.out.tfevents.1").write_text("")
    loggers.TensorBoard("dpo", "z.pt")


def test_a_logger_takes_every_line_of_the_record(tiny, tmp_path, monkeypatch):
    """The lines that a resumed run has already come first; the curve is the record."""
    seen = []

    class Seen(files.Logger):
        def begin(self, options, before):
            assert options["steps"] == 3
            seen[:] = before

        def take(self, line):
            seen.append(line)

    shutil.copy(tiny / "out/reviews/sft.pt", tmp_path / "s.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "Logger", Seen)
    args = ["--init", "s.pt", *RUN]
    killed(3, "dpo", args, monkeypatch)
    assert len(seen) == 4  # the options, two steps, an evaluation
    assert main("dpo", *args, "--resume") == 0
    record = (tmp_path / "a/x.jsonl").read_text().splitlines()
    assert [json.dumps(line) for line in seen] == record
    steps = [json.loads(line) for line in record[1:-1]]
    assert all(line["step_ms"] > 0 for line in steps if "eval" not in line)


def test_only_the_first_process_logs(tmp_path, monkeypatch):
    class Never(files.Logger):
        def begin(self, options, before):
            raise AssertionError("began")

        take = begin

    monkeypatch.setattr(distributed, "is_first", False)
    written = Files(str(tmp_path / "x.pt"), Never("dpo", "x.pt"))
    written.begin({})
    written.record({"step": 1})
    assert written.lines and not list(tmp_path.iterdir())


@pytest.mark.docs
def test_tensorboard_shows_the_record_also_of_a_resumed_run(tiny, tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shutil.copy(tiny / "out/reviews/sft.pt", tmp_path / "s.pt")
    monkeypatch.chdir(tmp_path)
    args = ["--init", "s.pt", *RUN, "--log-to", "tensorboard"]
    assert main("dpo", *args, "--lr", "1e-5") == 0  # an older run, whose curve is not this one's
    killed(3, "dpo", args, monkeypatch)
    assert main("dpo", *args, "--resume") == 0
    curves = events.EventAccumulator(str(tmp_path / "a/x.tb")).Reload()
    record = lines(tmp_path / "a/x.jsonl")
    for line in record[1:-1]:
        for name, x in loggers.scalars("dpo", line).items():
            found = {x.step: x.value for x in curves.Scalars(name)}
            assert found[line["step"]] == pytest.approx(x)
            assert len(found) == len(curves.Scalars(name)) == (1 if "eval" in name else 3)
    assert curves.Scalars("final/kl")[0].value == pytest.approx(record[-1]["final"]["kl"])


@pytest.mark.docs
def test_wandb_offline_goes_on_with_one_curve(tiny, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    shutil.copy(tiny / "out/reviews/sft.pt", tmp_path / "s.pt")
    monkeypatch.chdir(tmp_path)
    args = ["--init", "s.pt", *RUN, "--log-to", "wandb"]
    killed(3, "dpo", args, monkeypatch)
    wandb.finish(exit_code=1)  # as at the end of a process
    assert main("dpo", *args, "--resume") == 0
    name = lines(tmp_path / "a/x.jsonl")[0]["wandb"]
    folders = sorted((tmp_path / "a/wandb").glob("offline-run-*"))
    assert [x.name[-12:] for x in folders] == [name, name]
    assert all(list(folder.glob("run-*.wandb")) for folder in folders)
