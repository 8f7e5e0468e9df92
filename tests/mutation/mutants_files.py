"""Wrongs of what reads and writes files: conversion, tokenizers, the data commands."""

from __future__ import annotations

from mutant import within
from mutants import TABLES

CUTS = "tests/unit/test_hf_folder.py -k 'filled or joined or interleaved'"
ROUND_TRIP = "tests/unit/test_model_parity.py -k round_trip"
QUANTIZED = "tests/unit/test_quantized.py"
TOKENIZERS = "tests/unit/test_tokenizer.py"
TWO_VERSIONS = "tests/unit/test_portable_export.py"
NEW_TOKENS = "tests/functional/test_special_tokens.py"
KILLS = "tests/functional/test_convert_survival.py"
TRAINERS = "tests/functional/test_trainers.py"
WRITING = "tests/unit/test_hf_folder.py tests/functional/test_convert.py"

CONVERSION = [
    *within(
        "model/families/operators.py",
        CUTS,
        (
            "the first part for every process",
            "parameter.chunk(size, dimension)[rank]",
            "parameter.chunk(size, dimension)[0]",
        ),
        (
            "one part for the whole",
            "if dimension is None:\n            return parts[0]",
            "if True:\n            return parts[0]",
        ),
        ("a copy that broadcasts", "if target.shape != source.shape:", "if False:"),
        (
            "the vocabulary's first rows for every process",
            "tensor[rank * shard_rows : (rank + 1) * shard_rows]",
            "tensor[:shard_rows]",
        ),
        ("padding rows left as they were", "parameter[part.shape[0] :].zero_()", "pass"),
        ("padding rows exported", "return [parameter[: self.rows]]", "return [parameter]"),
        ("values before queries", "torch.cat([*parts], dim=1)", "torch.cat([*parts][::-1], dim=1)"),
        (
            "the first heads for every process",
            "*tensor.shape[1:]).chunk(size)[rank])",
            "*tensor.shape[1:]).chunk(size)[0])",
        ),
        ("heads exported in reverse", "parts = groups.split(", "parts = groups.flip(0).split("),
        ("up above gate", "return torch.cat((gate, up))", "return torch.cat((up, gate))"),
        ("gate and up exchanged on export", "return list(parameter.chunk(2))", "return list(parameter.chunk(2))[::-1]"),
        ("gate and up exchanged on import", "zip(parameter.chunk(2), tensors", "zip(parameter.chunk(2)[::-1], tensors"),
        (
            "gate and up cut as one",
            "return [half.chunk(size)[rank] for half in parameter.chunk(2)]",
            "return parameter.chunk(size)[rank].chunk(2)",
        ),
        ("gate and up exchanged where parts are joined", "return shard.chunk(2)", "return shard.chunk(2)[::-1]"),
    ),
    *within(
        "model/families/operators.py",
        "tests/unit/test_hf_folder.py",
        ("gate and up in turn taken for halves", "return rows[::2], rows[1::2]", "return rows.chunk(2)"),
    ),
    *within(
        "conversion/quantized.py",
        QUANTIZED,
        (
            "the upper half of a byte first",
            "(signed.repeat(16), signed.repeat_interleave(16))",
            "(signed.repeat_interleave(16), signed.repeat(16))",
        ),
        ("another base of the exponents", "- 127)", "- 128)"),
        ("the factors of other blocks", "repeat_interleave(FP8_BLOCK, -2)", "repeat(FP8_BLOCK, 1)"),
        ("scales of any shape", "!= expected:", "!= shape:"),
    ),
    *within(
        "conversion/shards.py",
        QUANTIZED,
        ("every expert written at the first place", "start = (place or 0) *", "start = 0 *"),
    ),
    *within(
        "conversion/hf_folder.py",
        QUANTIZED,
        ("the first expert for every one", "self.start + place * shape.numel() * size", "self.start"),
    ),
    *within(
        "model/families/llama.py",
        TABLES,
        (
            "the second norm for the first",
            '"input_layernorm": "input_layernorm"',
            '"input_layernorm": "post_attention_layernorm"',
        ),
        ("an output layer tied to the embedding", '("lm_head.weight",)', '("model.embed_tokens.weight",)'),
    ),
    *within(
        "model/families/qwen2.py",
        "tests/unit/test_model_parity.py -k 'log_probs_equal and qwen2'",
        (
            "biases of keys and values exchanged",
            '"bias"), qkv',
            '"bias")[::2] + ("model.layers.{layer}.self_attn.k_proj.bias",), qkv',
        ),
    ),
    *within(
        "model/families/moe.py",
        "tests/unit/test_model_parity.py -k 'log_probs_equal and (mixtral or moe)'",
        ("an expert's gate and up exchanged", "(gate, up), StackGateUp()", "(up, gate), StackGateUp()"),
        ("every expert the first", '.experts.{{expert}}.{name}.weight"', '.experts.0.{name}.weight"'),
        (
            "weights renormalised where they are not",
            '"moe_router_pre_softmax": not renormalize',
            '"moe_router_pre_softmax": False',
        ),
    ),
    *within(
        "model/families/mixtral.py",
        "tests/unit/test_model_parity.py -k 'log_probs_equal and mixtral'",
        ("Mixtral's gate and up exchanged", 'gate="w1", up="w3"', 'gate="w3", up="w1"'),
    ),
    *within(
        "model/families/qwen3_moe.py",
        "tests/unit/test_model_parity.py -k 'log_probs_equal and moe'",
        ("Qwen3-MoE's gate and up exchanged", 'gate="gate_proj", up="up_proj"', 'gate="up_proj", up="gate_proj"'),
    ),
    *within(
        "data/text/tokenizer.py",
        TOKENIZERS,
        ("SentencePiece without its prefix", "backend.normalizer = converter.normalizer(proto)", "pass"),
        ("merges by id", "generate_merges(ids, scores)", "generate_merges(ids, None)"),
        ("a tokenizer that differs accepted", "for text in PROBES if", "for text in () if"),
        ("ranks of any family as Llama 3's", 'if kind != "llama":', "if False:"),
        ("an existing token added", "if token in vocabulary:", "if False:"),
        (
            "the special tokens it had forgotten",
            "replace_extra_special_tokens=False",
            "replace_extra_special_tokens=True",
        ),
    ),
    *within(
        "conversion/new_tokens.py",
        NEW_TOKENS,
        ("new rows of zeros", "result[list(self.ids)] =", "_ ="),
        ("unused rows in the mean", "used = matrix[: self.used]", "used = matrix"),
    ),
    *within(
        "training/run_identity.py",
        NEW_TOKENS,
        ("resumed with other tokens", '"rope_scaling", "add_special_tokens"', '"rope_scaling"'),
    ),
    *within(
        "conversion/sidecar_files.py",
        NEW_TOKENS,
        ("the larger vocabulary not exported", 'document["vocab_size"] = hf_config.vocab_size', "pass"),
    ),
    *within(
        "conversion/sidecar_files.py",
        TWO_VERSIONS,
        ("experts under the newer name only", "document[older] = document[name]", "pass"),
        ("the dtype under the newer name only", "dict.fromkeys(names or DTYPES,", "dict.fromkeys(DTYPES[1:],"),
    ),
    *within(
        "conversion/tokenizer_files.py",
        TWO_VERSIONS,
        ("5's list of tokens kept", '_extend(settings, settings.pop("extra_special_tokens"))', "pass"),
        ("what 4 reads not compared", "if _as_4(source, settings, texts) != ours:", "if False:"),
        ("what 5 reads not compared", 'return [theirs(text)["input_ids"] for text in texts] == ours', "return True"),
        ("4's start of a text forgotten", "return [[*first, *file", "return [[*file"),
    ),
    *within(
        "model/rope_scaling.py",
        TWO_VERSIONS,
        ("the older name of rope_type forgotten", 'read.pop("type", None) or read["rope_type"]', 'read["rope_type"]'),
        ("4's theta not compared", 'or "rope_theta" not in document:', "or False:"),
    ),
    *within(
        "atomic.py",
        KILLS,
        (
            "the earlier model deleted first",
            "        folder.rename(replaced(folder))\n",
            "        shutil.rmtree(folder)\n",
        ),
        ("the earlier model not renamed back", "rename(earlier, folder)", "pass"),
    ),
    *within(
        "conversion/shards.py",
        WRITING,
        ("a file starts with its tensors", "file.seek(len(self._headers[number]) +", "file.seek("),
        ("a tensor forgotten", "if missing is not None:", "if False:"),
    ),
    *within(
        "conversion/stored.py",
        "tests/distributed/test_conversion.py",
        (
            "a stored part at another's place",
            "narrow_tensor_by_index(target, item.dest_offsets",
            "narrow_tensor_by_index(target, item.storage_offsets",
        ),
    ),
    *within(
        "conversion/stored.py",
        "tests/functional/test_convert.py",
        ("another model's weights accepted", 'raise self._refusal(f"its', 'self._refusal(f"its'),
        (
            "another padding refused",
            "tuple(tensor.size)[int(part.allow_shape_mismatch) :] != place.whole[int(part.allow_shape_mismatch) :]",
            "tuple(tensor.size) != place.whole",
        ),
    ),
    *within(
        "conversion/stored.py",
        TRAINERS,
        ("norms of one name", "filter(None, (match[2], _OTHER_NORM.get(match[2])))", "(match[2],)"),
        ("the first layer for all", "{layer}.{name}", "0.{name}"),
    ),
    *within(
        "conversion/stored_index.py",
        TRAINERS,
        (
            "an index that runs code",
            'raise pickle.UnpicklingError(f"{module}.{name}")',
            "return super().find_class(module, name)",
        ),
    ),
    *within(
        "conversion/trainers.py",
        TRAINERS,
        ("settings not compared", "is not None and other != value", "is not None and False"),
        ("tensors lost", "if left_over:", "if False:"),
        ("cut files accepted", "if size < end:", "if False:"),
    ),
    *within(
        "conversion/megatron_folder.py",
        "tests/distributed/test_conversion.py",
        ("every parameter stays in memory", "parameter.untyped_storage().resize_(0)", "pass"),
        ("a parameter emptied before its second part", "if not left[id(parameter)]:", "if True:"),
    ),
    *within(
        "conversion/hf_weights.py",
        WRITING,
        ("tensors of another model left out", "if left_over:", "if False:"),
        ("shapes not compared before writing", "if reader.shape(name) != shapes[name]:", "if False:"),
    ),
]

CONTEXTS = "tests/unit/test_data_contexts.py -k 'not real'"
SAMPLING = "tests/unit/test_data_sampling.py tests/unit/test_data_resampling.py"
STORE = "tests/unit/test_token_store.py"
OVERLONG = "tests/unit/test_overlong.py"

SCORING = "tests/unit/test_data_scoring.py"
NAMES = "tests/unit/test_option_names.py"
MATRIX = "tests/functional/test_matrix.py"
TOOLS = "tests/unit/test_tool_responses.py -k tools"
PIPELINE = "tests/functional/test_recipe_runs.py -k 'not killed'"

DATA = [
    *within(
        "data/answers.py",
        SCORING,
        (
            "short answers inside other words",
            "for span in _spans(key, gold.text) if is_word(key, *span)",
            "for span in _spans(key, gold.text)",
        ),
        ("yes where the part has both", "if spans.keys() == {gold.text}:", "if gold.text in spans:"),
        ("quotes and dashes not folded", "text.translate(_SPELLINGS)).translate(_SPELLINGS)", "text)"),
        ("answers in the middle of numbers", "if not cuts_number(key, *span)", "if True"),
        ("a long part that lists everything", "<= LONGEST_PART else (end, end)", "<= 10**9 else (end, end)"),
    ),
    *within(
        "data/scoring.py",
        SCORING,
        ("F1 of yes with words beside it", "and not _JUDGEMENTS.isdisjoint((text, gold.text))", "and False"),
    ),
    *within(
        "data/pairing/kept_scores.py",
        "tests/unit/test_data_pairs_scored.py",
        ("every question scored again", "if job not in jobs:", "if True:"),
        ("one score for all questions of equal texts", "[question, list(answers), list(responses)]", "[question]"),
        ("scores left behind", "        jobs.remove()", "        pass"),
    ),
    *within(
        "data/building/selection.py",
        CONTEXTS,
        (
            "the answer in a distractor",
            "and not any(mentions(candidate.key(gold.keep), gold) for gold in self._answers)",
            "and True",
        ),
        ("a gold title among the distractors", "candidate.title_key not in self._gold_titles", "True"),
        ("any length for a context in tokens", "if size - slack <= tokens <= size:", "if True:"),
    ),
    *within(
        "data/building/split.py",
        "tests/unit/test_data_split.py",
        (
            "near-duplicates on both sides",
            "for group in sorted(members.values(), key=draw):",
            "for group in sorted(([i] for v in members.values() for i in v), key=draw):",
        ),
    ),
    *within(
        "data/sampling/packing.py",
        "tests/unit/test_data_packing.py",
        ("the bias dropped", "self._packed, self.bias,", "self._packed, None,"),
        (
            "a layer with its own forward replaced",
            "type(module) is torch.nn.Linear]",
            "isinstance(module, torch.nn.Linear)]",
        ),
        (
            "the weights kept twice",
            "        self.bias = linear.bias\n",
            "        self.bias, self.linear = linear.bias, [linear]\n",
        ),
    ),
    *within(
        "data/sampling/sampler.py",
        "tests/unit/test_data_packing.py",
        ("weights not packed", "        pack_linears(self._model, options.batch_size)\n", ""),
    ),
    *within(
        "data/sampling/decoding.py",
        "tests/unit/test_data_decoding.py",
        ("samples attend to themselves only", "(largest + total.log())", "total.log()"),
        ("the keys of an earlier sample seen", "hidden = places > last[:, None]", "hidden = places > last.max()"),
    ),
    *within(
        "data/sampling/responses.py",
        SAMPLING,
        ("every sample requested again", "if number not in present]", "]"),
    ),
    *within(
        "atomic.py",
        "tests/unit/test_atomic.py",
        ("renamed before it is on the disk", "            _flush(file)\n", ""),
        ("half a file renamed", "            aside.unlink()", "            rename(aside, path)"),
    ),
    *within(
        "data/validation.py",
        "tests/unit/test_schema.py",
        ("texts accepted as numbers", "Whole = Annotated[int, Strict()]", "Whole = int"),
        ("an id that was used before accepted", "    if name in seen:", "    if False:"),
        (
            "the line of an error forgotten",
            "{where}: the field '{key}' must be {kind}",
            "the field '{key}' must be {kind}",
        ),
        (
            "a wrong type under another code",
            '"field-type" if error["type"] == _TYPE else "field-value"',
            '"field-value"',
        ),
    ),
    *within(
        "data/files/records.py",
        "tests/unit/test_arguments.py",
        ("a key twice reported as damaged JSON", '"json-key-twice" if isinstance(error, json_text.KeyTwice) else ', ""),
    ),
    *within(
        "data/files/jobs.py",
        "tests/unit/test_jobs.py",
        (
            "half a line kept at a kill",
            "            self._file.truncate(self._size)\n            self._open_streams(sizes)",
            "            self._open_streams(sizes)",
        ),
        (
            "bytes of unrecorded jobs kept in a stream",
            "            file.truncate(size)\n            file.seek(size)\n",
            "            file.seek(size)\n",
        ),
        (
            "jobs of other settings taken",
            'if any(job["job"] not in preparation for _, job in self._jobs()):',
            "if False:",
        ),
        ("two processes in one file", "fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass"),
        ("jobs whose stream is lost taken as done", "if any(self._length(name) < size", "if any(False"),
    ),
    *within(
        "data/tokenized/token_table.py",
        STORE,
        ("a damaged sequence trained on", "if _digest(cell) != self._table.rows", "if False and self._table.rows"),
        ("the short answer for every long one", "if not self.counts[name][row]:", "if True:"),
        (
            "lengths of the short answer for the long one",
            "there = self.counts[column] > 0",
            "there = self.counts[column] > 9",
        ),
        ("the second response of a side is the first", "ids = cell[self._response]", "ids = cell[0]"),
        (
            "one fingerprint for all that can be scored",
            "self.of_responses(context, side, self.digests) for context, side in sorted(scored)]",
            "self.of_responses(context, side, self.digests) for context, side in sorted(scored)[:1]]",
        ),
    ),
    *within(
        "data/tokenized/token_store.py",
        STORE,
        ("damaged lengths trusted", 'table.index_sha256() == written["index_sha256"]', "True"),
        ("a store of another method taken", "if names_of_scored(scored) != only:", "if False:"),
    ),
    *within(
        "data/tokenized/make_store.py",
        STORE,
        ("the store of another source taken", '"sha256": sha256}', '"sha256": ""}'),
        (
            "a broken store in the cache taken",
            "    except UserError:\n        return False",
            "    except UserError:\n        return True",
        ),
    ),
    *within(
        "data/tokenized/encoder.py",
        "tests/unit/test_tokens.py",
        ("sampled ids of another text", "if text in texts:", "if True:"),
    ),
    *within(
        "data/tokenized/overlong.py",
        OVERLONG,
        ("evidence cut away", "in enumerate(spans) if not gold]", "in enumerate(spans)]"),
        (
            "the first documents cut, not the middle ones",
            "key=lambda i: (abs(spans[i][0] + spans[i][1] - len(text)), i)",
            "key=lambda i: i",
        ),
    ),
    *within(
        "arguments.py",
        NAMES,
        ("the file over the command line", "if action not in besides:", "if True:"),
        ("a mistake in a file blamed on the command line", "self._places.get(option[1], option[1])", "option[1]"),
        ("two names of one option in a file", "if action in places:", "if False:"),
        (
            "the old thresholds of build-pairs swapped",
            '{"--right-above": "--correct-threshold", "--wrong-below": "--incorrect-threshold"}',
            '{"--right-above": "--incorrect-threshold", "--wrong-below": "--correct-threshold"}',
        ),
    ),
    *within(
        "recipe.py",
        "tests/unit/test_recipe.py",
        (
            "the code of a stage's mistake lost",
            "raise UserError(error.code, self._placed(",
            'raise UserError("stage-command", self._placed(',
        ),
    ),
    *within(
        "pipeline.py",
        PIPELINE,
        (
            "another stage before it overlooked",
            "inputs = _digest([earlier, work.inputs()])",
            "inputs = _digest([work.inputs()])",
        ),
        ("another input overlooked", "inputs = _digest([earlier, work.inputs()])", "inputs = _digest([earlier])"),
        (
            "another output mistaken for the run's",
            "noted.options == options and _untouched(noted.files)",
            "noted.options == options",
        ),
        (
            "a file of the user deleted",
            "[output for output in work.outputs if not os.path.lexists(output)]",
            "list(work.outputs)",
        ),
        ("a file elsewhere deleted", " and folder in path.absolute().resolve().parents]", "]"),
    ),
    *within("stage_process.py", PIPELINE, ("Ctrl-C not passed on", "os.killpg(process.pid, signal.SIGINT)", "None")),
    *within(
        "rounds.py",
        "tests/unit/test_recipe.py",
        ("each round from the first model", "            previous = model\n", ""),
        ("one seed of all rounds", "stage.with_seed(seed + number - 1)", "stage.with_seed(seed)"),
    ),
    *within(
        "serving.py",
        "tests/functional/test_rounds.py -k server",
        ("a server left with the model before", "if folder == self._folder and (", "if self._folder and ("),
        ("a failed reload overlooked", "            if reason:\n", "            if False:\n"),
    ),
    *within(
        "matrix.py",
        MATRIX,
        ("a result kept whatever its options", "_kept(file)) == stages and", "_kept(file)) is not None and"),
        (
            "a seed of the recipe kept",
            "for stage in (one.with_seed(seed) for one in reversed(stages)):",
            "for stage in reversed(stages):",
        ),
        ("another variant's stages before its own", "dataclasses.replace(stage, reads=())", "stage"),
        ("this machine's paths kept", '.replace(f"{Path.cwd()}{os.sep}", "")', ""),
    ),
    *within(
        "matrix.py",
        f"{MATRIX} -k training",
        ("an epoch counted once", "count * of_group for", "of_group for"),
    ),
    *within(
        "data/formats.py",
        TOOLS,
        (
            "tools of the long context lost",
            '("short_messages", "long_messages", "messages")',
            '("short_messages", "messages")',
        ),
    ),
    *within(
        "data/text/chat.py",
        TOOLS,
        ("tools that the template ignores", "if name not in text:", "if False:"),
    ),
    *within(
        "data/text/control.py",
        TOOLS,
        ("control tokens of tools parsed", '("content", TOOL_CALLS, TOOLS)', '("content", TOOL_CALLS)'),
    ),
]
