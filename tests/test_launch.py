"""The launch of processes (training/launch.py): a complete environment, a restart by torchrun, the
command that resumes a run, and the file that the processes share."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import TINY, killed, main, run

from data import UserError
from training import distributed, launch

pytestmark = pytest.mark.machine

INIT = ["--init", "ends.pt", "--device", "cpu"]
WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.fixture
def environment(monkeypatch):
    """environment(names and texts): what stands in it of a launch"""

    def set_to(found):
        for name in [*WHOLE, "LOCAL_RANK", *(x for x in os.environ if "TORCHELASTIC" in x)]:
            monkeypatch.delenv(name, raising=False)
        for name, text in found.items():
            monkeypatch.setenv(name, text)

    return set_to


@pytest.mark.parametrize(
    "found, wrong",
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "no MASTER_ADDR and no MASTER_PORT;"),
        ({"WORLD_SIZE": "1"}, "this one has no RANK;"),
        ({"RANK": "1"}, "no WORLD_SIZE and no MASTER_ADDR"),
        (WHOLE | {"RANK": ""}, "this one has RANK='';"),
        (WHOLE | {"RANK": "x"}, "this one has RANK=x;"),
        (WHOLE | {"RANK": "2"}, "RANK=2 with WORLD_SIZE=2;"),
        (WHOLE | {"MASTER_ADDR": ""}, "MASTER_ADDR='';"),
        (WHOLE | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999;"),
        (WHOLE | {"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1;"),
    ],
)
def test_half_an_environment(found, wrong, environment, monkeypatch):
    environment(found)
    *place, mistake = launch.place()
    assert place == [0, 1, 0] and wrong in mistake and mistake.endswith("for one process")
    monkeypatch.setattr(distributed, "mistake", mistake)
    with pytest.raises(UserError, match="a process of many needs RANK"), distributed.joined():
        pass


def test_a_whole_environment(environment):
    """One process needs no address."""
    environment(WHOLE)
    assert launch.place() == (1, 2, 0, "")
    environment({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert launch.place() == (0, 1, 0, "")


def test_half_an_environment_is_one_line(tmp_path):
    half = os.environ | {"RANK": "0", "WORLD_SIZE": "2"}
    done = run("sft.py", "--steps", 1, cwd=tmp_path, ok=False, env=half)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("sft.py: a process of many needs RANK, WORLD_SIZE, MASTER_ADDR,")


def test_a_port_that_another_launch_has_is_one_line(environment):
    other = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment(WHOLE | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(other.port)})
    with pytest.raises(UserError, match=f"MASTER_PORT={other.port} .* a port of its own"):
        launch.connect(0, 2, distributed.PATIENCE)


# ---- torchrun starts a run again


def test_only_what_this_launch_has_begun_goes_on(ends, tmp_path, environment, monkeypatch, capsys):
    """On a restart, and not on a first start; another launch of the same command begins anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "started", True)
    monkeypatch.setattr(distributed, "launch", launch, raising=False)
    args = ["--init", ends / "ends.pt", *INIT[2:], *TINY, "--save-every", 1, "--out", "x.pt"]

    def start(folder, restarts):
        again = {"TORCHELASTIC_RESTART_COUNT": str(restarts)}
        environment(again | {"TORCHELASTIC_ERROR_FILE": f"/t/{folder}/attempt_{restarts}/0/e.json"})

    for folder, restarts, said in (
        ("none_a", 0, ""),  # as without --resume
        ("none_b", 1, "before x.jsonl had begun: it begins anew"),
        ("", 1, "it begins anew"),  # --log-dir /dev/null
        ("none_a", 1, "resumed after step 2 of 3"),
    ):
        start("none_a", 0)
        killed(3, "dpo", args, monkeypatch)
        capsys.readouterr()
        start(folder, restarts)
        assert main("dpo", *args) == 0
        out = capsys.readouterr().out
        assert said in out and ("resumed" in out) == ("resumed" in said)
        assert ("begins anew" in out) == ("begins anew" in said)


def test_a_launch_is_known_by_any_of_its_machines(tmp_path):
    record = tmp_path / "x.jsonl"
    record.write_text('{"launch": ["/t/none_a", "/t/none_b"]}\n{"step": 1}\n')
    assert launch.has_begun(record, {"/t/none_b", "/t/none_c"})
    assert not launch.has_begun(record, {"/t/none_c"}) and not launch.has_begun(record, set())
    for text in ("", "half a li", '{"method": "dpo"}'):
        record.write_text(text)
        assert not launch.has_begun(record, {"/t/none_a"})


@pytest.mark.parametrize("name", ["", "x.state"])
def test_resume_is_named_if_a_state_lies_there(name, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "store", dist.HashStore())
    monkeypatch.setattr(distributed, "size", 2)
    monkeypatch.setattr(distributed, "SAID", 0)
    monkeypatch.setattr(distributed, "saved", name and str(tmp_path / name))
    said = [distributed.to_say("")]
    (tmp_path / "x.state").write_text("")
    monkeypatch.setattr(distributed, "store", dist.HashStore())
    said += [distributed.to_say(""), distributed.to_say("")]
    kept = f"--resume goes on from {tmp_path}/x.state" if name else "no state was saved"
    ends = ["no state was saved", kept]
    assert said == [*(f"rank 0: another process has ended; {x}" for x in ends), ""]


# ---- the command that goes on


OF_OLD = "--nnodes 2 --nproc-per-node 4 --node-rank 1 --master-addr a --master-port 7"


@pytest.mark.parametrize(
    "above, words",
    [
        ("python -m torch.distributed.run --standalone dpo.py", "--standalone"),
        ("python3 /bin/torchrun --nnodes 1:2 --rdzv-id 7 -m dpo", "--nnodes 1:2 --rdzv-id 7"),
        ("python another.py", OF_OLD),
        ("", OF_OLD),
    ],
)
def test_the_command_keeps_how_it_was_started(above, words, environment, monkeypatch):
    """What the process above was started with; if that is unknown, what the environment has."""
    found = f"{above} --beta 0.2".replace(" ", "\0") + "\0"
    monkeypatch.setattr(launch, "ARGV", ["--beta", "0.2"])
    monkeypatch.setattr(launch, "Path", lambda _: SimpleNamespace(read_text=lambda: found))
    environment({"TORCHELASTIC_MAX_RESTARTS": "0", "MASTER_ADDR": "a", "MASTER_PORT": "7"})
    for name, text in {"GROUP_WORLD_SIZE": 2, "GROUP_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(text))
    assert launch.words() == ["torchrun", *words.split()]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert launch.words() == ["python"]


# ---- what one process writes for the others


class Full:
    """Rows that find no room; torch answers with an error of its own."""

    def __init__(self, hidden):
        self.hidden = hidden

    def save(self, file):
        file.write(b"half")
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            if self.hidden:
                raise RuntimeError("unexpected pos")  # noqa: B904
            raise


@pytest.mark.parametrize("hidden", [True, False])
def test_no_room_for_the_rows_that_processes_share(hidden, tmp_path, monkeypatch):
    monkeypatch.setattr(launch.tempfile, "tempdir", str(tmp_path))
    said = rf"{tmp_path}/\w+.rows cannot be written \(No space left on device\).* set TMPDIR"
    with pytest.raises(UserError, match=said):
        launch.stored(Full(hidden))
    assert not list(tmp_path.iterdir())


def test_no_folder_for_temporary_files(monkeypatch):
    def nowhere(**_):
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(launch.tempfile, "NamedTemporaryFile", nowhere)
    with pytest.raises(UserError, match="a temporary file cannot be written .* set TMPDIR"):
        launch.stored(Full(False))


def test_gradients_travel_in_buckets(monkeypatch):
    """Neighbours of one dtype, up to the limit; what is larger travels alone. Each is summed."""
    monkeypatch.setattr(launch, "BUCKET", 40)
    monkeypatch.setattr(dist, "all_reduce", lambda x: sent.append(x.numel()) or x.mul_(2))
    sizes, sent = [(2, 2), (5,), (3,), (7, 2), (1,)], []
    gradients = [torch.full(size, i + 1.0) for i, size in enumerate(sizes)]
    gradients.append(torch.ones(1, dtype=torch.float64))
    launch.total_gradients(gradients)
    assert sent == [9, 3, 14, 1, 1]
    assert [x.unique().item() for x in gradients] == [2.0, 4.0, 6.0, 8.0, 10.0, 2.0]
