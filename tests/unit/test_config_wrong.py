"""Wrong options and files, each answered with one line that names it and says what to change."""

import re

import pytest
from option_lines import argv

from megatron_solopo.config_load import load
from megatron_solopo.errors import UserError


def answer(arguments):
    with pytest.raises(UserError) as caught:
        load(arguments)
    return str(caught.value)


TE = ("--transformer-impl", "transformer_engine", "--bf16")

WRONG_FLAGS = {
    "unknown flag": (
        argv("--preference-los", "dpo"),
        r"^--preference-los: unknown option; did you mean --preference-loss\?$",
    ),
    "unknown flag with =": (
        argv("--sequence-length=8"),
        r"^--sequence-length: unknown option; did you mean --seq-length\?$",
    ),
    "abbreviation": (argv("--lr-warmup", "0.1"), r"^--lr-warmup: unknown option; did you mean --lr-warmup-fraction\?$"),
    "underscores": (argv("--seq_length", "64"), r"^--seq_length: unknown option; did you mean --seq-length\?$"),
    "flag like nothing": (argv("--zzzzzz"), r"^--zzzzzz: unknown option$"),
    "single dash": (argv("-lr", "1"), r"^'-lr': unexpected argument; options start with --$"),
    "stray word": (argv("dpo"), r"^'dpo': unexpected argument"),
    "value missing": (argv("--lr"), r"^--lr: expected one argument$"),
    "value for a switch": (argv("--bf16=true"), r"^--bf16: ignored explicit argument 'true'$"),
    "not a number": (argv("--lr", "fast"), r"^--lr: must be float, found 'fast'$"),
    "not an integer": (argv("--seq-length", "long"), r"^--seq-length: must be int, found 'long'$"),
    "fractional integer": (argv("--seq-length", "2048.5"), r"^--seq-length: must be a whole number, found '2048.5'$"),
    "nan": (argv("--lr", "nan"), r"^--lr: must be finite, found 'nan'$"),
    "infinity": (argv("--clip-grad", "inf"), r"^--clip-grad: must be finite, found 'inf'$"),
    "infinite integer": (argv("--seed", "inf"), r"^--seed: must be int, found 'inf'$"),
    "negative": (argv("--weight-decay", "-0.1"), r"^--weight-decay: must be at least 0, found -0.1$"),
    "below the minimum": (argv("--global-batch-size", "0"), r"^--global-batch-size: must be at least 1, found 0$"),
    "twice": (argv("--lr", "1", "--lr", "2"), r"^--lr: given twice; give it once, with the value that counts$"),
    "twice with =": (argv("--lr=1", "--lr=1"), r"^--lr: given twice; give it once"),
    "file twice": (argv("--config", "a.yaml", "--config", "b.yaml"), r"^--config: given twice"),
    "on and off": (argv("--bf16", "--no-bf16"), r"^--no-bf16: given twice"),
    "choice typo": (
        argv("--preference-loss", "simp"),
        r"^--preference-loss: 'simp' is not one of .*; did you mean simpo\?$",
    ),
    "choice of another option": (
        argv("--context-mode", "both"),
        r"^--context-mode: 'both' is not one of solo, short, long$",
    ),
    "choice in capitals": (argv("--device", "CUDA"), r"^--device: 'CUDA' is not one of auto, cuda, cpu"),
    "no model": (argv(hf_path=None), r"^--hf-path is missing: give the Hugging Face folder"),
    "no data": (argv(train_data=None), r"^--train-data is missing: give a file of training examples"),
    "empty data": (argv(train_data=""), r"^--train-data is missing"),
    "no run folder": (argv(save=None), r"^--save is missing: give the run folder"),
    "no length": (argv(train_iters=None), r"^give either --train-iters or --train-epochs$"),
    "two lengths": (argv("--train-epochs", "1"), r"^give either --train-iters or --train-epochs, not both$"),
    "no epochs": (argv("--train-epochs", "0", train_iters=None), r"^--train-epochs must be above 0, found 0.0$"),
    "Transformer Engine in float32": (
        argv("--transformer-impl", "transformer_engine"),
        r"^--transformer-impl transformer_engine needs --bf16: its attention kernels take 16 bits$",
    ),
    "Transformer Engine on the CPU": (
        argv(*TE, "--device", "cpu"),
        r"^--transformer-impl transformer_engine with --device cpu: it needs a CUDA device; take portable$",
    ),
    "scaling without a length": (
        argv("--rope-scaling", "yarn:4"),
        r"^--rope-scaling yarn:4: must be TYPE:FACTOR:ORIGINAL, such as yarn:4:32768$",
    ),
    "scaling of a word": (argv("--rope-scaling", "yarn:four:32768"), r"^--rope-scaling yarn:four:32768: must be TYPE"),
    "scaling by the length at hand": (
        argv("--rope-scaling", "dynamic:4:32768"),
        r"^--rope-scaling dynamic:4:32768: TYPE 'dynamic' is not one of yarn, linear$",
    ),
    "llama3's scaling": (
        argv("--rope-scaling", "llama3:8:8192"),
        r"^--rope-scaling llama3:8:8192: llama3 comes from config.json only; take yarn or linear$",
    ),
    "scaling by 1": (
        argv("--rope-scaling", "linear:1:4096"),
        r"^--rope-scaling linear:1:4096: FACTOR must be a number above 1$",
    ),
    "scaling to half a token": (
        argv("--rope-scaling", "yarn:1.3:4096"),
        r"^--rope-scaling yarn:1.3:4096: ORIGINAL and FACTOR x ORIGINAL must be whole numbers above 0$",
    ),
    "FP8 without Transformer Engine": (
        argv("--fp8-format", "e4m3"),
        r"^--fp8-format would have no effect: it needs --transformer-impl transformer_engine$",
    ),
    "recipe without FP8": (
        argv(*TE, "--fp8-recipe", "mxfp8"),
        r"^--fp8-recipe would have no effect: it needs --fp8-format$",
    ),
    "reference by delayed scaling": (
        argv(*TE, "--fp8-format", "hybrid", "--fp8-recipe", "delayed"),
        r"^--fp8-recipe delayed with dpo: it scales by earlier batches, and the reference is computed before there are "
        r"any; take tensorwise, or orpo or simpo$",
    ),
    "ring attention without Transformer Engine": (
        argv("--context-parallel-size", "2", "--cp-comm-type", "p2p"),
        r"^--cp-comm-type p2p is Transformer Engine's: add --transformer-impl transformer_engine, or take all_gather$",
    ),
    "ring attention of shared prompts": (
        argv(*TE, "--context-parallel-size", "2", "--cp-comm-type", "a2a"),
        r"^--cp-comm-type a2a: Transformer Engine's context parallelism cannot let continuations see one shared "
        r"prompt; add --no-share-prompts, or take all_gather$",
    ),
    "gamma with dpo": (
        argv("--simpo-gamma", "1"),
        r"^--simpo-gamma would have no effect: it needs --preference-loss simpo$",
    ),
    "beta with orpo": (
        argv("--preference-loss", "orpo", "--beta", "1"),
        r"^--beta would have no effect: it needs .*--orpo-lambda",
    ),
    "lambda with simpo": (
        argv("--preference-loss", "simpo", "--orpo-lambda", "1"),
        r"^--orpo-lambda would have no effect",
    ),
    "ipo of beta 0": (
        argv("--preference-loss", "ipo", "--beta", "0"),
        r"^--beta 0 with --preference-loss ipo: .* give a beta above 0$",
    ),
    "dpo of beta 0": (argv("--beta", "0"), r"^--beta 0 with --preference-loss dpo: .* give a beta above 0$"),
    "simpo of beta 0": (
        argv("--preference-loss", "simpo", "--beta", "0"),
        r"^--beta 0 with --preference-loss simpo: .* give a beta above 0$",
    ),
    "longpo on pairs of both contexts": (
        argv("--preference-loss", "longpo"),
        r"^--preference-loss longpo trains on the long context, not on --context-mode solo; give --context-mode long$",
    ),
    "longpo on the short context": (
        argv("--preference-loss", "longpo", "--context-mode", "short"),
        r"^--preference-loss longpo .* not on --context-mode short; give",
    ),
    "longpo with alignment": (
        argv("--preference-loss", "longpo", "--context-mode", "long", "--alignment-target", "both"),
        r"^--alignment-target would have no effect: it needs --context-mode solo$",
    ),
    "longpo with a choice of reference": (
        argv("--preference-loss", "longpo", "--context-mode", "long", "--alignment-reference", "short"),
        r"^--alignment-reference would have no effect: it needs --context-mode solo and --preference-loss dpo or ipo",
    ),
    "longpo with sft weight": (
        argv("--preference-loss", "longpo", "--context-mode", "long", "--sft-weight", "1"),
        r"^--sft-weight would have no effect: it needs --preference-loss dpo, ipo or simpo \(longpo and orpo hold",
    ),
    "longpo's lambda with dpo": (
        argv("--longpo-lambda", "0.1"),
        r"^--longpo-lambda would have no effect: it needs --preference-loss longpo$",
    ),
    "smoothed ipo": (
        argv("--preference-loss", "ipo", "--label-smoothing", "0.1"),
        r"^--label-smoothing would have no effect: it needs --preference-loss dpo or simpo$",
    ),
    "smoothed orpo": (argv("--preference-loss", "orpo", "--label-smoothing", "0.1"), r"^--label-smoothing would have"),
    "half the labels swapped": (argv("--label-smoothing", "0.5"), r"^--label-smoothing 0.5: must be below 0.5"),
    "labels swapped back": (argv("--label-smoothing", "-0.1"), r"^--label-smoothing: must be at least 0, found -0.1$"),
    "form of no smoothing": (
        argv("--label-smoothing-form", "robust"),
        r"^--label-smoothing-form would have no effect: it needs --label-smoothing above 0$",
    ),
    "form of robust smoothing": (
        argv("--label-smoothing", "0.1", "--label-smoothing-form", "robus"),
        r"^--label-smoothing-form: 'robus' is not one of conservative, robust; did you mean robust\?$",
    ),
    "sft weight with orpo": (
        argv("--preference-loss", "orpo", "--sft-weight", "1"),
        r"^--sft-weight would have no effect: it needs",
    ),
    "normalisation of nothing": (
        argv("--sft-normalization", "token"),
        r"^--sft-normalization would have no effect: it needs --sft-weight above 0, or --preference-loss longpo$",
    ),
    "normalisation of weight 0": (
        argv("--sft-weight", "0", "--sft-normalization", "token"),
        r"^--sft-normalization would have no effect",
    ),
    "sft weight with sft": (
        argv("--objective", "sft", "--sft-weight", "1"),
        r"^--sft-weight would have no effect: it needs --objective preference$",
    ),
    "distance without alignment": (
        argv("--context-mode", "short", "--alignment-distance", "l2"),
        r"^--alignment-distance would have no effect: it needs --context-mode solo$",
    ),
    "delta of l1": (
        argv("--alignment-huber-delta", "2"),
        r"^--alignment-huber-delta would have no effect: it needs --context-mode solo and --alignment-distance huber$",
    ),
    "delta of 0": (
        argv("--alignment-distance", "huber", "--alignment-huber-delta", "0"),
        r"^--alignment-huber-delta must be above 0$",
    ),
    "distance typo": (argv("--alignment-distance", "L1"), r"^--alignment-distance: 'L1' is not one of l1, l2, huber"),
    "alpha without alignment": (
        argv("--context-mode", "short", "--alignment-weight", "3"),
        r"^--alignment-weight would have no effect: it needs --context-mode solo$",
    ),
    "alignment on the long side only": (
        argv("--context-mode", "long", "--alignment-stop-short-gradient"),
        r"^--alignment-stop-short-gradient would",
    ),
    "alignment reference with simpo": (
        argv("--preference-loss", "simpo", "--alignment-reference", "short"),
        r"^--alignment-reference would have no",
    ),
    "reference cache with orpo": (
        argv("--preference-loss", "orpo", "--reference-cache", "d"),
        r"^--reference-cache would have no effect",
    ),
    "preference loss with sft": (
        argv("--objective", "sft", "--preference-loss", "dpo"),
        r"^--preference-loss would .* --objective preference$",
    ),
    "recompute method alone": (
        argv("--recompute-method", "block"),
        r"^--recompute-method would .* --recompute-granularity full$",
    ),
    "evaluation without data": (
        argv("--eval-interval", "5"),
        r"^--eval-interval would have no effect: it needs --valid-data$",
    ),
    "force without export": (argv("--overwrite"), r"^--overwrite would have no effect: it needs --save-hf$"),
    "default spelt out, unused": (argv("--no-overwrite"), r"^--overwrite would have no effect"),
    "min-lr above lr": (argv("--lr", "1e-6", "--min-lr", "1e-5"), r"^--min-lr 1e-05 is above --lr 1e-06"),
    "min-lr of a constant": (
        argv("--lr-decay-style", "constant", "--min-lr", "1e-9"),
        r"^--min-lr would have no effect",
    ),
    "lr of zero": (argv("--lr", "0"), r"^--lr must be above 0$"),
    "warm-up to the end": (argv("--lr-warmup-fraction", "1"), r"^--lr-warmup-fraction 1.0: must be below 1$"),
    "epsilon of zero": (argv("--adam-eps", "0"), r"^--adam-eps must be above 0: "),
    "seed of 64 bits": (
        argv("--seed", "18446744073709551616"),
        r"^--seed 18446744073709551616: must be below 2\^63$",
    ),
    "beta of one": (argv("--adam-beta2", "1"), r"^--adam-beta2 1.0: must be below 1$"),
    "sequence parallel alone": (
        argv("--sequence-parallel"),
        r"^--sequence-parallel would have no effect: it needs --tensor-model-parallel-size above 1$",
    ),
    "context parallel in float32 on a GPU": (
        argv("--context-parallel-size", "2", "--device", "cuda"),
        r"^--context-parallel-size 2 with --device cuda needs --bf16: ",
    ),
    "how one process exchanges": (
        argv("--cp-comm-type", "all_gather"),
        r"^--cp-comm-type would have no effect: it needs --context-parallel-size above 1$",
    ),
    "virtual stages alone": (
        argv("--num-virtual-stages-per-pipeline-rank", "2"),
        r"^--num-virtual-stages-per-pipeline-rank would have no effect: it needs --pipeline-model-parallel-size above",
    ),
    "no virtual stage": (
        argv("--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "0"),
        r"^--num-virtual-stages-per-pipeline-rank: must be at least 1",
    ),
    "first stage alone": (
        argv("--decoder-first-pipeline-num-layers", "2"),
        r"^--decoder-first-pipeline-num-layers would have no effect: it needs --pipeline-model-parallel-size above 1$",
    ),
    "last stage alone": (
        argv("--decoder-last-pipeline-num-layers", "2"),
        r"^--decoder-last-pipeline-num-layers would have no effect: it needs --pipeline-model-parallel-size above 1$",
    ),
    "gather overlapped alone": (
        argv("--overlap-param-gather"),
        r"^--overlap-param-gather would have no effect: it needs --overlap-grad-reduce$",
    ),
    "buckets without overlap": (
        argv("--ddp-bucket-size", "1000"),
        r"^--ddp-bucket-size would have no effect: it needs --overlap-grad-reduce$",
    ),
    "packs below one example": (
        argv("--seq-length", "4096", "--max-tokens-per-rank", "2048"),
        r"^--max-tokens-per-rank 2048 is below --seq-length 4096",
    ),
    "checkpoint without --load": (argv("--ckpt-step", "4"), r"^--ckpt-step would have no effect: it needs --load$"),
    "override of nothing": (
        argv("--override-opt-param-scheduler"),
        r"^--override-opt-param-scheduler would have no effect: it needs --load or --auto-resume",
    ),
    "keeping the only one": (argv("--keep-last", "2"), r"^--keep-last would have no effect: it needs --save-interval"),
    "retaining the only one": (argv("--save-retain-interval", "2"), r"^--save-retain-interval would have no effect"),
    "asynchronous end": (argv("--async-save"), r"^--async-save would have no effect: it needs --save-interval"),
    "export interval without export": (
        argv("--save-hf-interval", "2"),
        r"^--save-hf-interval would have no effect: it needs --save-hf$",
    ),
    "two starts": (
        argv("--auto-resume", "--load", "run"),
        r"^--auto-resume goes on from --save, --load from another place",
    ),
    "no minutes": (argv("--exit-duration-in-mins", "0"), r"^--exit-duration-in-mins must be above 0$"),
    "retained but never saved": (
        argv("--save-interval", "4", "--save-retain-interval", "6"),
        r"^--save-retain-interval 6: must be a multiple of --save-interval 4$",
    ),
    "no file": (argv("--config", "absent.yaml"), r"^--config absent.yaml: no such file$"),
}


@pytest.mark.parametrize("case", WRONG_FLAGS)
def test_wrong_flags_get_one_line(case):
    arguments, pattern = WRONG_FLAGS[case]
    message = answer(arguments)
    assert re.search(pattern, message), message
    assert "\n" not in message


WRONG_FILES = {
    "unknown section": (
        b"modle:\n  bf16: true\n",
        r"run.yaml:\d: unknown section 'modle'; did you mean model\?; sections are model, data",
    ),
    "unknown option": (b"training:\n  learning_rate: 1\n  \n", r"run.yaml:\d: unknown option 'training.learning_rate'"),
    "option typo": (
        b"data:\n  seq_lenght: 64\n",
        r"run.yaml:\d: unknown option 'data.seq_lenght'; did you mean seq_length\?$",
    ),
    "dashes": (b"data:\n  seq-length: 64\n", r"yaml:2: unknown option 'data.seq-length'; did you mean seq_length\?$"),
    "wrong section": (
        b"training:\n  seq_length: 64\n",
        r"unknown option 'training.seq_length'; it belongs to section 'data'$",
    ),
    "no section": (b"seq_length: 64\n", r"run.yaml:\d: unknown section 'seq_length'"),
    "number as option name": (b"data:\n  7: 64\n", r"run.yaml:\d: unknown option 'data.7'"),
    "section is a value": (b"data: 64\n", r"run.yaml:\d: section 'data' must hold 'name: value' lines$"),
    "list": (b"- data\n", r"run.yaml: must hold the sections model, data"),
    "unclosed bracket": (b"model:\n  bf16: true\ndata:\n  seq_length: [64\n", r"run.yaml:5: not valid YAML \(expected"),
    "tab": (b"model:\n\tbf16: true\n", r"run.yaml:2: not valid YAML \(found character '\\t'"),
    "option twice": (
        b"data:\n  seq_length: 64\n  seq_length: 128\n",
        r"run.yaml:3: not valid YAML \('seq_length' is given twice\)$",
    ),
    "section twice": (
        b"data:\n  seq_length: 64\nmodel:\n  bf16: true\ndata:\n  shuffle: false\n",
        r"run.yaml:5: not valid YAML \('data' is given twice\)$",
    ),
    "not text": (b"model:\n  hf_path: \xff\xfe\n", r"run.yaml: not valid YAML \(invalid start byte\)$"),
    "control character": (b"model:\n  hf_path: a\x00b\n", r"run.yaml: not valid YAML \("),
    "word for a switch": (b"model:\n  bf16: 'yes'\n", r"run.yaml:\d: model.bf16: must be true or false, found 'yes'$"),
    "number for a switch": (b"model:\n  bf16: 1\n", r"run.yaml:\d: model.bf16: must be true or false, found '1'$"),
    "switch for a number": (b"training:\n  lr: true\n", r"run.yaml:\d: training.lr: must be float, found True$"),
    "YAML 1.1's word for a switch": (b"model:\n  bf16: yes\n", r"run.yaml:2: model.bf16: must be true or false, found"),
    "time for a number": (
        b"training:\n  lr: 1\n  micro_batch_size: 1:30\n",
        r"run.yaml:3: training.micro_batch_size: must be int, found '1:30'$",
    ),
    "hexadecimal": (b"data:\n  seq_length: 0x10\n", r"run.yaml:2: data.seq_length: must be int, found '0x10'$"),
    "date for a number": (b"training:\n  lr: 2026-01-01\n", r"yaml:2: training.lr: must be float, found '2026-01-01'$"),
    "key twice in a mapping": (
        b"model:\n  chat_template_kwargs: {a: 1, a: 2}\n",
        r"run.yaml:2: not valid YAML \('a' is given twice\)$",
    ),
    "YAML 1.1's word in a mapping": (
        b"model:\n  chat_template_kwargs:\n    deep: [{enable_thinking: no}]\n",
        r"run.yaml:3: not valid YAML \(no is neither true nor false; write one of these, or 'no' for the text\)$",
    ),
    "list as option name": (b"data:\n  ? [a]\n  : 3\n", r"run.yaml:2: unknown option 'data.\['a'\]'"),
    "list for a number": (b"training:\n  lr: [1]\n", r"run.yaml:\d: training.lr: must be float, found \[1\]$"),
    "fraction for an integer": (
        b"training:\n  micro_batch_size: 1.5\n",
        r"training.micro_batch_size: must be a whole number, found '1.5'$",
    ),
    "infinity": (b"training:\n  lr: .inf\n", r"run.yaml:\d: training.lr: must be float, found '.inf'$"),
    "not a number": (b"training:\n  lr: .nan\n", r"run.yaml:\d: training.lr: must be float, found '.nan'$"),
    "null where a value is needed": (
        b"data:\n  seq_length:\n",
        r"run.yaml:\d: data.seq_length: needs a value \(longest prompt",
    ),
    "choice": (
        b"method:\n  preference_loss: kto\n",
        r"run.yaml:\d: method.preference_loss: 'kto' is not one of dpo, ipo, longpo, orpo, simpo",
    ),
    "unused": (b"method:\n  simpo_gamma: 1\n", r"^--simpo-gamma would have no effect"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_get_one_line(case, tmp_path):
    text, pattern = WRONG_FILES[case]
    (tmp_path / "run.yaml").write_bytes(text)
    message = answer(argv("--config", str(tmp_path / "run.yaml")))
    assert re.search(pattern, message), message
    assert "\n" not in message
