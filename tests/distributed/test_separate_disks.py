"""Two nodes with separate disks: another home, another working folder, other copies of the data."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fork_server
import pytest
import torch
from forked_runs import ForkedRun, train
from refusals import check_refusal
from safetensors.torch import load_file
from tiny_models import preference_groups, write_lines
from training_home import ENVIRONMENT, ROOT, Home, command, furnish

from megatron_solopo.parallel import platform
from megatron_solopo.training.reference import PARTIAL, _write
from megatron_solopo.training.resume import check_shared_folder

NODES = ("first", "second")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("home"))


@pytest.fixture
def nodes(home: Home, tmp_path: Path) -> list[Path]:
    """The working folder of each node, with the data; its home is ``home`` in it."""
    for name in NODES:
        (tmp_path / name).mkdir()
        shutil.copy(home.folder / "groups.jsonl", tmp_path / name)
    return [tmp_path / name for name in NODES]


def arguments(home: Home, *flags: Any) -> list[str]:
    """The options of both nodes: data and reference cache by relative names."""
    options = ["--train-data", "groups.jsonl", "--reference-cache", "references", "--train-iters", 2]
    return home.argv("run", "--micro-batch-size", 1, *options, "--distributed-timeout-minutes", 2, *flags)


def of_node(number: int, node: Path, port: int) -> dict[str, str]:
    """What a process of a node has in its environment beside a shell's."""
    return {
        **{"HOME": str(node / "home"), "GLOO_SOCKET_IFNAME": "lo"},
        **{"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        "MASTER_PORT": str(port),
    }


def _process(node: Path, settings: dict[str, str], argv: list[str]) -> None:
    os.chdir(node)
    os.dup2(os.open(node / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    os.environ.pop("SOLOPO_CACHE", None)
    os.environ |= settings
    sys.exit(train(argv))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(nodes: list[Path], argv: list[str], **settings: str) -> tuple[list[int | None], list[str]]:
    """(exit status, standard error) of the one process of each node."""
    port = free_port()
    processes = [
        fork_server.process(_process, node, of_node(number, node, port) | settings, argv)
        for number, node in enumerate(nodes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        process.kill()
    return [process.exitcode for process in processes], [(node / "stderr.txt").read_text() for node in nodes]


def check_refused(nodes: list[Path], argv: list[str], code: str, *named: str) -> None:
    """Both nodes end with one error line of this code, which names rank 1, its machine and each of ``named``."""
    statuses, outputs = run(nodes, argv)
    assert statuses == [2, 2], outputs
    for stderr in outputs:
        assert check_refusal(stderr, code, *named).startswith(f"rank 1 on {socket.gethostname()}: ")


def agents(nodes: list[Path], argv: list[str]) -> list[subprocess.CompletedProcess[str]]:
    """Two torchrun agents, each with one process."""
    port, started = free_port(), []
    for number, node in enumerate(nodes):
        launcher = [sys.executable, "-m", "megatron_solopo.launch", "--nnodes", "2", "--node-rank", str(number)]
        launcher += ["--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
        environment = ENVIRONMENT | {"HOME": str(node / "home"), "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
        environment.pop("SOLOPO_CACHE")
        started.append(
            subprocess.Popen(
                [*launcher, *command(argv)[1:]], cwd=node, env=environment, text=True, stdout=-1, stderr=-1
            )
        )
    ended = [process.communicate(timeout=300) for process in started]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *texts)
        for process, texts in zip(started, ended, strict=True)
    ]


def stores(folder: Path) -> list[str]:
    """The token stores of a cache folder."""
    return sorted(path.parent.name for path in folder.glob("*/manifest.json"))


def stores_of(node: Path) -> list[str]:
    return stores(node / "home" / ".cache" / "megatron_solopo")


def test_two_agents_each_write_a_store(home: Home, nodes: list[Path]) -> None:
    """And train as two processes of one machine do; the second start finds all that it needs."""
    shared = nodes[0].parent / "shared"
    ended = agents(nodes, arguments(home, "--save", shared))
    assert [one.returncode for one in ended] == [0, 0], [one.stderr[-3000:] for one in ended]
    (store,) = stores_of(nodes[0])
    assert stores_of(nodes[1]) == [store]
    assert [path.name for node in nodes for path in node.glob("references/*")] == [
        path.name for path in nodes[0].glob("references/*")
    ]
    written = {node: (node / f"home/.cache/megatron_solopo/{store}/manifest.json").stat().st_mtime_ns for node in nodes}
    statuses, outputs = run(nodes, arguments(home, "--save", shared, "--auto-resume", "--train-iters", 2))
    assert statuses == [0, 0] and "all 2 steps are done" in outputs[0], outputs
    assert written == {
        node: (node / f"home/.cache/megatron_solopo/{store}/manifest.json").stat().st_mtime_ns for node in nodes
    }


def test_two_agents_with_a_run_folder_of_each_are_refused(home: Home, nodes: list[Path]) -> None:
    ended = agents(nodes, arguments(home, "--save", "run"))
    assert [one.returncode for one in ended] == [2, 2], [one.stderr[-3000:] for one in ended]
    for one in ended:  # torchrun's lines are there too
        (line,) = {line for line in one.stderr.splitlines() if line.startswith("error: ")}
        check_refusal(line, "folder-not-shared", f"rank 1 on {socket.gethostname()}: --save run: ")
    assert not (nodes[0] / "run").exists() and not stores_of(nodes[0])


def _probe_and_look(argv: list[str]) -> int:
    """The removal of rank 0's folder takes its time; exit status 1 if another rank sees the folder after the check."""
    rmdir = Path.rmdir
    setattr(Path, "rmdir", lambda path: (time.sleep(0.5), rmdir(path)))
    here = platform.start("cpu", 2)
    check_shared_folder(Path(argv[0]))
    status = int(Path(argv[0]).exists())
    platform.stop(here)
    return status


def test_no_rank_sees_the_folder_that_was_created_to_check_it(tmp_path: Path) -> None:
    run = ForkedRun([str(tmp_path / "new" / "run")], 2, tmp_path / "stderr.txt", _probe_and_look)
    assert run.wait() == [0, 0], run.text()
    assert not (tmp_path / "new").exists()


def test_a_shared_cache_is_filled_once(home: Home, nodes: list[Path]) -> None:
    """The second node then needs no data file."""
    (nodes[1] / "groups.jsonl").unlink()
    cache = nodes[0].parent / "cache"
    argv = arguments(home, "--save", nodes[0].parent / "run", "--train-iters", 1)
    statuses, outputs = run(nodes, argv, SOLOPO_CACHE=str(cache))
    assert statuses == [0, 0], outputs
    assert len(stores(cache)) == 1


@pytest.mark.parametrize(
    ("change", "code", "named"),
    [
        (Path.unlink, "file-missing", "groups.jsonl: "),
        (lambda path: write_lines(path, preference_groups(9)), "ranks-differ", "groups.jsonl: source.bytes is "),
    ],
)
def test_other_data_on_a_node_are_refused(home: Home, nodes: list[Path], change: Any, code: str, named: str) -> None:
    change(nodes[1] / "groups.jsonl")
    check_refused(nodes, arguments(home, "--save", nodes[0].parent / "run"), code, named)
    assert not (nodes[0].parent / "run").exists()


def test_a_token_folder_of_other_data_is_refused(home: Home, nodes: list[Path]) -> None:
    from megatron_solopo.data.tokenized import tokenize_data

    for count, node in zip((10, 9), nodes, strict=True):
        data = write_lines(node / "data.jsonl", preference_groups(count))
        argv = ["--data", data, "--output", node / "tokens", "--tokenizer", home.folder / "hf", "--workers", 1]
        assert tokenize_data.main(list(map(str, argv))) == 0
    argv = arguments(home, "--save", nodes[0].parent / "run", "--train-data", "tokens")
    check_refused(nodes, argv, "ranks-differ", ": tokens is ", "rank 0")


def test_a_checkpoint_that_one_node_cannot_read_is_refused(home: Home, nodes: list[Path]) -> None:
    statuses, outputs = run(nodes, arguments(home, "--save", nodes[0].parent / "run", "--train-iters", 2))
    assert statuses == [0, 0], outputs
    shutil.copytree(nodes[0].parent / "run", nodes[0] / "before")
    argv = arguments(home, "--save", nodes[0].parent / "next", "--load", "before")
    check_refused(nodes, argv, "folder-missing", ": --load before: ")


def test_reference_log_probs_of_both_nodes_are_kept(home: Home, nodes: list[Path]) -> None:
    """Each killed process left what it had computed on its node's disk."""
    argv = arguments(home, "--save", nodes[0].parent / "run", "--train-iters", 1)
    statuses, outputs = run(nodes, argv)
    assert statuses == [0, 0], outputs
    (cache,) = (nodes[0] / "references").iterdir()
    whole = load_file(cache)["log_probs"]
    cache.unlink()
    for number, node in enumerate(nodes):
        done = torch.arange(10) % 5 == number
        _write(node / "references" / f"{cache.stem}.{number}{PARTIAL}", whole, done)
    statuses, outputs = run(nodes, arguments(home, "--save", nodes[0].parent / "again"))
    assert statuses == [0, 0] and "reference log-probs of 10 examples, 4 of them computed before" in outputs[0], outputs
    torch.testing.assert_close(load_file(cache)["log_probs"], whole, rtol=0, atol=1e-4)
    assert [path.name for node in nodes for path in (node / "references").iterdir()] == [cache.name]
