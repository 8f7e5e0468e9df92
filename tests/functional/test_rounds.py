"""Recipes with rounds: a tiny model through two of them, killed and resumed; a server that gets each round's model."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import fork_server
import psutil
import pytest
import yaml
from refusals import check_refusal
from safetensors.torch import load_file
from tiny_models import WORDS, write_lines, write_model
from training_home import ENVIRONMENT, ROOT

from megatron_solopo import pipeline
from megatron_solopo.cli import dispatch, run

ROUNDS = """\
output: target
rounds:
  count: 2
  model: ./hf
  result: round-$round/hf
  stages:
    responses:
      sample-responses:
        {contexts: ./contexts.jsonl, model: $previous, samples: 24, max_new_tokens: 6, device: cpu, seed: $round,
         output: round-$round/responses.jsonl}
    pairs:
      build-pairs:
        {contexts: ./contexts.jsonl, responses: round-$round/responses.jsonl, keep_unfinished: true,
         output: round-$round/groups.jsonl, counts_output: round-$round/counts.json}
    train:
      train:
        {hf_path: $previous, train_data: round-$round/groups.jsonl, preference_loss: dpo, device: cpu, seq_length: 64,
         train_iters: 6, global_batch_size: 2, micro_batch_size: 2, lr: 1e-2, save_interval: 2,
         save: round-$round/run, save_hf: $model}
    report:
      report:
        {counts: [round-$each=round-$each/counts.json], runs: [round-$each=round-$each/run],
         output: round-$round/report.md}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    write_model(folder / "hf", noise=0.02)
    chat = lambda *words: [{"role": "user", "content": " ".join(words)}]  # noqa: E731
    write_lines(
        folder / "contexts.jsonl",
        [
            {
                "id": f"q{n}",
                "question": "which word is the first?",
                "answers": [WORDS[n]],
                "short_messages": chat(*WORDS[n : n + 3]),
                "long_messages": chat(*WORDS[n : n + 24]),
                "short_tokens": 5,
                "long_tokens": 26,
                "source": "test",
            }
            for n in range(16)
        ],
    )
    (folder / "r.yaml").write_text(ROUNDS)
    return folder


class Forks:
    """Runs stages in forks of a process that has imported everything, and kills the training of a round."""

    def __init__(self) -> None:
        self.killed_at = Path("never")
        self.processes: list[BaseProcess] = []

    def call(self, command: list[str], *_: object) -> tuple[int, bool]:
        words = command[command.index("megatron_solopo.cli") + 1 :]
        process = fork_server.process(_stage, words, os.getcwd())
        process.start()
        while process.is_alive():
            if self.killed_at.exists():
                process.kill()
            process.join(0.005)
        assert process.exitcode is not None
        return process.exitcode, False


def _stage(words: list[str], folder: str) -> None:
    os.chdir(folder)
    os.environ["OMP_NUM_THREADS"] = "1"
    os._exit(run(dispatch, words))


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> Forks:
    forks = Forks()
    monkeypatch.setattr(pipeline, "call", forks.call)
    return forks


def states(capfd: pytest.CaptureFixture[str]) -> dict[str, str]:
    text = capfd.readouterr().out
    return dict(re.findall(r"^\[\d/\d\] (\S+?):? (done before|resumes|runs)", text, re.MULTILINE))


def weights(folder: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_a_round_starts_from_the_one_before_and_a_killed_one_resumes(
    home: Path, forks: Forks, capfd: pytest.CaptureFixture[str]
) -> None:
    target, broken = home / "target", home / "broken"
    command = ["run", str(home / "r.yaml")]
    assert run(dispatch, [*command, "--rounds", "1"]) == 0 and not (target / "round-2").exists()
    shutil.copytree(target, broken)
    capfd.readouterr()
    assert run(dispatch, command) == 0
    first, second = ([f"round-{n}.{name}" for name in ("responses", "pairs", "train", "report")] for n in (1, 2))
    assert states(capfd) == dict.fromkeys(first, "done before") | dict.fromkeys(second, "runs")
    one, two = target / "round-1", target / "round-2"
    sampled_from = [json.loads((r / "responses.jsonl.settings.json").read_text())["settings"] for r in (one, two)]
    assert [settings["model"] for settings in sampled_from] == [str(home / "hf"), str(one / "hf")]
    assert [settings["seed"] for settings in sampled_from] == [1, 2]
    assert weights(home / "hf") != weights(one / "hf") != weights(two / "hf")
    counts = [json.loads((folder / "counts.json").read_text()) for folder in (one, two)]
    assert all(0 < count["groups"] == count["paired"] and 300 < count["responses"] <= 16 * 24 for count in counts)
    report = (two / "report.md").read_text()
    for number, count in enumerate(counts, 1):
        assert re.search(rf"\| round-{number} +\| +16 \| +{count['responses']} \|", report)
    losses = [json.loads(line) for line in (two / "run" / "metrics.jsonl").read_text().splitlines()]
    # The reference is the model that the round starts from, and not the first one.
    assert next(line["po_loss"] for line in losses if line.get("step") == 1) == pytest.approx(0.693147, abs=1e-4)

    forks.killed_at = broken / "round-2" / "run" / "iter_0000002" / "manifest.json"
    command += ["--output", str(broken)]
    assert run(dispatch, command) == 2
    check_refusal(capfd.readouterr().err, "stage-failed", "round-2.train was killed by SIGKILL")
    forks.killed_at = Path("never")
    assert run(dispatch, command) == 0
    resumed = dict.fromkeys([*first, *second[:2]], "done before") | {second[2]: "resumes", second[3]: "runs"}
    assert states(capfd) == resumed
    assert weights(broken / "round-2" / "hf") == weights(two / "hf")


SERVER = """\
import http.server, json, sys
log, port, model, *broken = sys.argv[1:]
def note(event):
    with open(log, "a") as file:
        file.write(event + "\\n")
class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def answer(self, status, text=""):
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())
    def do_GET(self):
        self.answer(200, model)
    def do_POST(self):
        global model
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/busy":
            return self.answer(200, '{"success": false}')
        if self.path != "/load":
            return self.answer(404, "no such path")
        model = json.loads(body)["folder"]
        note("loaded " + model)
        self.answer(200)
if broken:
    sys.exit(3)
server = http.server.HTTPServer(("127.0.0.1", int(port)), Handler)
note("started with " + model)
server.serve_forever()
"""

ASK = """\
import argparse, pathlib, sys, time, urllib.request
parser = argparse.ArgumentParser()
for name in ("--url", "--output", "--save-hf", "--wait"):
    parser.add_argument(name, default="")
options = parser.parse_args()
if options.save_hf:
    pathlib.Path(options.save_hf).mkdir(parents=True, exist_ok=True)
text = urllib.request.urlopen(options.url).read().decode() if options.url else "nobody"
pathlib.Path(options.output).write_text(text)
if options.wait:
    time.sleep(600)
"""


class Served:
    """Two rounds of scripts: one that asks the server, and one that writes the round's model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.target, self.log = folder, folder / "target", folder / "events"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        for name, text in (("server.py", SERVER), ("ask.py", ASK)):
            (folder / name).write_text(text)
        (folder / "base").mkdir()
        url = f"http://127.0.0.1:{self.port}"
        ask = {"url": url, "output": "asked-$round"}
        train = {"save_hf": "$model", "output": "trained-$round"}
        self.recipe = {
            "output": "target",
            "serving": {
                "url": f"{url}/v1",
                "command": f"{sys.executable} ./server.py {self.log} {self.port} $model",
            },
            "rounds": {
                "count": "2",
                "model": "./base",
                "result": "models/$round",
                "stages": {
                    "ask": {"served": "$previous", "script": "ask.py", "options": ask},
                    "train": {"script": "ask.py", "options": train},
                },
            },
        }
        self.models = [str(folder / "base"), str(self.target / "models" / "1")]

    def write(self) -> list[str]:
        (self.folder / "r.yaml").write_text(yaml.safe_dump(self.recipe, sort_keys=False))
        return ["run", str(self.folder / "r.yaml")]

    def run(self, *flags: str) -> int:
        return run(dispatch, [*self.write(), *flags])

    def events(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def asked(self) -> list[str]:
        return [(self.target / f"asked-{number}").read_text() for number in (1, 2)]

    def listens(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return Served(tmp_path)


def test_a_server_is_started_with_each_rounds_model_and_ended_for_the_training(
    served: Served, capfd: pytest.CaptureFixture[str]
) -> None:
    assert served.run("--dry-run") == 0 and not served.target.exists() and not served.events()
    assert f"  served by: {sys.executable} {served.folder}/server.py" in capfd.readouterr().out
    served.recipe["rounds"]["stages"]["train"]["options"]["url"] = f"http://127.0.0.1:{served.port}"
    assert served.run() == 2  # the training finds nobody there
    assert served.events() == [f"started with {served.models[0]}"] and not served.listens()
    del served.recipe["rounds"]["stages"]["train"]["options"]["url"]
    capfd.readouterr()
    assert served.run() == 0
    assert served.asked() == served.models
    assert served.events() == [f"started with {model}" for model in served.models]  # not again for what is done
    assert not served.listens() and "server: ready after " in capfd.readouterr().out
    served.recipe["rounds"]["stages"]["note"] = {"script": "ask.py", "options": {"output": "note-$round"}}
    capfd.readouterr()
    assert served.run() == 0 and len(served.events()) == 2
    names = ("ask", "train", "note")
    expected = {f"round-{n}.{name}": "runs" if name == "note" else "done before" for n in (1, 2) for name in names}
    assert states(capfd) == expected


def test_a_running_server_loads_the_next_model(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    served.recipe["serving"]["reload"] = {"/load": {"folder": "$model"}}
    assert served.run() == 0
    assert served.asked() == served.models
    assert served.events() == [f"started with {served.models[0]}", f"loaded {served.models[1]}"]
    assert not served.listens()
    served.recipe["serving"]["reload"] = {"/lod": {"folder": "$model"}}
    assert served.run("--from", "round-1.ask") == 2
    check_refusal(
        capfd.readouterr().err, "server-reload", "r.yaml:", f"127.0.0.1:{served.port}/lod", "404: no such path"
    )
    assert not served.listens()

    words = [sys.executable, str(served.folder / "server.py"), str(served.log), str(served.port), "another"]
    with subprocess.Popen(words) as process:  # a person's server
        while not served.listens():
            time.sleep(0.01)
        served.recipe["serving"]["reload"] = {"/load": {"folder": "$model"}}
        assert served.run("--from", "round-1.ask") == 2
        check_refusal(capfd.readouterr().err, "server-other", "r.yaml:", f"127.0.0.1:{served.port}/health")
        del served.recipe["serving"]["command"]
        assert served.run("--from", "round-1.ask") == 0
        assert served.asked() == served.models and served.listens()
        assert served.events()[-2:] == [f"loaded {model}" for model in served.models]
        process.kill()


def test_a_killed_run_takes_its_server_along(served: Served) -> None:
    served.recipe["rounds"]["stages"]["ask"]["options"]["wait"] = "yes"
    command = [sys.executable, "-m", "megatron_solopo.cli", *served.write()]
    process = subprocess.Popen(command, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)})
    while not (served.target / "asked-1").exists():
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) == 2 and served.listens()
    process.kill()
    process.wait()
    del served.recipe["rounds"]["stages"]["ask"]["options"]["wait"]
    assert served.run() == 0  # at once: it waits for the end of both
    assert served.asked() == served.models
    assert psutil.wait_procs(children, timeout=30)[1] == []


def test_a_server_that_does_not_start_is_one_line(served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    served.recipe["serving"]["command"] += " broken"
    assert served.run() == 2
    check_refusal(capfd.readouterr().err, "server-start", "r.yaml:", "ended with status 3", "target/server.log")
    served.recipe["serving"] |= {"ready": "/nowhere", "timeout": "1", "command": "sh -c 'sleep 60' $model"}
    assert served.run() == 2
    check_refusal(capfd.readouterr().err, "server-start", "did not answer at", "/nowhere in 1 s")
