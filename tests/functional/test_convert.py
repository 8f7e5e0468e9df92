"""`solopo convert-checkpoint`: there and back, from a run's checkpoint, into a run, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from refusals import check_refusal
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS, SHAPE, write_model
from training_home import ENVIRONMENT, Home, as_a_user, furnish
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2Config

from megatron_solopo.cli import run
from megatron_solopo.conversion.hf_folder import TensorReader
from megatron_solopo.conversion.hf_weights import HfWeights
from megatron_solopo.conversion.sidecar_files import STACKED
from megatron_solopo.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return furnish(tmp_path_factory.mktemp("home"))


def as_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def convert(*arguments: object) -> tuple[int, str, str]:
    """(status, stdout, stderr), in this process: a separate one costs 10 seconds."""
    from megatron_solopo.training.convert import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(main, list(map(str, arguments)))
    return status, out.getvalue(), err.getvalue()


def refuse(err: str, code: str, *named: str) -> None:
    """One error line with these parts and this code; "" is a code of data/, where not every error has one yet."""
    if code and "]\n" in err:
        check_refusal(err, code, *named)
    else:
        assert err.count("error: ") == 1 and all(part in err for part in named), err


def succeed(*arguments: object) -> str:
    status, out, err = convert(*arguments)
    assert status == 0, err[-3000:]
    return out


def same(one: Path, other: Path) -> bool:
    ours, theirs = TensorReader(one), TensorReader(other)
    return ours.names() == theirs.names() and all(torch.equal(ours.get(n), theirs.get(n)) for n in ours.names())


@pytest.fixture(scope="module")
def megatron(home: Home) -> Path:
    """A Megatron folder of the home's model."""
    folder = home.folder / "megatron"
    done = as_command("hf-to-megatron", "--hf-path", home.folder / "hf", "--save", folder)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    wrote = f"wrote {folder} (float32); train from it with --hf-path {folder}\n"
    assert done.stdout == f"{wrote}Megatron-LM and Megatron-Bridge start from it too\n"
    return folder


def test_a_round_trip_writes_the_same_folder(home: Home, megatron: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    assert succeed("megatron-to-hf", "--load", megatron, "--save-hf", back, "--max-shard-size", "20kB").startswith(
        "wrote"
    )
    assert same(home.folder / "hf", back) and len(list(back.glob("model-*.safetensors"))) > 2
    files = {path.name for path in (home.folder / "hf").iterdir()} - {"model.safetensors"}
    assert files <= {path.name for path in back.iterdir()}
    model = AutoModelForCausalLM.from_pretrained(back)
    assert model.generate(torch.tensor([[1, 5, 2]]), max_new_tokens=4, do_sample=False).shape[1] > 3


@pytest.mark.parametrize("padding", [8, 512])
def test_the_vocabulary_may_have_another_padding(padding: int, home: Home, megatron: Path, tmp_path: Path) -> None:
    """Fewer and more rows than the stored ones, which are a multiple of 128."""
    padded = ["--load", megatron, "--make-vocab-size-divisible-by", padding]
    succeed("megatron-to-hf", *padded, "--save-hf", tmp_path / "back")
    assert same(home.folder / "hf", tmp_path / "back")
    succeed("verify", *padded, "--hf-path", home.folder / "hf")


def test_a_run_starts_from_a_megatron_folder(home: Home, megatron: Path) -> None:
    """The same run as from the Hugging Face folder; its checkpoint exports to the same files as the run did."""
    flags = ["--train-iters", 3, "--save-interval", 2]
    runs = {}
    for name, start in (("from-hf", home.folder / "hf"), ("from-megatron", megatron)):
        argv = home.argv(name, *flags, "--save-hf", home.folder / f"{name}-hf", hf=str(start))
        done = as_a_user(home, argv)
        assert done.returncode == 0, done.stderr[-3000:]
        runs[name] = [line["loss"] for line in home.metrics(name)]
    assert runs["from-hf"] == runs["from-megatron"]
    assert same(home.folder / "from-hf-hf", home.folder / "from-megatron-hf")
    succeed("megatron-to-hf", "--load", home.folder / "from-hf", "--save-hf", home.folder / "exported")
    assert same(home.folder / "from-hf-hf", home.folder / "exported")
    earlier = ["--ckpt-step", 2, "--dtype", "bfloat16", "--save-hf", home.folder / "earlier"]
    succeed("megatron-to-hf", "--load", home.folder / "from-megatron", *earlier)
    assert TensorReader(home.folder / "earlier").dtype() == torch.bfloat16


def test_verify_agrees_and_names_the_layer_that_does_not(home: Home, megatron: Path, tmp_path: Path) -> None:
    assert "agrees in float32" in succeed("verify", "--hf-path", home.folder / "hf")
    (tmp_path / "prompts.txt").write_text("w1 w2 w3\n\nw4 w5 w6 w7\n")
    output = succeed(
        "verify", "--hf-path", home.folder / "hf", "--load", megatron, "--prompts", tmp_path / "prompts.txt"
    )
    assert output.startswith("prompt 1: 3 tokens") and "prompt 2: 4 tokens" in output
    wrong = write_model(tmp_path / "wrong", Qwen2Config(**SHAPE, tie_word_embeddings=True), seed=3)
    succeed("hf-to-megatron", "--hf-path", wrong, "--save", tmp_path / "m")
    tensors = load_file(wrong / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.5
    save_file(tensors, wrong / "model.safetensors", metadata={"format": "pt"})
    status, output, _ = convert("verify", "--hf-path", wrong, "--load", tmp_path / "m")
    assert "no layer differs" not in output
    assert status == 1 and "worst layer: 1 of 2" in output and "DIFFERS in float32" in output


def test_where_no_layer_differs_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_solopo.conversion.compare import Comparison, report

    assert report(Comparison([(5, 0.0, 1)], [0.0, 0.0]), "float32", 1e-3) == 0
    assert "no layer differs (2 compared)\n" in (output := capsys.readouterr().out) and "worst" not in output
    assert report(Comparison([(5, 1e-6, 1)], [0.0, 1e-7]), "float32", 1e-3) == 0
    assert "worst layer: 1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["hf-to-megatron", "megatron-to-hf", "verify"])
def test_a_command_offers_only_the_options_that_it_reads(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_solopo.training.convert import STAGES, main

    with pytest.raises(SystemExit):
        main([name, "--help"])
    offered = capsys.readouterr().out
    assert all((f"--{option.replace('_', '-')} " in offered) == (name != "verify") for option in STAGES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"], ids=["with a bound", "without one"])
def test_nan_does_not_agree(home: Home, tmp_path: Path, dtype: str) -> None:
    """At any place: behind the first prompt, and the first layer."""
    folder = shutil.copytree(home.folder / "hf", tmp_path / "hf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][9] = float("nan")  # w5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "prompts.txt").write_text("w1 w2 w3\nw4 w5 w6\nw1 w2\n")
    asked = ["--hf-path", folder, "--prompts", tmp_path / "prompts.txt", "--dtype", dtype]
    status, output, _ = convert("verify", *asked)
    assert status == 1 and "worst layer: 0 of 2" in output and f"DIFFERS in {dtype}: nan nats" in output


def test_the_plan_of_a_conversion(tmp_path: Path) -> None:
    """By config.json alone: the bytes of the tensors, and the largest parameter, of which each process has a part."""
    shape = SHAPE | dict(vocab_size=64_000, hidden_size=1024, intermediate_size=2048)
    Qwen2Config(**shape, tie_word_embeddings=False, dtype="bfloat16").save_pretrained(tmp_path / "hf")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen2Config(**shape, tie_word_embeddings=False))
    size, largest = 2 * sum(p.numel() for p in model.parameters()), 2 * 64_000 * 1024
    layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
    output = succeed("hf-to-megatron", "--hf-path", tmp_path / "hf", "--save", tmp_path / "new", "--dry-run", *layout)
    assert f"{len(model.state_dict())} tensors, {size / 1e9:.2f} GB in bfloat16" in output
    assert "4 processes" in output and f"at most {largest / 2 / 1e9:.2f} GB (output_layer.weight)" in output
    assert f"joins the parts of a parameter: at most {largest / 1e9:.2f} GB (output_layer.weight)" in output
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


WRONG = [
    ("hf-to-megatron --hf-path {nowhere} --save {new}", "folder-missing", "--hf-path {nowhere}: "),
    ("hf-to-megatron --hf-path {hf} --save {megatron}", "folder-exists", "--save {megatron}: ", "--overwrite"),
    ("hf-to-megatron --hf-path {hf} --save {hf} --overwrite", "folder-overlap", "--save {hf}: ", "--hf-path {hf}"),
    (
        "megatron-to-hf --load {megatron} --save-hf . --overwrite",
        "folder-overlap",
        "--save-hf .: ",
        "the folder that the command runs in",
    ),
    ("hf-to-megatron --hf-path {hf} --save ''", "option-value", "--save: "),
    ("megatron-to-hf --load {megatron} --save-hf '' --overwrite", "option-value", "--save-hf: "),
    ("hf-to-megatron --hf-path {hf} --save {folder} --overwrite", "folder-not-a-model", "--save {folder}: "),
    ("hf-to-megatron --hf-path {megatron} --save {new}", "folder-is-megatron", "--hf-path {megatron}: ", "Megatron"),
    ("megatron-to-hf --load {nowhere} --save-hf {new}", "folder-missing", "--load {nowhere}: "),
    ("megatron-to-hf --load {folder} --save-hf {new}", "option-missing", "--hf-path", "{folder}", "config.yaml"),
    (
        "megatron-to-hf --load {megatron}/release --save-hf {new}",
        "checkpoint-missing",
        "--load {megatron}/release",
        "{megatron}, and --ckpt-step 0",
    ),
    ("megatron-to-hf --load {hf} --save-hf {new}", "checkpoint-missing", "--load {hf}: ", "--hf-path"),
    (
        "megatron-to-hf --load {megatron} --ckpt-step 9 --save-hf {new}",
        "checkpoint-incomplete",
        "--ckpt-step 9: ",
        "{megatron}/iter_0000009",
    ),
    (
        "megatron-to-hf --load {megatron} --save-hf {new} --max-shard-size '5 files'",
        "option-value",
        "--max-shard-size 5 files: ",
    ),
    (
        "hf-to-megatron --hf-path {hf} --save {new} --tensor-model-parallel-size 2",
        "layout-processes",
        "--tensor-model-parallel-size 2 = 2 processes",
        "1 were started",
    ),
    (
        "megatron-to-hf --load {megatron} --save-hf {new} --make-vocab-size-divisible-by 0",
        "option-value",
        "--make-vocab-size-divisible-by",
        "at least 1",
    ),
    (
        "hf-to-megatron --hf-path {hf} --save {new} --dry-run --tensor-model-parallel-size 3",
        "layout-not-divisible",
        "--tensor-model-parallel-size 3",
    ),
    ("verify --hf-path {megatron}", "folder-is-megatron", "{megatron}", "Megatron's weights"),
    ("verify --hf-path {hf} --ckpt-step 3", "option-unused", "--ckpt-step"),
    ("verify --hf-path {hf} --bound nan", "option-value", "--bound nan: "),
    ("verify --hf-path {config} --load {megatron}", "weights-missing", "{config}: ", "a.gguf", "GGUF of llama.cpp"),
    ("verify --hf-path {hf} --pipeline-model-parallel-size 1", "option-unknown", "--pipeline-model-parallel-size: "),
    ("verify --hf-path {hf} --prompts {nowhere}", "file-missing", "--prompts {nowhere}: "),
    ("verify --hf-path {hf} --prompts {latin}", "", "--prompts {latin}: ", "not UTF-8 (byte 4"),
]
"""(arguments, code, parts of the message)"""


def test_an_extended_model_stays_extended(home: Home) -> None:
    """A run's --rope-scaling is written by the export of its checkpoints too, and verify compares with it."""
    flags = ["--train-iters", 1, "--rope-scaling", "yarn:4:256", "--save-hf", home.folder / "extended-hf"]
    assert as_a_user(home, home.argv("extended", *flags)).returncode == 0
    back = home.folder / "extended-back"
    succeed("megatron-to-hf", "--load", home.folder / "extended", "--save-hf", back)
    ours, theirs = ((folder / "config.json").read_text() for folder in (back, home.folder / "extended-hf"))
    assert ours == theirs and '"yarn"' in ours
    assert "agrees" in succeed("verify", "--hf-path", back)
    assert "agrees" in succeed("verify", "--hf-path", back, "--load", home.folder / "extended")


@pytest.mark.parametrize("row", WRONG, ids=lambda row: row[0])
def test_wrong_inputs_are_one_line(home: Home, megatron: Path, tmp_path: Path, row: tuple[str, ...]) -> None:
    arguments, code, *named = row
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    places = {"hf": home.folder / "hf", "megatron": megatron, "folder": tmp_path / "folder"}
    places |= {"nowhere": tmp_path / "nowhere", "new": tmp_path / "new", "latin": tmp_path / "latin"}
    places["config"] = tmp_path / "config"
    places["config"].mkdir()
    shutil.copy(home.folder / "hf/config.json", places["config"])
    (places["config"] / "a.gguf").touch()
    status, _, err = convert(*shlex.split(arguments.format(**places)))
    assert status == 2
    refuse(err, code, *(text.format(**places) for text in named))
    assert not (tmp_path / "new").exists() and (tmp_path / "folder" / "notes.txt").read_text() == "mine"


def test_a_folder_that_contains_the_source_is_not_replaced(home: Home, tmp_path: Path) -> None:
    """A Megatron folder inside the model from which it was converted is allowed; the way back must not replace both."""
    out = shutil.copytree(home.folder / "hf", tmp_path / "out")
    succeed("hf-to-megatron", "--hf-path", out, "--save", out / "megatron")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    status, _, err = convert("megatron-to-hf", "--load", out / "megatron", "--save-hf", out, "--overwrite")
    assert status == 2 and err.count("\n") == 1, err
    check_refusal(err, "folder-overlap", f"--save-hf {out}: ", f"--load {out}/megatron")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    succeed("megatron-to-hf", "--load", out / "megatron", "--save-hf", out / "megatron" / "hf")
    assert same(out, out / "megatron" / "hf")


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_a_link_to_a_folder_stays_a_link(direction: str, home: Home, megatron: Path, tmp_path: Path) -> None:
    """With --overwrite again and again; the work is done on the disk that the link leads to."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    ways = {
        "hf-to-megatron": ["--hf-path", home.folder / "hf", "--save"],
        "megatron-to-hf": ["--load", megatron, "--save-hf"],
    }
    for _ in range(3):
        succeed(direction, *ways[direction], tmp_path / "link", "--overwrite")
        assert (tmp_path / "link").is_symlink() and (tmp_path / "link" / "config.json").is_file()
        assert [path.name for path in (tmp_path / "disk").iterdir()] == ["model"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        (b"", "option-missing", ["--hf-path", "config.yaml"]),
        (b"model:\n", "option-missing", ["--hf-path", "config.yaml"]),
        (b"- a\n", "yaml-structure", ["/config.yaml: "]),
        (b"model: [1]\n", "yaml-structure", ["/config.yaml:1: ", "section 'model'"]),
        (b"model:\n  hf_path: [1]\n", "option-value", ["/config.yaml:2: model.hf_path: ", "str", "[1]"]),
        (b"model: : :\n\t- x", "not-yaml", ["/config.yaml:1: "]),
        (b"model:\n  hf_path: \xff\n", "not-yaml", ["/config.yaml: "]),
    ],
)
def test_a_broken_config_of_a_run_is_one_line(tmp_path: Path, text: bytes, code: str, named: list[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_bytes(text)
    status, _, err = convert("megatron-to-hf", "--load", tmp_path / "run", "--save-hf", tmp_path / "new")
    assert status == 2 and err.count("\n") == 1
    refuse(err, code, *named)


def test_the_weights_of_another_model_are_refused(home: Home, megatron: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", Qwen2Config(**SHAPE | dict(hidden_size=64)))
    status, _, err = convert("megatron-to-hf", "--load", megatron, "--hf-path", other, "--save-hf", tmp_path / "new")
    assert status == 2
    check_refusal(err, "checkpoint-other-model", f"{megatron}/release", "--hf-path")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (OSError(5, "Input/output error", "model-7.safetensors"), "file-system"),
        (UserError("file-damaged", "model-7.safetensors: not complete"), "file-damaged"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weights_that_cannot_be_read_while_writing_are_not_a_failed_write(
    failure: Exception, code: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(weights: HfWeights, parameter: torch.nn.Parameter) -> None:
        raise failure

    monkeypatch.setattr(HfWeights, "fill", fail)
    status, _, err = convert("hf-to-megatron", "--hf-path", home.folder / "hf", "--save", tmp_path / "new")
    assert status == 2 and not list(tmp_path.iterdir())
    assert check_refusal(err, code).startswith("model-7.safetensors: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "wrong", "code", "named"),
    [
        ("model.norm.weight", 16, "tensor-shape", ["(16,)", "(32,)"]),
        ("model.layers.0.self_attn.q_proj.bias", 32, "tensor-left-over", ["llama"]),
        ("model.norm.weight", torch.int8, "dtype-unsupported", ["I8", "F64, F32, BF16, F16"]),
    ],
)
def test_tensors_of_another_model_are_refused_before_writing(
    name: str, wrong: int | torch.dtype, code: str, named: list[str], home: Home, tmp_path: Path
) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(home.folder / "hf", folder)
    tensor = torch.zeros(wrong) if isinstance(wrong, int) else torch.zeros(32, dtype=wrong)
    save_file(load_file(folder / "model.safetensors") | {name: tensor}, folder / "model.safetensors")
    where = ("--hf-path", folder, "--save", tmp_path / "new", "--dtype", "bfloat16")
    status, _, err = convert("hf-to-megatron", *where)
    assert status == 2 and err.count("\n") == 1
    check_refusal(err, code, f"'{name}'", *named)
    assert not (tmp_path / "new").exists()


def test_an_untied_output_matrix_is_kept(home: Home, tmp_path: Path) -> None:
    """config.json may declare it as tied, and the folder hold one that was trained apart, which transformers uses."""
    folder = write_model(tmp_path / "hf", Qwen2Config(**SHAPE, tie_word_embeddings=True))
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding.clone()}, folder / "model.safetensors", {"format": "pt"})
    succeed("hf-to-megatron", "--hf-path", folder, "--save", tmp_path / "tied")
    save_file(tensors | {"lm_head.weight": embedding * 2}, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder).lm_head.weight, embedding * 2)
    status, _, err = convert("hf-to-megatron", "--hf-path", folder, "--save", tmp_path / "new")
    assert status == 2 and err.count("\n") == 1 and not (tmp_path / "new").exists()
    check_refusal(err, "tensor-not-tied", "lm_head.weight", '"tie_word_embeddings": false')


def test_a_megatron_folder_remembers_experts_in_one_tensor(tmp_path: Path) -> None:
    """Its exports are like the folder that it was converted from, also when that is gone."""
    source, stacked = write_model(tmp_path / "hf", MixtralConfig(**SHAPE, **EXPERTS)), tmp_path / "stacked"
    shutil.copytree(source, stacked)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(stacked, save_original_format=False)
    succeed("hf-to-megatron", "--hf-path", stacked, "--save", tmp_path / "megatron")
    before = load_file(stacked / "model.safetensors")
    shutil.rmtree(stacked)
    succeed("megatron-to-hf", "--load", tmp_path / "megatron", "--save-hf", tmp_path / "back")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in after and before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    folders = (tmp_path / "megatron", tmp_path / "back")
    assert [STACKED in json.loads((folder / "config.json").read_text()) for folder in folders] == [True, False]
