"""Wrong options and files, each refused in one line that names it and what to change."""

import pytest
from option_lines import argv
from refusals import refused

from megatron_solopo.config import OWNER, flag
from megatron_solopo.config_load import load
from megatron_solopo.megatron_options import REFUSED

TE = "--transformer-impl transformer_engine --bf16"

WRONG_OPTIONS = [
    ("--preference-los dpo", "option-unknown", "--preference-los", "--preference-loss?"),
    ("--sequence-length=8", "option-unknown", "--sequence-length", "--seq-length?"),
    ("--lr-warmup 0.1", "option-unknown", "--lr-warmup", "--lr-warmup-fraction?"),
    ("--seq_length 64", "option-unknown", "--seq_length", "--seq-length?"),
    ("--zzzzzz", "option-unknown", "--zzzzzz"),
    ("-lr 1", "argument-unexpected", "'-lr'"),
    ("dpo", "argument-unexpected", "'dpo'"),
    ("--lr", "option-value", "--lr", "one argument"),
    ("--bf16=true", "option-value", "--bf16", "'true'"),
    ("--lr fast", "option-value", "--lr", "float", "'fast'"),
    ("--seq-length long", "option-value", "--seq-length", "int", "'long'"),
    ("--seq-length 2048.5", "option-value", "--seq-length", "whole number", "'2048.5'"),
    ("--lr nan", "option-value", "--lr", "finite", "'nan'"),
    ("--clip-grad inf", "option-value", "--clip-grad", "finite", "'inf'"),
    ("--seed inf", "option-value", "--seed", "int", "'inf'"),
    ("--weight-decay -0.1", "option-value", "--weight-decay", "at least 0", "-0.1"),
    ("--global-batch-size 0", "option-value", "--global-batch-size", "at least 1", "found 0"),
    ("--lr 1 --lr 2", "option-twice", "--lr"),
    ("--lr=1 --lr=1", "option-twice", "--lr"),
    ("--config a.yaml --config b.yaml", "option-twice", "--config"),
    ("--bf16 --no-bf16", "option-twice", "--no-bf16"),
    ("--preference-loss simp", "option-value", "--preference-loss", "'simp'", "simpo?"),
    ("--context-mode both", "option-value", "--context-mode", "'both'", "solo, short, long"),
    ("--device CUDA", "option-value", "--device", "'CUDA'", "auto, cuda, cpu"),
    ("--train-epochs 1", "option-conflict", "--train-iters", "--train-epochs"),
    ("--stretch-positions 1", "option-value", "--stretch-positions", "at least 2", "found 1"),
    *(
        (f"--stretch-positions 99 --stretch-fraction {share}", "option-value", "--stretch-fraction", words)
        for share, words in (("1.5", "from 0 to 1"), ("-0.5", "at least 0"))
    ),
    ("--transformer-impl transformer_engine", "option-conflict", "--transformer-impl transformer_engine", "--bf16"),
    (f"{TE} --device cpu", "option-conflict", "--transformer-impl transformer_engine", "--device cpu"),
    ("--rope-scaling yarn:4", "option-value", "--rope-scaling yarn:4", "yarn:4:32768"),
    ("--rope-scaling yarn:four:32768", "option-value", "--rope-scaling yarn:four:32768", "TYPE:FACTOR:ORIGINAL"),
    ("--rope-scaling dynamic:4:32768", "option-value", "--rope-scaling dynamic:4:32768", "'dynamic'", "yarn, linear"),
    ("--rope-scaling llama3:8:8192", "option-value", "--rope-scaling llama3:8:8192", "config.json", "yarn or linear"),
    ("--rope-scaling linear:1:4096", "option-value", "--rope-scaling linear:1:4096", "FACTOR"),
    ("--rope-scaling yarn:1.3:4096", "option-value", "--rope-scaling yarn:1.3:4096", "ORIGINAL", "whole number"),
    *((f"--mlp-tiles={value}", "option-value", f"--mlp-tiles {value}", "auto") for value in ("0", "-2", "all")),
    (f"{TE} --fp8-format hybrid --mlp-tiles 4", "option-conflict", "--mlp-tiles", "--fp8-format"),
    (
        f"{TE} --no-gradient-accumulation-fusion --mlp-tiles 4",
        "option-conflict",
        "--mlp-tiles",
        "--no-gradient-accumulation-fusion",
    ),
    (
        f"{TE} --fp8-format hybrid --fp8-recipe delayed",
        "option-conflict",
        "--fp8-recipe delayed",
        "dpo",
        "tensorwise",
        "orpo or simpo",
    ),
    (
        "--bf16 --deterministic-mode --attention-backend fused",
        "option-conflict",
        "--deterministic-mode",
        "--attention-backend fused",
        "use flash or auto",
    ),
    (
        "--bf16 --context-parallel-size 2 --attention-backend fused",
        "option-conflict",
        "--attention-backend fused",
        "all_gather",
        "use flash or auto",
    ),
    (
        "--context-parallel-size 2 --cp-comm-type p2p",
        "option-conflict",
        "--cp-comm-type p2p",
        "--transformer-impl transformer_engine",
        "all_gather",
    ),
    (
        f"{TE} --context-parallel-size 2 --cp-comm-type a2a",
        "option-conflict",
        "--cp-comm-type a2a",
        "--no-share-prompts",
        "all_gather",
    ),
    ("--moe-token-dispatcher-type flex", "option-conflict", "--moe-token-dispatcher-type flex", "--bf16", "alltoall"),
    (
        "--moe-token-dispatcher-type flex --bf16 --device cpu",
        "option-conflict",
        "--moe-token-dispatcher-type flex",
        "CUDA device",
    ),
    ("--use-precision-aware-optimizer", "option-conflict", "--use-precision-aware-optimizer", "--bf16"),
    ("--optimizer-cpu-offload", "option-conflict", "--optimizer-cpu-offload", "--bf16"),
    (
        "--bf16 --main-grads-dtype bf16",
        "option-conflict",
        "--main-grads-dtype bf16",
        "--use-precision-aware-optimizer",
        "--optimizer-cpu-offload",
    ),
    (
        "--bf16 --use-precision-aware-optimizer --exp-avg-sq-dtype bf16 --adam-beta2 0.999",
        "option-conflict",
        "--exp-avg-sq-dtype bf16",
        "--adam-beta2 0.999",
    ),
    *(
        (
            f"--bf16 --optimizer-cpu-offload --optimizer-offload-fraction {fraction}",
            "option-value",
            "--optimizer-offload-fraction",
            "at most 1",
        )
        for fraction in ("0", "1.5")
    ),
    ("--preference-loss ipo --beta 0", "option-value", "--beta 0", "--preference-loss ipo"),
    ("--beta 0", "option-value", "--beta 0", "--preference-loss dpo"),
    (
        "--preference-loss ld_dpo --ld-alpha 1.5",
        "option-value",
        "--preference-loss ld_dpo",
        "--ld-alpha 1.5",
        "at most 1",
    ),
    ("--pair-reduction plackett_luce --preference-loss ipo", "option-conflict", "--pair-reduction", "dpo_norm"),
    ("--pair-reduction plackett_luce --label-smoothing 0.1", "option-conflict", "--label-smoothing", "two labels"),
    ("--preference-loss simpo --beta 0", "option-value", "--beta 0", "--preference-loss simpo"),
    (
        "--preference-loss longpo",
        "option-conflict",
        "--preference-loss longpo",
        "--context-mode solo",
        "--context-mode long",
    ),
    (
        "--preference-loss longpo --context-mode short",
        "option-conflict",
        "--preference-loss longpo",
        "--context-mode short",
    ),
    ("--label-smoothing 0.5", "option-value", "--label-smoothing 0.5", "below 0.5"),
    ("--label-smoothing -0.1", "option-value", "--label-smoothing", "at least 0", "-0.1"),
    (
        "--label-smoothing 0.1 --label-smoothing-form robus",
        "option-value",
        "--label-smoothing-form",
        "'robus'",
        "conservative, robust",
        "robust?",
    ),
    ("--alignment-distance huber --alignment-huber-delta 0", "option-value", "--alignment-huber-delta", "above 0"),
    ("--alignment-distance L1", "option-value", "--alignment-distance", "'L1'", "l1, l2, huber"),
    ("--lr 1e-6 --min-lr 1e-5", "option-conflict", "--min-lr 1e-05", "--lr 1e-06"),
    ("--lr 0", "option-value", "--lr", "above 0"),
    ("--lr-warmup-fraction 1", "option-value", "--lr-warmup-fraction 1.0", "below 1"),
    ("--adam-eps 0", "option-value", "--adam-eps", "above 0"),
    ("--seed 18446744073709551616", "option-value", "--seed 18446744073709551616", "below 2^63"),
    ("--adam-beta2 1", "option-value", "--adam-beta2 1.0", "below 1"),
    (
        "--context-parallel-size 2 --device cuda",
        "option-conflict",
        "--context-parallel-size 2",
        "--device cuda",
        "--bf16",
    ),
    (
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 0",
        "option-value",
        "--num-virtual-stages-per-pipeline-rank",
        "at least 1",
    ),
    (
        "--seq-length 4096 --max-tokens-per-rank 2048",
        "option-conflict",
        "--max-tokens-per-rank 2048",
        "--seq-length 4096",
    ),
    ("--max-tokens-per-rank most", "option-value", "--max-tokens-per-rank", "must be int or auto", "'most'"),
    ("--max-tokens-per-rank 0", "option-value", "--max-tokens-per-rank", "at least 1"),
    ("--auto-resume --load run", "option-conflict", "--auto-resume", "--save", "--load"),
    ("--exit-duration-in-mins 0", "option-value", "--exit-duration-in-mins", "above 0"),
    ("--save-interval 4 --save-retain-interval 6", "option-conflict", "--save-retain-interval 6", "--save-interval 4"),
    ("--config absent.yaml", "file-missing", "--config absent.yaml"),
    ("--lora-rank 8 --lora-modules q_proj,fc1", "option-value", "--lora-modules q_proj,fc1", "'fc1'", "q_proj, k_proj"),
    ("--lora-rank 8 --lora-alpha 0", "option-value", "--lora-alpha 0"),
    ("--lora-rank 8 --lora-dropout 1", "option-value", "--lora-dropout 1.0", "below 1"),
    (f"{TE} --lora-rank 8", "option-conflict", "--lora-rank", "use portable"),
    ("--lora-rank 8 --preference-loss dpo --reference resident", "option-conflict", "--lora-rank", "use cached"),
    ("--lora-rank 8 --add-special-tokens <a>", "option-conflict", "--lora-rank", "--add-special-tokens"),
    ("--lora-path absent", "adapter-missing", "--lora-path absent", "adapter_config.json"),
]
"""(what is added to a right command line, code, start of the message, what else it names)"""

SELECTIVE = "--recompute-granularity selective --recompute-modules"

UNUSED_OPTIONS = [
    ("--lora-alpha 8", "--lora-alpha", "--lora-rank"),
    ("--use-rslora", "--use-rslora", "--lora-rank"),
    ("--lora-dropout 0.1", "--lora-dropout", "--lora-rank"),
    ("--save-hf out --lora-export adapter", "--lora-export", "--lora-rank"),
    ("--lora-rank 8 --lora-export adapter", "--lora-export", "--save-hf"),
    ("--attention-backend flash", "--attention-backend", "--bf16"),
    ("--bf16 --device cpu --attention-backend flash", "--attention-backend", "CUDA"),
    ("--fp8-format e4m3", "--fp8-format", "--transformer-impl transformer_engine"),
    (f"{TE} --fp8-recipe mxfp8", "--fp8-recipe", "--fp8-format"),
    (f"{TE} --disable-parameter-transpose-cache", "--disable-parameter-transpose-cache", "--fp8-format"),
    ("--bf16 --use-te-activation-func", "--use-te-activation-func", "--transformer-impl transformer_engine"),
    ("--bf16 --no-rope-fusion", "--rope-fusion", "--transformer-impl transformer_engine"),
    ("--bf16 --moe-permute-fusion", "--moe-permute-fusion", "--transformer-impl transformer_engine"),
    ("--no-gradient-accumulation-fusion", "--gradient-accumulation-fusion", "--bf16"),
    ("--bf16 --device cpu --no-gradient-accumulation-fusion", "--gradient-accumulation-fusion", "CUDA device"),
    ("--simpo-gamma 1", "--simpo-gamma", "--preference-loss simpo"),
    ("--stretch-fraction 0.5", "--stretch-fraction", "--stretch-positions"),
    ("--context-mode short --stretch-positions 99", "--stretch-positions", "--context-mode solo or long"),
    ("--preference-loss orpo --beta 1", "--beta", "--orpo-lambda"),
    ("--preference-loss simpo --orpo-lambda 1", "--orpo-lambda", "--preference-loss orpo"),
    (
        "--preference-loss longpo --context-mode long --alignment-target both",
        "--alignment-target",
        "--context-mode solo",
    ),
    (
        "--preference-loss longpo --context-mode long --alignment-reference short",
        "--alignment-reference",
        "--context-mode solo",
        "--preference-loss dpo, dpo_norm, ipo, ld_dpo or wpo",
    ),
    (
        "--preference-loss longpo --context-mode long --sft-weight 1",
        "--sft-weight",
        "--preference-loss dpo, dpo_norm, ipo, simpo or wpo",
        "longpo and orpo",
    ),
    ("--longpo-lambda 0.1", "--longpo-lambda", "--preference-loss longpo"),
    (
        "--preference-loss ipo --label-smoothing 0.1",
        "--label-smoothing",
        "--preference-loss dpo, dpo_norm, ld_dpo, simpo or wpo",
    ),
    (
        "--preference-loss orpo --label-smoothing 0.1",
        "--label-smoothing",
        "--preference-loss dpo, dpo_norm, ld_dpo, simpo or wpo",
    ),
    ("--label-smoothing-form robust", "--label-smoothing-form", "--label-smoothing above 0"),
    ("--preference-loss orpo --sft-weight 1", "--sft-weight", "--preference-loss dpo, dpo_norm, ipo, simpo or wpo"),
    ("--sft-normalization token", "--sft-normalization", "--sft-weight above 0", "--preference-loss longpo"),
    ("--sft-weight 0 --sft-normalization token", "--sft-normalization", "--sft-weight above 0"),
    ("--objective sft --sft-weight 1", "--sft-weight", "--objective preference"),
    ("--context-mode short --alignment-distance l2", "--alignment-distance", "--context-mode solo"),
    ("--alignment-huber-delta 2", "--alignment-huber-delta", "--context-mode solo", "--alignment-distance huber"),
    ("--context-mode short --alignment-weight 3", "--alignment-weight", "--context-mode solo"),
    ("--context-mode long --alignment-stop-short-gradient", "--alignment-stop-short-gradient", "--context-mode solo"),
    (
        "--preference-loss simpo --alignment-reference short",
        "--alignment-reference",
        "--preference-loss dpo, dpo_norm, ipo, ld_dpo or wpo",
    ),
    ("--preference-loss orpo --reference-cache d", "--reference-cache", "--preference-loss"),
    (
        "--preference-loss orpo --reference cached",
        "--reference",
        "--preference-loss dpo, dpo_norm, ipo, ld_dpo, longpo or wpo",
    ),
    (
        "--preference-loss simpo --reference resident",
        "--reference",
        "--preference-loss dpo, dpo_norm, ipo, ld_dpo, longpo or wpo",
    ),
    ("--objective sft --reference resident", "--reference", "--objective preference"),
    ("--reference resident --reference-cache d", "--reference-cache", "--reference cached"),
    ("--objective sft --preference-loss dpo", "--preference-loss", "--objective preference"),
    ("--recompute-method block", "--recompute-method", "--recompute-granularity full"),
    (f"{SELECTIVE} mlp --recompute-num-layers 2", "--recompute-num-layers", "--recompute-granularity full"),
    (
        "--recompute-granularity full --recompute-modules mlp",
        "--recompute-modules",
        "--recompute-granularity selective",
    ),
    ("--eval-interval 5", "--eval-interval", "--valid-data"),
    ("--overwrite", "--overwrite", "--save-hf"),
    ("--no-overwrite", "--overwrite", "--save-hf"),
    ("--lr-decay-style constant --min-lr 1e-9", "--min-lr", "--lr-decay-style"),
    ("--sequence-parallel", "--sequence-parallel", "--tensor-model-parallel-size above 1"),
    ("--cp-comm-type all_gather", "--cp-comm-type", "--context-parallel-size above 1"),
    (
        "--num-virtual-stages-per-pipeline-rank 2",
        "--num-virtual-stages-per-pipeline-rank",
        "--pipeline-model-parallel-size above 1",
    ),
    (
        "--decoder-first-pipeline-num-layers 2",
        "--decoder-first-pipeline-num-layers",
        "--pipeline-model-parallel-size above 1",
    ),
    (
        "--decoder-last-pipeline-num-layers 2",
        "--decoder-last-pipeline-num-layers",
        "--pipeline-model-parallel-size above 1",
    ),
    ("--overlap-param-gather", "--overlap-param-gather", "--overlap-grad-reduce"),
    ("--ddp-bucket-size 1000", "--ddp-bucket-size", "--overlap-grad-reduce"),
    ("--ckpt-step 4", "--ckpt-step", "--load"),
    ("--override-opt-param-scheduler", "--override-opt-param-scheduler", "--load", "--auto-resume"),
    ("--bf16 --exp-avg-dtype bf16", "--exp-avg-dtype", "--use-precision-aware-optimizer"),
    (
        "--bf16 --optimizer-cpu-offload --use-precision-aware-optimizer --no-store-param-remainders",
        "--store-param-remainders",
        "on the device",
    ),
    ("--overlap-cpu-optimizer-d2h-h2d", "--overlap-cpu-optimizer-d2h-h2d", "--optimizer-cpu-offload"),
    (
        "--bf16 --use-precision-aware-optimizer --main-grads-dtype bf16 --gradient-accumulation-fusion",
        "--gradient-accumulation-fusion",
        "--main-grads-dtype fp32",
    ),
    ("--keep-last 2", "--keep-last", "--save-interval"),
    ("--save-retain-interval 2", "--save-retain-interval", "--save-interval"),
    ("--async-save", "--async-save", "--save-interval"),
    ("--save-hf-interval 2", "--save-hf-interval", "--save-hf"),
]
"""(what is added to a right command line, the option that nothing reads, what it needs)"""

WRONG_RECOMPUTATIONS = [
    ("--recompute-granularity full --recompute-method block --activation-offload", "option-conflict", "use uniform"),
    (f"{TE} --recompute-granularity full --recompute-keep core_attn", "option-conflict", "--recompute-keep core_attn"),
    ("--recompute-granularity selective", "option-missing", "--recompute-modules"),
    (f"{SELECTIVE} mpl", "option-value", "'mpl'", "mlp"),
    (f"{SELECTIVE} mlp,shared_experts", "option-value", "no model here has shared experts"),
    (f"{SELECTIVE} moe_act", "option-conflict", "moe_act", "use moe"),
    (f"{TE} {SELECTIVE} mlp_act", "option-conflict", "mlp_act", "use mlp"),
    (f"{SELECTIVE} mlp,mlp_act", "option-unused", "mlp_act", "no effect with mlp"),
    (f"{SELECTIVE} mlp_act --lora-rank 8", "option-unused", "mlp_act", "--lora-rank"),
    (f"{SELECTIVE} core_attn,mlp_act --mlp-tiles 2", "option-unused", "--recompute-modules", "--mlp-tiles"),
    (f"{SELECTIVE} layernorm", "option-conflict", "--transformer-impl portable", "Transformer Engine"),
    (
        f"{TE} --fp8-format e4m3 --fp8-recipe delayed --preference-loss orpo {SELECTIVE} moe_act",
        "option-conflict",
        "--fp8-recipe delayed",
    ),
]
"""(what is added to a right command line, the code of its refusal, what it names)"""

MISSING_OPTIONS = [
    ({"hf_path": None}, "--hf-path"),
    ({"train_data": None}, "--train-data"),
    ({"train_data": ""}, "--train-data"),
    ({"save": None}, "--save"),
    ({"train_iters": None}, "--train-iters", "--train-epochs"),
]


def refuse(arguments, code, option, *named):
    with refused(code, *named) as caught:
        load(arguments)
    assert caught.value.message.startswith((f"{option}:", f"{option} "))


@pytest.mark.parametrize("row", WRONG_OPTIONS, ids=lambda row: row[0])
def test_a_wrong_option_is_refused_by_its_name(row):
    words, *expected = row
    refuse(argv(*words.split(" ")), *expected)


@pytest.mark.parametrize("row", WRONG_RECOMPUTATIONS, ids=lambda row: row[0])
def test_what_cannot_be_recomputed_is_refused_with_the_reason(row):
    words, *expected = row
    with refused(*expected):
        load(argv(*words.split(" ")))


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_of_megatron_that_nothing_can_do_is_refused_with_the_reason(name, tmp_path):
    assert name not in OWNER
    off = f"--no-{flag(name)[2:]}"
    for words in (flag(name), f"{flag(name)}=deepep", off):
        with refused("option-unsupported", f"{words.partition('=')[0]}: ", REFUSED[name]):
            load(argv(words))
    for section in ("model", "parallel"):
        file = tmp_path / "run.yaml"
        file.write_text(f"{section}:\n  {name}: true\n")
        with refused("option-unsupported", f"{file}:2: {section}.{name}: ", REFUSED[name]):
            load([*argv(), "--config", str(file)])


@pytest.mark.parametrize("row", UNUSED_OPTIONS, ids=lambda row: row[0])
def test_an_option_that_nothing_reads_is_refused_with_what_it_needs(row):
    words, *expected = row
    refuse(argv(*words.split(" ")), "option-unused", *expected)


@pytest.mark.parametrize("row", MISSING_OPTIONS, ids=lambda row: "-".join(map(str, row)))
def test_a_missing_option_is_named(row):
    changed, *expected = row
    refuse(argv(**changed), "option-missing", *expected)


def test_no_epochs():
    refuse(argv("--train-epochs", "0", train_iters=None), "option-value", "--train-epochs", "0.0")


WRONG_FILES = {
    "unknown section": (
        b"modle:\n  bf16: true\n",
        "option-unknown",
        "1",
        "'modle'",
        "model?",
        "sections are model, data",
    ),
    "option without section": (b"lr: 1\n", "option-unknown", "1", "'lr'", "an option of section 'training'"),
    "unknown option": (b"training:\n  learning_rate: 1\n  \n", "option-unknown", "2", "'training.learning_rate'"),
    "option typo": (b"data:\n  seq_lenght: 64\n", "option-unknown", "2", "'data.seq_lenght'", "seq_length?"),
    "dashes": (b"data:\n  seq-length: 64\n", "option-unknown", "2", "'data.seq-length'", "seq_length?"),
    "wrong section": (
        b"training:\n  seq_length: 64\n",
        "option-unknown",
        "2",
        "'training.seq_length'",
        "section 'data'",
    ),
    "no section": (b"seq_length: 64\n", "option-unknown", "1", "section 'seq_length'"),
    "number as option name": (b"data:\n  7: 64\n", "option-unknown", "2", "'data.7'"),
    "section is a value": (b"data: 64\n", "yaml-structure", "1", "section 'data'"),
    "list": (b"- data\n", "yaml-structure", "", "sections model, data"),
    "unclosed bracket": (b"model:\n  bf16: true\ndata:\n  seq_length: [64\n", "not-yaml", "5", "expected"),
    "tab": (b"model:\n\tbf16: true\n", "not-yaml", "2", "'\\t'"),
    "option twice": (b"data:\n  seq_length: 64\n  seq_length: 128\n", "not-yaml", "3", "'seq_length'"),
    "section twice": (
        b"data:\n  seq_length: 64\nmodel:\n  bf16: true\ndata:\n  shuffle: false\n",
        "not-yaml",
        "5",
        "'data'",
    ),
    "not text": (b"model:\n  hf_path: \xff\xfe\n", "not-yaml", "", "invalid start byte"),
    "control character": (b"model:\n  hf_path: a\x00b\n", "not-yaml", "", "special characters"),
    "word for a switch": (b"model:\n  bf16: 'yes'\n", "option-value", "2", "model.bf16:", "true or false", "'yes'"),
    "number for a switch": (b"model:\n  bf16: 1\n", "option-value", "2", "model.bf16:", "true or false", "'1'"),
    "switch for a number": (b"training:\n  lr: true\n", "option-value", "2", "training.lr:", "float", "True"),
    "YAML 1.1's word for a switch": (b"model:\n  bf16: yes\n", "option-value", "2", "model.bf16:", "true or false"),
    "time for a number": (
        b"training:\n  lr: 1\n  micro_batch_size: 1:30\n",
        "option-value",
        "3",
        "training.micro_batch_size:",
        "int",
        "'1:30'",
    ),
    "hexadecimal": (b"data:\n  seq_length: 0x10\n", "option-value", "2", "data.seq_length:", "int", "'0x10'"),
    "date for a number": (
        b"training:\n  lr: 2026-01-01\n",
        "option-value",
        "2",
        "training.lr:",
        "float",
        "'2026-01-01'",
    ),
    "key twice in a mapping": (b"model:\n  chat_template_kwargs: {a: 1, a: 2}\n", "not-yaml", "2", "'a'"),
    "YAML 1.1's word in a mapping": (
        b"model:\n  chat_template_kwargs:\n    deep: [{enable_thinking: no}]\n",
        "not-yaml",
        "3",
        "'no'",
        "true",
        "false",
    ),
    "list as option name": (b"data:\n  ? [a]\n  : 3\n", "option-unknown", "2", "'data.['a']'"),
    "list for a number": (b"training:\n  lr: [1]\n", "option-value", "2", "training.lr:", "float", "[1]"),
    "fraction for an integer": (
        b"training:\n  micro_batch_size: 1.5\n",
        "option-value",
        "2",
        "training.micro_batch_size:",
        "whole number",
        "'1.5'",
    ),
    "infinity": (b"training:\n  lr: .inf\n", "option-value", "2", "training.lr:", "float", "'.inf'"),
    "not a number": (b"training:\n  lr: .nan\n", "option-value", "2", "training.lr:", "float", "'.nan'"),
    "null where a value is needed": (
        b"data:\n  seq_length:\n",
        "option-value",
        "2",
        "data.seq_length:",
        "needs a value",
    ),
    "choice": (
        b"method:\n  preference_loss: kto\n",
        "option-value",
        "2",
        "method.preference_loss:",
        "'kto'",
        "dpo, dpo_norm, ipo, ld_dpo, longpo, orpo, simpo, wpo",
    ),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_file_is_refused_with_its_line(case, tmp_path):
    text, code, line, *named = WRONG_FILES[case]
    path = tmp_path / "run.yaml"
    path.write_bytes(text)
    with refused(code, *named) as caught:
        load(argv("--config", str(path)))
    assert caught.value.message.startswith(f"{path}:{line}: " if line else f"{path}: ")


def test_an_unused_option_of_a_file_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("method:\n  simpo_gamma: 1\n")
    with refused("option-unused", "--simpo-gamma"):
        load(argv("--config", str(tmp_path / "run.yaml")))
