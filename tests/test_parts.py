"""The saved state of a run with --shard (training/parts.py), in a process of its own."""

import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_distributed import has_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from data import UserError
from gpt import write
from training import parts

pytestmark = has_shard
SIZES = {"w": (5, 3), "b": (2,)}


@pytest.fixture
def save(tmp_path, monkeypatch):
    """save(step) writes a state whose tensors hold that number. -> the folder of its parts"""
    monkeypatch.chdir(tmp_path)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))

    def save(step):
        full = {name: torch.full(size, float(step)) for name, size in SIZES.items()}
        split = {name: DTensor.from_local(x, mesh, [Shard(0)]) for name, x in full.items()}
        state = parts.write({"step": step, "policy": split, "seeds": torch.arange(3)}, "x.state")
        write(state, "x.state")
        return Path(state["parts"])

    yield save
    dist.destroy_process_group()


def kept():
    """-> the step of the state, whose tensors are read"""
    state = parts.opened(torch.load("x.state", weights_only=True), "x.state")
    for name, x in state["policy"].items():
        assert x.shape == SIZES[name]
        x.read_into(found := torch.zeros(x.shape))
        assert (found == state["step"]).all()
    assert state["seeds"].tolist() == [0, 1, 2]
    return state["step"]


def test_each_tensor_has_a_file_and_the_state_none(save):
    folder = save(1)
    assert kept() == 1 and len(list(folder.glob("*.distcp"))) == len(SIZES)
    state = torch.load("x.state", weights_only=True)
    assert state["policy"] == {"w": ("part", "['policy']['w']", [5, 3]), "b": state["policy"]["b"]}


def test_the_folders_that_no_state_names_go(save):
    first, second = save(1), save(2)
    assert first != second and kept() == 2
    parts.drop("x.state")
    assert parts.folders("x.state") == [str(second)] and kept() == 2
    os.unlink("x.state")
    parts.drop("x.state")
    assert not parts.folders("x.state")


def test_a_state_that_cannot_be_read_keeps_its_parts(save):
    save(1)
    Path("x.state").write_bytes(b"a disk's error")
    parts.drop("x.state")
    assert len(parts.folders("x.state")) == 1


class Command:
    def __reduce__(self):
        return os.mkdir, ("made",)


def cut_short(folder):
    file = next(folder.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])


BROKEN = {  # how a folder is broken -> the error
    "without facts": (lambda folder: os.unlink(folder / ".metadata"), FileNotFoundError),
    "a file that is missing": (
        lambda folder: os.unlink(next(folder.glob("*.distcp"))),
        FileNotFoundError,
    ),
    "a file that is cut short": (cut_short, EOFError),
    "facts that are a program": (
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps(Command())),
        pickle.UnpicklingError,
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_folder_that_is_broken_is_no_state(how, save):
    """It is seen before the run begins, and nothing that a file names is called."""
    break_it, error = BROKEN[how]
    break_it(save(1))
    with pytest.raises(error):
        kept()
    assert not os.path.exists("made")


def test_a_file_of_other_bytes_is_one_line(save):
    file = next(save(1).glob("*.distcp"))
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match="cannot be read .Unpickling.*; start without --resume"):
        kept()
