"""The commands as an operator uses them: real processes, what they print, how they end, and that the bytes are right."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors import safe_open  # noqa: E402

from peerload import bench  # noqa: E402
from peerload.cli import COMMANDS  # noqa: E402
from peerload.config import KEYS  # noqa: E402
from peerload.coordinator.client import CoordinatorClient, Granted  # noqa: E402
from peerload.model.catalog import ModelKey  # noqa: E402
from peerload.model.offer import Endpoint, SourceId  # noqa: E402
from peerload.testing.checkpoints import make_checkpoint  # noqa: E402

pytestmark = pytest.mark.e2e
PEERLOAD = (sys.executable, "-m", "peerload")
NAME = "tiny"
#: Where Llama under tensor parallelism cuts; what is not named is replicated.
CUT = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "gate_proj": 0,
    "up_proj": 0,
    "embed_tokens": 0,
    "lm_head": 0,
    "o_proj": 1,
    "down_proj": 1,
}


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Standard output, which must be one JSON document and nothing else."""
        assert self.out.endswith("\n"), f"standard output is {self.out!r}; standard error: {self.err}"
        parsed = json.loads(self.out)
        assert isinstance(parsed, dict)
        return parsed


def environment() -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k != "PEERLOAD_CONFIG"}, "OMP_NUM_THREADS": "1", "COLUMNS": "140"}


def peerload(*words: object) -> Outcome:
    command = [*PEERLOAD, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return Outcome(done.returncode, done.stdout, done.stderr)


@dataclass
class Running:
    process: subprocess.Popen[str]
    document: dict[str, Any]

    def end(self, how: signal.Signals) -> int:
        """Send it a signal; its exit status, once it has printed nothing more."""
        self.process.send_signal(how)
        rest, _ = self.process.communicate(timeout=20)
        assert rest == ""
        return self.process.returncode


@contextmanager
def started(log: Path, *words: object) -> Iterator[Running]:
    """A command that serves until it is told to stop, after it has said that it is ready."""
    with log.open("w") as err:
        process = subprocess.Popen(
            [*PEERLOAD, *map(str, words), "--json"], stdout=subprocess.PIPE, stderr=err, text=True, env=environment()
        )
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], 90)
            assert ready, f"{words[0]} says nothing: {log.read_text()}"
            line = process.stdout.readline()
            assert line, f"{words[0]} ended: {log.read_text()}"
            yield Running(process, json.loads(line))
        finally:
            process.kill()
            process.wait(20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / NAME)


@dataclass(frozen=True)
class World:
    url: str
    seed: dict[str, Any]


@pytest.fixture(scope="module")
def world(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A coordinator, and a seed that offers the checkpoint as TP2."""
    logs = tmp_path_factory.mktemp("logs")
    with started(logs / "coordinator", "coordinator", "--listen", "127.0.0.1:0", "--store", "memory") as coordinator:
        url = coordinator.document["address"]
        with started(logs / "seed", "seed", "--checkpoint", checkpoint, "--tp", 2, "--url", url) as seed:
            yield World(url, seed.document)


def whole(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of the checkpoint, by safetensors itself."""
    found = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return found


def shard(name: str, tensor: Any, tp: int, rank: int) -> tuple[Any, list[int]]:
    """A rank's part by torch.chunk, and where it begins."""
    start = [0] * tensor.ndim
    dim = CUT.get(name.split(".")[-2])
    if dim is None:
        return tensor, start
    parts = torch.chunk(tensor, tp, dim)
    start[dim] = sum(part.shape[dim] for part in parts[:rank])
    return parts[rank], start


def assert_direct_shard(path: Path, tensors: dict[str, Any], tp: int, rank: int) -> int:
    """That the file holds exactly this rank's part of every tensor; returns its bytes."""
    nbytes = 0
    with safe_open(path, "pt") as file:
        boxes = json.loads(file.metadata()["boxes"])
        assert sorted(file.keys()) == sorted(tensors) == sorted(boxes)
        for name, tensor in tensors.items():
            part, start = shard(name, tensor, tp, rank)
            got = file.get_tensor(name)
            assert (got.dtype, got.shape) == (part.dtype, part.shape), name
            assert torch.equal(got.view(torch.uint8), part.contiguous().view(torch.uint8)), name
            assert boxes[name]["start"] == start, name
            nbytes += got.nbytes
    return nbytes


# Words.


def test_every_help_teaches() -> None:
    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(COMMANDS, pool.map(lambda name: peerload(name, "--help"), COMMANDS), strict=True))
    for name, outcome in outcomes.items():
        assert outcome.status == 0, name
        assert f"peerload {name}" in outcome.out.partition("Example")[2], f"{name} has no example"
        assert "--json" in outcome.out
        assert "exit status: 0 done; 2 bad arguments" in outcome.out
    top = peerload("--help")
    assert top.status == 0
    assert "--load-format peerload" in top.out
    assert "docs/config.md" in top.out
    assert {line.split()[0] for line in top.out.splitlines() if line.startswith("    ") and line.strip()} >= COMMANDS.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_words_it_does_not_know_are_an_error_like_any_other(command: str) -> None:
    outcome = peerload(command, "--no-such-flag", "--json")
    assert outcome.status == 2
    assert outcome.document["exit_code"] == 2
    assert outcome.document["error"] == "ConfigError"
    assert outcome.document["next_step"] == f"peerload {command} --help"
    assert outcome.err.startswith("peerload: ConfigError:")


REFUSED = [
    (2, ["ls", "--config", '{"ulr": "x:1"}'], "unknown configuration key 'ulr'; known keys: " + ", ".join(KEYS)),
    (2, ["doctor", "--config", '{"url": 7}'], "url is 7, must be of type str"),
    (2, ["coordinator", "--listen", "127.0.0.1:0", "--store", "floppy:a"], "floppy"),
    (2, ["seed", "--checkpoint", "/nonexistent", "--tp", "2"], "/nonexistent"),
    (2, ["seed", "--checkpoint", "/nonexistent", "--tp", "0"], "must be at least 1"),
    (2, ["pull", "--model", "m", "--out", "{tmp}/out", "--tp", "2", "--rank", "2"], "tp=2 has ranks 0 to 1"),
    (2, ["plan", "--model", "/nonexistent", "--from", "tp=2", "--to", "tp=4"], "/nonexistent"),
    (2, ["plan", "--model", "/nonexistent", "--from", "2", "--to", "tp=4"], "'2' is no parallel layout"),
    (2, ["bench", "nothing"], "invalid choice: 'nothing'"),
    (2, ["pull", "--model", "m", "--out", "{tmp}/out", "--tp", "100000"], "tp=100000 has too many ranks, at most 1024"),
    (2, ["pull", "--model", "m", "--out", "/etc/passwd"], "can't write to /etc/passwd: File exists"),
    (2, ["pull", "--model", "m", "--out", "/proc/nope"], "can't write to /proc/nope: "),
    (2, ["pull", "--model", "m", "--out", "/dev/full"], "can't write to /dev/full: File exists"),
    (1, ["ls", "--url", "127.0.0.1:1"], "127.0.0.1:1 can't be reached"),
]


@pytest.mark.parametrize(("status", "words", "problem"), REFUSED, ids=[f"{w[0]}-{i}" for i, (_, w, _) in enumerate(REFUSED)])
def test_refusals_say_what_is_wrong(status: int, words: list[str], problem: str, tmp_path: Path) -> None:
    outcome = peerload(*(w.replace("{tmp}", str(tmp_path)) for w in words), "--json")
    assert outcome.status == outcome.document["exit_code"] == status
    assert problem in outcome.document["message"]
    assert problem in outcome.err


def test_common_flags_may_stand_before_the_command() -> None:
    for words in (["--json", "-v", "bench"], ["bench", "-v", "--json"], ["--json", "bench", "--json"]):
        outcome = peerload(*words)
        assert outcome.status == 0
        assert "benchmarks" in outcome.document


# What a host can do.


def test_doctor_says_what_works_and_what_to_do_next(world: World) -> None:
    told = peerload("doctor", "--fast", "--url", world.url)
    assert told.status == 0
    assert told.out.strip().splitlines()[-1].startswith("next: ")
    outcome = peerload("doctor", "--fast", "--url", world.url, "--json")
    assert outcome.status == 0
    findings = {f["what"]: f for f in outcome.document["findings"]}
    assert "local" in outcome.document["transports"]
    assert findings["torch"]["facts"]["version"] == torch.__version__
    assert findings["cores"]["facts"]["cores"] == len(os.sched_getaffinity(0))
    assert findings[f"coordinator {world.url}"]["facts"]["holdings"] == 2
    assert {"transport local", "transport nixl", "memfd", "ptrace", "GPUs", "locked memory"} <= findings.keys()
    assert findings["open doors"]["text"].startswith("none to other hosts")


def test_doctor_says_who_can_reach_the_weights() -> None:
    outcome = peerload("doctor", "--fast", "--config", '{"transport": "nixl", "interface": "lo"}', "--json")
    (door,) = (f for f in outcome.document["findings"] if f["what"] == "open doors")
    assert "every process that reaches lo can read and overwrite" in door["text"]


def test_doctor_survives_a_coordinator_that_is_not_there() -> None:
    outcome = peerload("doctor", "--fast", "--url", "127.0.0.1:1", "--json")
    assert outcome.status == 0
    assert "127.0.0.1:1" in outcome.document["next_step"]


def test_doctor_says_it_when_no_transport_works() -> None:
    code = (
        "import sys; sys.modules['peerload.native._lib'] = None\n"  # as if it had never been compiled
        "from peerload.cli import main; sys.exit(main(['doctor', '--fast', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment()
    )
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    assert outcome.status == 1
    assert (outcome.document["ok"], outcome.document["transports"]) == (False, [])
    assert "C compiler" in outcome.document["next_step"]


def test_bench_ends_in_the_benchmark_s_own_document() -> None:
    outcome = peerload("bench", "--json", "plan", "--", "--runs", 1, "--case", "llama-70b fp8 tp2 -> tp4")
    assert outcome.status == 0, outcome.err
    assert outcome.document["case"] == "llama-70b fp8 tp2 -> tp4"
    refused = peerload("bench", "--json", "plan", "--", "--runs", "many")
    assert refused.status == refused.document["exit_code"] == 2
    listed = peerload("bench", "--json").document["benchmarks"]
    files = {p.stem for p in Path(next(iter(bench.__path__))).glob("*.py")} - {"__init__"}
    assert files == set(listed)


def test_an_interrupted_command_still_tells_one_document() -> None:
    command = [*PEERLOAD, "bench", "plan", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment())
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        until_s = time.monotonic() + 30
        while not children.read_text() and time.monotonic() < until_s:
            time.sleep(0.02)
        (child,) = children.read_text().split()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 130
        assert json.loads(out)["exit_code"] == 130
        assert not Path(f"/proc/{child}").exists()
    finally:
        process.kill()


# Weights.


def test_ls_tells_who_holds_what(world: World, checkpoint: Path) -> None:
    outcome = peerload("ls", "--url", world.url, "--json")
    assert outcome.status == 0
    rows = outcome.document["holdings"]
    assert [(r["rank"], r["parallel"], r["instance"]) for r in rows] == [(r, "tp=2", world.seed["instance"]) for r in (0, 1)]
    held = sum(shard(n, t, 2, rank)[0].nbytes for n, t in whole(checkpoint).items() for rank in (0, 1))
    assert sum(r["bytes"] for r in rows) == world.seed["bytes"] == held
    people = peerload("ls", "--url", world.url)
    assert people.out.count(world.seed["instance"]) == 2


def test_ls_shows_a_peer_s_words_as_text(world: World) -> None:
    with CoordinatorClient(world.url) as client:
        name, _, revision = world.seed["model"].partition("@")
        offer, model = client.discover(ModelKey(name, revision))[0], ModelKey("evil [bold]x[/bold] [/nope]")
        binding = replace(
            offer.binding,
            source=SourceId("evil", 0, "0" * 32),
            attributes={"a\x1b[8m": "\x1b]0;owned\x07"},
            endpoints=(Endpoint("\x1b[2J\r\nnet", b""),),
        )
        lease = client.announce(replace(offer, binding=binding), model)
        outcomes = [peerload("ls", "--url", world.url), peerload("ls", "--url", world.url, "--json")]
        client.withdraw(lease)
    for outcome in outcomes:
        assert outcome.status == 0
        assert not set("\x1b\r\x07") & set(outcome.out + outcome.err)
    assert "evil [bold]x[/bold] [/nope]" in outcomes[0].out


@pytest.mark.parametrize("tp", [3, 1])
def test_what_is_pulled_is_a_direct_shard(world: World, checkpoint: Path, tmp_path: Path, tp: int) -> None:
    outcome = peerload("pull", "--model", NAME, "--tp", tp, "--out", tmp_path, "--url", world.url, "--json")
    assert outcome.status == 0, outcome.err
    tensors = whole(checkpoint)
    files = [Path(f) for f in outcome.document["files"]]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    for rank, (path, receipt) in enumerate(zip(files, outcome.document["receipts"], strict=True)):
        nbytes = assert_direct_shard(path, tensors, tp, rank)
        assert (receipt["rank"], receipt["needed_nbytes"], receipt["wire_nbytes"]) == (rank, nbytes, nbytes)
        assert receipt["verified_nbytes"] == nbytes


def test_one_rank_alone(world: World, checkpoint: Path, tmp_path: Path) -> None:
    outcome = peerload("pull", "--model", NAME, "--tp", 3, "--rank", 1, "--out", tmp_path, "--url", world.url, "--json")
    assert outcome.status == 0, outcome.err
    (path,) = tmp_path.iterdir()
    assert_direct_shard(path, whole(checkpoint), 3, 1)
    (receipt,) = outcome.document["receipts"]
    assert receipt["verified_nbytes"] + receipt["unverified_nbytes"] == receipt["needed_nbytes"]


def test_no_plan_is_exit_3_and_names_holes_and_refusals(world: World, tmp_path: Path) -> None:
    words = ["--model", NAME, "--tp", 3, "--out", tmp_path, "--url", world.url, "--match", "same-parallelism"]
    outcome = peerload("pull", *words, "--json")
    assert outcome.status == outcome.document["exit_code"] == 3
    assert outcome.document["holes"][0]["tensor"] == "model.embed_tokens.weight"
    assert [r["source"] for r in outcome.document["refusals"]] == [f"{world.seed['instance']}/rank {r}" for r in (0, 1)]
    assert list(tmp_path.iterdir()) == []


def test_nobody_there_is_exit_4(world: World, tmp_path: Path) -> None:
    outcome = peerload("pull", "--model", "unheard-of", "--tp", 2, "--out", tmp_path, "--url", world.url, "--json")
    assert outcome.status == outcome.document["exit_code"] == 4
    assert "nobody offers unheard-of" in outcome.document["message"]
    assert world.seed["model"] in outcome.document["message"]


# Files that make no sense.


def spoilt(checkpoint: Path, target: Path, **changes: object) -> Path:
    """The same checkpoint with another config.json."""
    target.mkdir()
    for path in checkpoint.iterdir():
        (target / path.name).symlink_to(path)
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps({**json.loads((checkpoint / "config.json").read_text()), **changes}))
    return target


def test_a_seed_of_files_that_make_no_sense_is_refused_in_one_line(world: World, checkpoint: Path, tmp_path: Path) -> None:
    heads = spoilt(checkpoint, tmp_path / "heads", num_attention_heads=7, head_dim=None)
    layers = spoilt(checkpoint, tmp_path / "layers", num_hidden_layers=10**9)
    header = spoilt(checkpoint, tmp_path / "header")
    raw = b"[" * 200_000
    (header / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw)
    for directory, problem in (
        (heads, "is not a multiple of the number of attention heads (7)"),
        (layers, "config.json: num_hidden_layers is 1000000000, at most 4096 are possible here"),
        (header, "model.safetensors: has a header that can't be read: maximum recursion depth exceeded"),
    ):
        outcome = peerload("seed", "--checkpoint", directory, "--tp", 2, "--url", world.url, "--json")
        assert outcome.status == outcome.document["exit_code"] == 2, outcome.err
        assert problem in outcome.document["message"]


def test_the_same_files_from_a_peer(world: World, checkpoint: Path, tmp_path: Path) -> None:
    """A pull takes the configuration and the tensors' names from whoever announces the model."""
    right = json.loads((checkpoint / "config.json").read_text())
    with CoordinatorClient(world.url) as client:
        name, _, revision = world.seed["model"].partition("@")
        offer = client.discover(ModelKey(name, revision))[0]
        for i, (content, problem) in enumerate(
            (
                ({**right, "num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
                ({**right, "hidden_size": float("nan")}, "Field 'hidden_size' expected int"),
                ({**right, "architectures": 5}, "architectures"),
                ([1], "config.json is not a JSON object"),
            )
        ):
            model = ModelKey(f"spoilt-{i}")
            evil = replace(offer, binding=replace(offer.binding, source=SourceId("evil", 0, f"{i:032x}")))
            client.announce(evil, model, files={"config.json": json.dumps(content).encode()})
            words = ["--model", model.name, "--tp", 2, "--out", tmp_path / "out", "--url", world.url, "--deadline-s", 60]
            outcome = peerload("pull", *words, "--json")
            assert outcome.status == outcome.document["exit_code"] == 2, outcome.err
            assert f"what the seeds of {model} publish can't be used: " in outcome.document["message"]
            assert problem in outcome.document["message"]
            client.withdraw(Granted(evil.source, 30.0))
    assert list((tmp_path / "out").iterdir()) == []


def test_working_out_layouts_ends_at_the_deadline(world: World, checkpoint: Path, tmp_path: Path) -> None:
    pull = ["pull", "--model", NAME, "--out", tmp_path / "out"]
    for words in (pull, ["seed", "--checkpoint", checkpoint]):
        outcome = peerload(*words, "--tp", 2, "--url", world.url, "--deadline-s", 0, "--json")
        assert outcome.status == outcome.document["exit_code"] == 4
        assert outcome.document["message"] == "the deadline passed while working out what 2 ranks of tp=2 hold"
    assert list((tmp_path / "out").iterdir()) == []


# Lives.


def test_a_coordinator_with_a_file_is_stopped_and_started_again_under_a_running_seed(checkpoint: Path, tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path}/coordinator.db"
    with started(tmp_path / "first", "coordinator", "--listen", "127.0.0.1:0", "--store", store) as first:
        url = first.document["address"]
        with started(tmp_path / "seed", "seed", "--checkpoint", checkpoint, "--tp", 2, "--url", url, "--instance", "s") as seed:
            before = peerload("ls", "--url", url, "--json").document["holdings"]
            assert first.end(signal.SIGTERM) == 0
            with started(tmp_path / "again", "coordinator", "--listen", url, "--store", store) as again:
                after = peerload("ls", "--url", url, "--json").document["holdings"]
                keys = ("instance", "rank", "generation", "layout")
                assert [[r[k] for k in keys] for r in after] == [[r[k] for k in keys] for r in before]
                assert len(after) == 2
                out = tmp_path / "out"
                pulled = peerload("pull", "--model", NAME, "--tp", 1, "--out", out, "--url", url, "--json")
                assert pulled.status == 0, pulled.err
                assert_direct_shard(Path(pulled.document["files"][0]), whole(checkpoint), 1, 0)
                assert seed.end(signal.SIGINT) == 0
                assert peerload("ls", "--url", url, "--json").document["holdings"] == []
                assert again.end(signal.SIGINT) == 0


def test_sigterm_ends_a_seed_and_withdraws_it(world: World, checkpoint: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", checkpoint, "--tp", 1, "--url", world.url, "--instance", "short-lived", "--model-name", "other"]
    with started(tmp_path / "seed", "seed", *words) as seed:
        assert seed.document["model"].startswith("other@")
        began_s = time.monotonic()
        assert seed.end(signal.SIGTERM) == 0
        assert time.monotonic() - began_s < 10
    held = {r["instance"] for r in peerload("ls", "--url", world.url, "--json").document["holdings"]}
    assert held == {world.seed["instance"]}


def test_a_seed_whose_place_is_taken_ends(world: World, checkpoint: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", checkpoint, "--tp", 2, "--url", world.url, "--instance", "twin", "--model-name", "taken"]
    with started(tmp_path / "seed", "seed", *words) as seed, CoordinatorClient(world.url) as client:
        model = ModelKey("taken", seed.document["model"].partition("@")[2])
        offer = client.discover(model)[1]
        other = replace(offer, binding=replace(offer.binding, source=replace(offer.source, generation="0" * 32)))
        lease = client.announce(other, model)
        assert seed.process.wait(60) == 1
        told = (tmp_path / "seed").read_text()
        assert "peerload: LeaseSuperseded: " in told
        assert "Traceback" not in told
        assert [h.source for h in client.status().holdings if h.model == model] == [other.source]
        client.withdraw(lease)
