"""Options: YAML under the command line, defaults, and a dump that loads again."""

import dataclasses
import json
import re
from itertools import product

import pytest
import yaml
from option_lines import argv, last_wins

from megatron_solopo.config import OWNER, Config, flag
from megatron_solopo.config_load import build_parser, load
from megatron_solopo.config_unused import unused
from megatron_solopo.losses.registry import preference_loss
from megatron_solopo.training.run_folder import effective, write_settings

SECTION_NAMES = [f.name for f in dataclasses.fields(Config) if f.name not in ("explicit", "groups")]
OPTIONS = {name: (option.section, option.spec) for name, option in OWNER.items()}


def test_the_command_line_overrides_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model:\n  hf_path: from-file\n  bf16: true\ntraining:\n  lr: 1e-5\n  train_epochs: 2\n"
        "data:\n  shuffle: false\n  train_data: d.jsonl\noutput:\n  save: run\nparallel:\n"
    )
    config, dry_run = load(
        ["--config", str(file), "--hf-path", "from-flag", "--no-bf16", "--seq-length", "1e3", "--dry-run"]
    )
    assert dry_run
    assert (config.model.hf_path, config.model.bf16, config.data.shuffle, config.data.seq_length) == (
        "from-flag",
        False,
        False,
        1000,
    )
    assert config.training.lr == 1e-5  # YAML reads 1e-5 as a text
    assert config.training.train_epochs == 2.0 and config.training.train_iters is None
    assert {"hf_path", "bf16", "lr", "shuffle"} < config.explicit and "seed" not in config.explicit
    assert not load(argv())[1]


def test_large_integers_keep_every_digit():
    assert load(argv("--seed", "9007199254740993"))[0].training.seed == 9007199254740993


@pytest.mark.parametrize(
    "loss,beta,alpha", [("dpo", 0.1, 3.0), ("ipo", 0.1, 3.0), ("simpo", 2.0, 1.0), ("orpo", None, 1.0)]
)
def test_defaults_of_each_loss(loss, beta, alpha):
    method = load(argv("--preference-loss", loss))[0].method
    assert (method.beta, method.alignment_weight) == (beta, alpha)
    assert load(argv("--preference-loss", loss, "--alignment-weight", "0.5"))[0].method.alignment_weight == 0.5
    plain = load(argv("--preference-loss", loss, "--context-mode", "short"))[0].method
    assert (plain.beta, plain.alignment_weight) == (beta, None)


def test_longpo_has_the_papers_defaults():
    method = load(argv("--preference-loss", "longpo", "--context-mode", "long"))[0].method
    assert (method.beta, preference_loss(method).longpo_lambda, method.alignment_weight) == (0.1, 0.01, None)


def test_sft_resolves_no_preference_options():
    method = load(argv("--objective", "sft"))[0].method
    assert method.beta is None and method.alignment_weight is None


RUNS = [
    *(
        ["--preference-loss", loss, "--context-mode", mode]
        for loss, mode in product(("dpo", "ipo", "simpo", "orpo"), ("solo", "short", "long"))
    ),
    ["--preference-loss", "longpo", "--context-mode", "long", "--sft-normalization", "token"],
    ["--label-smoothing", "0.1", "--label-smoothing-form", "robust", "--sft-weight", "1"],
    ["--preference-loss", "ipo", "--alignment-distance", "huber", "--alignment-huber-delta", "0.5"],
    ["--objective", "sft"],
    [
        "--preference-loss",
        "dpo",
        "--alignment-reference",
        "short",
        "--alignment-stop-short-gradient",
        "--alignment-target",
        "both",
    ],
    ["--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", "2"],
    ["--recompute-granularity", "selective", "--recompute-modules", "mlp, core_attn"],
    ["--lr-decay-style", "constant", "--lr", "1e-7", "--adam-eps", "1e-12", "--no-shuffle", "--bf16"],
    [
        "--valid-data",
        "v: #1.jsonl",
        "--eval-interval",
        "5",
        "--save-hf",
        "out",
        "--overwrite",
        "--load",
        "run",
        "--seed",
        "0",
    ],
]


@pytest.mark.parametrize("options", RUNS, ids=" ".join)
def test_the_written_configuration_loads_again_to_the_same_run(options, tmp_path):
    config, _ = load(argv(*options))
    write_settings(tmp_path, config)
    again, _ = load(["--config", str(tmp_path / "config.yaml")])
    assert again.as_dict() == config.as_dict()
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    taken = {name for values in effective(config).values() for name in values}
    assert taken == OPTIONS.keys() - unused(config).keys()
    assert {name for values in written.values() for name in values} == {
        name for name in taken if value_of(config, name) is not None
    }


def value_of(config, name):
    return config.value(name)


ENGINE = ["--bf16", "--transformer-impl", "transformer_engine"]

NEEDED_FOR = {
    "transformer_impl": ["--bf16"],
    "fp8_format": ENGINE,
    "attention_backend": ["--bf16"],
    "fp8_recipe": [*ENGINE, "--fp8-format", "e4m3"],
    "disable_parameter_transpose_cache": [*ENGINE, "--fp8-format", "e4m3"],
    **dict.fromkeys(("use_te_activation_func", "rope_fusion", "moe_permute_fusion"), ENGINE),
    "gradient_accumulation_fusion": ["--bf16"],
    **dict.fromkeys(("use_precision_aware_optimizer", "optimizer_cpu_offload"), ["--bf16"]),
    **dict.fromkeys(
        ("exp_avg_dtype", "exp_avg_sq_dtype", "store_param_remainders", "main_grads_dtype"),
        ["--bf16", "--use-precision-aware-optimizer"],
    ),
    **dict.fromkeys(
        ("optimizer_offload_fraction", "overlap_cpu_optimizer_d2h_h2d"), ["--bf16", "--optimizer-cpu-offload"]
    ),
    "cp_comm_type": [*ENGINE, "--context-parallel-size", "2", "--no-share-prompts"],
    **dict.fromkeys(("lora_alpha", "use_rslora", "lora_modules", "lora_dropout", "lora_export"), ["--lora-rank", "8"]),
    "ckpt_step": ["--load", "run"],
    "override_opt_param_scheduler": ["--auto-resume"],
    "simpo_gamma": ["--preference-loss", "simpo"],
    "orpo_lambda": ["--preference-loss", "orpo"],
    "longpo_lambda": ["--preference-loss", "longpo", "--context-mode", "long"],
    "ld_alpha": ["--preference-loss", "ld_dpo"],
    "label_smoothing_form": ["--label-smoothing", "0.1"],
    "sft_normalization": ["--sft-weight", "1"],
    "tensorboard_log_interval": ["--tensorboard-dir", "events"],
    "tensorboard_queue_size": ["--tensorboard-dir", "events"],
    "wandb_exp_name": ["--wandb-project", "p"],
    "wandb_save_dir": ["--wandb-project", "p"],
    "alignment_huber_delta": ["--alignment-distance", "huber"],
    "sequence_parallel": ["--tensor-model-parallel-size", "2"],
    "num_virtual_stages_per_pipeline_rank": ["--pipeline-model-parallel-size", "2"],
    "decoder_first_pipeline_num_layers": ["--pipeline-model-parallel-size", "2"],
    "decoder_last_pipeline_num_layers": ["--pipeline-model-parallel-size", "2"],
    "overlap_param_gather": ["--overlap-grad-reduce"],
    "ddp_bucket_size": ["--overlap-grad-reduce"],
    "use_pytorch_profiler": ["--profile"],
    "profile_step_start": ["--profile"],
    "profile_step_end": ["--profile"],
    "profile_ranks": ["--profile"],
    "recompute_modules": ["--recompute-granularity", "selective"],
    "stretch_fraction": ["--stretch-positions", "9000"],
    "eval_max_new_tokens": ["--eval-generate", "questions.jsonl"],
    "early_stop": ["--save-best", "loss"],
}


def test_every_option_can_be_set_in_both_places(tmp_path):
    """A value other than the default, by flag and by file, arrives; none is forgotten by the parser."""
    adapters = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapters))
    for name, (section, spec) in OPTIONS.items():
        context = argv(
            "--valid-data", "v", "--save-hf", "out", "--recompute-granularity", "full", "--save-interval", "3"
        )
        context += NEEDED_FOR.get(name, [])
        if name == "train_epochs":
            context = [text for text in context if text not in ("--train-iters", "10")]
        if isinstance(spec.default, bool):
            value, arguments = not spec.default, [("--no-" if spec.default else "--") + name.replace("_", "-")]
        else:
            choices = [c for c in spec.metadata["choices"] or () if c != spec.default]
            numbers = {"seq_length": 9000, "max_tokens_per_rank": 20000, "lr": 0.25, "min_lr": 1e-7, "seed": 7}
            numbers |= {"profile_step_end": 20, "profile_ranks": "0,8", "recompute_modules": "mlp"}
            numbers |= {"label_smoothing": 0.25, "ld_alpha": 0.25, "rope_scaling": "yarn:4:32768", "mlp_tiles": "auto"}
            numbers |= {"lora_modules": "q_proj,up_proj", "lora_path": str(tmp_path)}
            numbers |= {"chat_template_kwargs": '{"a": 1}', "chat_template_date": "2026-01-31"}
            if name == "fp8_recipe":
                choices.remove("delayed")  # not with a reference
            value = (
                choices[0]
                if choices
                else numbers.get(name, 0.5 if "float" in str(spec.type) else 3 if "int" in str(spec.type) else "text")
            )
            arguments = [flag(name), str(value)]
        if name == "objective":
            assert load(argv(*arguments))[0].method.objective == value
            continue
        assert value_of(load(last_wins(context + arguments))[0], name) == value, name
        context = [text for i, text in enumerate(context) if flag(name) not in (text, context[i - 1])]
        (tmp_path / "one.yaml").write_text(yaml.safe_dump({section: {name: value}}))
        assert value_of(load([*last_wins(context), "--config", str(tmp_path / "one.yaml")])[0], name) == value, name


def test_help_is_grouped_and_explains_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        load(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    groups = dict(
        zip(
            SECTION_NAMES,
            re.split("|".join(rf"^{name}:$" for name in SECTION_NAMES), text, flags=re.M)[1:],
            strict=True,
        )
    )
    for name, (section, spec) in OPTIONS.items():
        assert re.search(rf"^  {flag(name)}\b", groups[section], re.M), name
        # argparse breaks lines at spaces and hyphens
        assert "".join(spec.metadata["help"].split()) in "".join(groups[section].split()), name
    assert len(build_parser()._action_groups) == len(SECTION_NAMES) + 2
