"""The small wrongs that the tests must notice: what is changed where, and which tests are to turn red."""

from __future__ import annotations

from mutant import Mutant, within

LOSSES = "tests/unit/test_losses.py"
MANY = "tests/distributed/test_many_responses.py"
SEVERAL = "tests/unit/test_several_responses.py"
STEP = "tests/unit/test_step.py"
PACKS = "tests/unit/test_packs.py"
BATCHES = "tests/unit/test_batches.py"
CHAT = "tests/unit/test_chat.py -k 'not qwen'"
LOG_PROBS = "tests/unit/test_log_probs.py"
RESIDENT = "tests/unit/test_resident.py"
PARITY = "tests/unit/test_model_parity.py -k 'one_by_one or double'"
TOKENS = "tests/unit/test_tokens.py"
CONFIG = "tests/unit/test_config_wrong.py"
REFUSALS = "tests/functional/test_training_errors.py -k 'tensor or another'"
TRAINING = "tests/functional/test_training.py"
CUT = "tests/distributed/test_model_parallel.py -k 'oracles_gradient and sequence'"
CONTEXT = "tests/unit/test_context_parallel.py"
FUSED = "tests/unit/test_fused_kernels.py"
TILED = "tests/unit/test_tiled_mlp.py"
KERNELS = "tests/unit/test_attention_kernels.py"
METHODS = "tests/unit/test_context_methods.py"
EXCHANGE = "tests/unit/test_step_exchange.py"
CONTEXT_RUNS = "tests/distributed/test_model_parallel.py -k 'oracles_gradient and context'"
EXPERTS = "tests/distributed/test_experts.py -k 'oracles_gradient or auxiliary'"
HEALTH = "tests/unit/test_monitoring.py"
TOPOLOGY = "tests/unit/test_topology.py"
REFERENCE = "tests/functional/test_reference_cache.py"
ENGINE = "tests/unit/test_transformer_engine.py"
FAMILIES = "tests/unit/test_families.py -k 'not real_shapes'"
BENCHMARK = "tests/unit/test_benchmark.py"
API = "tests/functional/test_python_api.py -k 'training or stopped or again'"
TABLES = "tests/unit/test_model_parity.py -k log_probs_equal"
ROPE = "tests/unit/test_rope.py"
MULTIMODAL = "tests/unit/test_multimodal.py"
LONGER = "tests/functional/test_rope_scaling.py"
DRAWN = "tests/unit/test_random_start.py"
SHARDS = "tests/distributed/test_checkpoint_shards.py"
STEP_COUNTS = "tests/unit/test_step_counts.py"
STEP_FORECAST = "tests/unit/test_step_forecast.py"
BUDGET = "tests/unit/test_token_budget.py"
BUDGET_OF_RUN = "tests/functional/test_budget_of_run.py"
CUDA = "tests/unit/test_cuda_path.py -k 'not import'"
PLAN = "tests/unit/test_plan.py"
RECOMPUTE = "tests/unit/test_recompute.py"
ADAM = "tests/unit/test_adam.py"
LORA = "tests/distributed/test_lora.py -k 'pefts and not 4-'"
LORA_RUNS = "tests/functional/test_lora.py"
STRETCH = "tests/unit/test_stretch.py"
STRETCHED_RUNS = "tests/functional/test_stretched_runs.py"
DROPOUT = "tests/unit/test_lora_dropout.py"
TASKS = "tests/unit/test_evaluation_tasks.py"
ANSWERS = "tests/unit/test_answers.py"
SERVED = "tests/unit/test_evaluation_server.py"
DELTA = "tests/unit/test_delta_rule.py"
WITH_EXPERTS = "tests/distributed/test_families_with_experts.py"
RECURRENT = "tests/distributed/test_recurrent_layers.py -k oracles"

MUTANTS: list[Mutant] = [
    *within(
        "data/tokenized/stretch.py",
        STRETCH,
        ("one draw for all epochs", "epoch if self.by_epoch else 0, *words", "0, *words"),
        ("one draw for all examples", "*words.tolist()])", "])"),
        ("a draw without the run's seed", "default_rng([self.seed, epoch", "default_rng([epoch"),
        ("positions beyond the stretched length", "* (spare + 1))", "* (spare + 2))"),
        ("responses left out of the stretched length", " - max(len(completion.ids)", " - 0 * max(len(completion.ids)"),
        ("short prompts stretched", "return context == Context.LONG or side == Side.PLAIN", "return True"),
        ("another draw in each epoch with a cache", "not one_draw)", "True)"),
        ("the last gap left out", "astype(np.int64), total])", "astype(np.int64), 0])"),
    ),
    *within(
        "data/tokenized/tokens.py",
        STRETCH,
        ("responses at the positions of an unstretched prompt", " + sum(jump.gap for jump in self.jumps)", ""),
        ("a jump a token too late", "positions[token:] += gap", "positions[token + 1 :] += gap"),
    ),
    *within(
        "data/tokenized/token_store.py",
        STRETCH,
        (
            "other boundaries with the same fingerprint",
            "self.fingerprint.encode() + boundaries",
            "b'' + boundaries[:0]",
        ),
        ("examples beyond the stretched length", "if longest.max() > stretch.length:", "if False:"),
        ("stretched segments forgotten by a selection", "else stored._with(self.stretch)", "else stored"),
    ),
    *within(
        "data/text/chat.py",
        STRETCH,
        (
            "places of a message counted from the prompt's start",
            "bisect_right(ends, start + place)",
            "bisect_right(ends, place)",
        ),
    ),
    *within(
        "training/reference.py",
        STRETCHED_RUNS,
        ("one reference for all stretched positions", "if dataset.stretch is not None:", "if False:"),
    ),
    *within(
        "training/preflight.py",
        STRETCHED_RUNS,
        ("evaluation at stretched positions", 'Stretch.of(config) if split == "train" else None', "Stretch.of(config)"),
    ),
    *within(
        "training/step_work.py",
        STRETCHED_RUNS,
        ("every epoch at the positions of the first", "of_examples = epochs or", "of_examples ="),
    ),
    *within(
        "training/run_identity.py",
        STRETCHED_RUNS,
        (
            "resumed with another draw of positions",
            "(DRAWS if reference_is_stretched(config) else",
            "(frozenset() if True else",
        ),
    ),
    *within(
        "model/hf_config.py",
        STRETCHED_RUNS,
        ("positions beyond RoPE", "if data.stretch_positions is not None:", "if False:"),
    ),
    *within(
        "losses/dpo.py",
        LOSSES,
        ("reference left out of DPO's reward", "beta * (log_prob - reference_log_prob)", "beta * log_prob"),
    ),
    *within(
        "losses/simpo.py",
        LOSSES,
        ("sum for mean in SimPO", "beta * log_prob / length", "beta * log_prob"),
        ("sign of gamma", "pairs.margin - self.simpo_gamma", "pairs.margin + self.simpo_gamma"),
    ),
    *within(
        "losses/orpo.py",
        LOSSES,
        ("sum for mean in ORPO's odds", "mean = (log_prob / length)", "mean = log_prob"),
        ("odds taken for their logarithm's inverse", "return mean - torch.log(", "return mean + torch.log("),
        ("ORPO's clamp dropped", ".clamp(max=LARGEST_MEAN)", ""),
        ("ORPO's lambda dropped", "self.orpo_lambda * logistic_loss", "logistic_loss"),
    ),
    *within(
        "losses/ipo.py",
        LOSSES,
        ("IPO's target twice as far", "- 1 / (2 * self.beta)", "- 1 / self.beta"),
        ("sum for mean in IPO", "pairs.chosen_rewards / pairs.chosen.lengths", "pairs.chosen_rewards"),
    ),
    *within(
        "losses/dpo_norm.py",
        LOSSES,
        ("sum for mean in length-normalised DPO", "self.beta) / responses.lengths", "self.beta)"),
    ),
    *within(
        "losses/wpo.py",
        LOSSES,
        ("a gradient through WPO's weights", "responses.log_probs.detach() - ", "responses.log_probs - "),
        ("WPO's weight of the chosen response alone", " + _log_weight(pairs.rejected)", ""),
        ("sum for mean in WPO's weights", "responses.squares) / responses.lengths", "responses.squares)"),
    ),
    *within(
        "data/tokenized/packs.py",
        SEVERAL,
        ("one token too many without the tail's weight", "< self.shortest, 1.0", "<= self.shortest, 1.0"),
    ),
    *within(
        "data/tokenized/tokens.py",
        SEVERAL,
        (
            "the longest response for the shortest",
            "return min(completion.trained_tokens",
            "return max(completion.trained_tokens",
        ),
    ),
    *within(
        "data/tokenized/encoder.py",
        SEVERAL,
        ("several turns trained whole", "None if all(loss_mask) else loss_mask, number)", "None, number)"),
    ),
    *within(
        "data/tokenized/token_table.py",
        SEVERAL,
        (
            "a fingerprint without masks",
            "parts += [self._of_masks(context, side, self.digests) for context, side in sorted(scored)]",
            "pass",
        ),
    ),
    *within(
        "data/pairing/policies.py",
        SEVERAL,
        ("the farthest length taken", "left.pop(min(range", "left.pop(max(range"),
        ("a text that is right and wrong kept", "if response.text not in both]", "]"),
    ),
    *within(
        "losses/longpo.py",
        LOSSES,
        ("LongPO's lambda dropped", "self.longpo_lambda * logistic_loss", "logistic_loss"),
        ("LongPO's reference on the long context", "reference_on_short = True", "reference_on_short = False"),
    ),
    *within(
        "losses/base.py",
        LOSSES,
        (
            "chosen and rejected swapped",
            "self.chosen_rewards - self.rejected_rewards",
            "self.rejected_rewards - self.chosen_rewards",
        ),
    ),
    *within(
        "losses/terms.py",
        LOSSES,
        ("label smoothing without the swapped half", "return kept + swapped", "return kept"),
        ("robust smoothing not divided", "(kept - swapped) / (1 - 2 * label_smoothing)", "(kept - swapped)"),
        ("half of the squared distance", "return difference**2", "return difference**2 / 2"),
        ("Huber's delta ignored", '"none", huber_delta)', '"none", 1.0)'),
        ("mean over the batch's tokens ignored", "length if tokens_per_group is None else tokens_per_group", "length"),
    ),
    *within(
        "losses/terms.py",
        MANY,
        ("every pair weighs what a group weighs", "groups, values / counts)", "groups, values)"),
    ),
    *within(
        "losses/solopo.py",
        LOSSES,
        ("alpha dropped", "loss + method.alignment_weight * alignment", "loss + alignment"),
        (
            "preference loss of mode long on the short side",
            'Context.LONG if method.context_mode == "long" else Context.SHORT',
            "Context.SHORT",
        ),
        ("reference of the wrong context", "Context.SHORT if on_short else context", "Context.SHORT"),
        (
            "stop-gradient on the wrong side",
            "short_rewards - rewards[long]",
            "rewards[short] - (rewards[long].detach() if method.alignment_stop_short_gradient else rewards[long])",
        ),
        (
            "alignment of the rejected answer forgotten",
            '(Side.CHOSEN, Side.REJECTED) if method.alignment_target == "both" else (Side.CHOSEN,)',
            "(Side.CHOSEN,)",
        ),
        ("weight of the likelihood dropped", "each + method.sft_weight * likelihood", "each + likelihood"),
        ("a tie counted as wrong", "(margin.sign() + 1) / 2", "(margin > 0).to(margin.dtype)"),
        ("alignment's sign", "return by_side(distance)", "return -by_side(distance)"),
    ),
    *within(
        "losses/solopo.py",
        MANY,
        (
            "Plackett-Luce over the pairs of the pack",
            "group_logsumexp(chosen, len(segments))",
            "group_logsumexp(torch.zeros_like(chosen), 1)",
        ),
        (
            "alignments of both sides averaged together",
            "segments.groups[short] * len(Side) + sides, ",
            "segments.groups[short] * len(Side), ",
        ),
    ),
    *within(
        "pack.py",
        PACKS,
        ("pairs across groups", "rejected & (self.groups[:, None] == self.groups)", "rejected"),
        ("another response aligned", "& (self.responses[:, None] == self.responses)", ""),
    ),
    *within(
        "training/segment_table.py",
        STEP,
        ("every response at the first one's place", "self._starts[key] + scored.responses", "self._starts[key]"),
        (
            "reference row of another example",
            "dtype=torch.int64)[scored.groups]",
            "dtype=torch.int64)[scored.groups] * 0",
        ),
        ("reference on each segment's context", "of_pack(pack, reference_contexts)", "of_pack(pack)"),
    ),
    *within(
        "training/objective.py",
        STEP,
        (
            "mean length of a pack, not of the batch",
            "return tokens / total_groups",
            "return tokens / inputs.packs[0].segments.group_count",
        ),
        (
            "chosen lengths added, not averaged",
            "segments.lengths[chosen].double() / groups.bincount()[groups]",
            "segments.lengths[chosen].double()",
        ),
    ),
    *within(
        "training/step.py",
        STEP,
        ("weight by micro-batch, not by group", "scale = len(packs) * ranks / total_groups", "scale = ranks"),
        ("mean over groups, then over packs", "total = result.loss.sum()", "total = result.loss.mean()"),
    ),
    *within(
        "data/tokenized/packs.py",
        PACKS,
        (
            "position of a completion off by one",
            "first=prompt.end, prompt=piece)",
            "first=prompt.end + 1, prompt=piece)",
        ),
        ("positions restart at a completion", "ids[:-1], first=prompt.end, prompt", "ids[:-1], first=0, prompt"),
        (
            "labels not shifted",
            "np.arange(self.size - 1, self.size - 1 + len(ids))",
            "np.arange(self.size, self.size + len(ids))",
        ),
        (
            "labels shifted twice",
            "np.arange(start - 1, start - 1 + len(ids))",
            "np.arange(start - 2, start - 2 + len(ids))",
        ),
        (
            "tokens of the user trained",
            "slice(None) if completion.loss_mask is None else np.asarray(completion.loss_mask)",
            "slice(None)",
        ),
        (
            "last token of a response not counted",
            "side, response, completion.trained_tokens))",
            "side, response, completion.trained_tokens - 1))",
        ),
    ),
    *within(
        "data/text/chat.py",
        CHAT,
        ("end-of-turn token missed", "return [*ids, end_of_turn_id(tokenizer)]", "return ids"),
        (
            "end-of-turn token counted twice",
            "return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids",
            "return ids",
        ),
    ),
    *within(
        "data/text/chat.py",
        "tests/unit/test_chat_templates.py -k 'not sentencepiece'",
        (
            "a thought that a template adds is trained",
            "if body.strip() == response.strip() or",
            "if response in body or",
        ),
        ("a thought opened twice", 'if tag[0][1] != "/" and', "if False and"),
    ),
    *within(
        "data/text/control.py",
        "tests/unit/test_control_tokens.py",
        ("control tokens of texts parsed", "if not any(self.spelled(", "if True or not any(self.spelled("),
        ("merges that spell control tokens kept", 'if renamed.isdisjoint((*pair, "".join(pair)))]', "]"),
    ),
    *within(
        "data/tokenized/batches.py",
        BATCHES,
        ("one order for all epochs", "default_rng([seed, epoch])", "default_rng([seed, 0])"),
        (
            "resume order shifted",
            "first = number * self.global_batch_size",
            "first = number * self.global_batch_size + min(number, 1)",
        ),
        ("a group trained twice", "shares[target].append(item)", "shares[target] += [item] * (1 + (item == 1))"),
        ("token limit of a pack ignored", "+ tokens[item] <= most_tokens)", "<= most_tokens)"),
    ),
    *within(
        "data/tokenized/tokens.py",
        TOKENS,
        ("the reference scores what the policy scores", "if (p.context, c.side) in scored))", "if p))"),
    ),
    *within(
        "model/log_probs.py",
        LOG_PROBS,
        ("padding rows of the vocabulary counted", 'logits[:, real_rows:] = float("-inf")', "pass"),
        ("padding chosen as a token", 'logits[:, real_rows:].fill_(float("-inf"))', "pass"),
        ("padding rows of the vocabulary moved", "computed = real_rows if", "computed = len(weight) if"),
        ("gradient of one block only", "addmm(grad_hidden, rows", "addmm(grad_hidden.zero_(), rows"),
        ("logits always computed again", "keeps = differentiable and", "keeps = False and"),
        ("all logits kept", "return tokens <= chunk or", "return True or"),
        ("logits kept for evaluation", "differentiable = torch.is_grad_enabled() and", "differentiable ="),
        ("two chunks of logits at a time", "del logits", "pass"),
        (
            "segments not summed",
            "count).index_add(-1, segments, log_probs)",
            "count).index_copy(-1, segments, log_probs)",
        ),
        ("squared probabilities not normalised", "of_squares.log() - 2 * sums.log()", "of_squares.log() - sums.log()"),
        ("chunks of the CPU on CUDA", '"cuda" if on_cuda else "cpu"', '"cpu"'),
    ),
    *within(
        "parallel/layout.py",
        CONTEXT,
        (
            "a completion sees nothing of its prompt",
            "keys.append(np.arange(start, start + prompt_length))",
            "keys.append(span[:1].repeat(prompt_length))",
        ),
    ),
    *within(
        "config_unused.py",
        CONFIG,
        (
            "an unused option accepted",
            "(name, has(name)(loss), f",
            "(name, True, f",
        ),
    ),
    *within(
        "training/step.py",
        TRAINING + " -k 'warms_up or killed'",
        ("learning rate one step late", "scheduler.step(1)  # before", "scheduler.step(int(step > 0))  # before"),
    ),
    *within(
        "training/preflight.py",
        "tests/distributed/test_separate_disks.py -k 'other_data or run_folder_of_each'",
        ("each node trains on other data", "check_same(tokens.fingerprint,", "check_same(None,"),
        ("a run folder of each node", "    resume.check_shared_folder(Path(config.output.save))\n", ""),
    ),
    *within(
        "training/preflight.py",
        REFUSALS,
        (
            "weights that a dry run does not look at",
            "check_weights(config.model.hf_path, hf_config, padded)",
            "pass",
        ),
        ("a dry run without the reference's weights", "(before or not dry_run)", "not dry_run"),
    ),
    *within(
        "training/preflight.py",
        f"{TRAINING} -k dry_run_without_a_gpu",
        ("no dry run of a GPU's run without one", "resolve(config.parallel.device)", "choose(config.parallel.device)"),
    ),
    *within(
        "training/monitoring.py",
        HEALTH,
        ("a working alignment warned about", "fell <= max(rose, 0)", "fell <= min(rose, 0)"),
        ("displacement reported for any margin", ' or now["margin"] <= first["margin"]', ""),
        ("a spike against the last value", "median(past) if", "past[-1] if"),
        ("steps clipped now and then reported as all", "            self._clipped.clear()\n", ""),
    ),
    *within(
        "parallel/topology.py",
        TOPOLOGY,
        (
            "pipeline stages as neighbours",
            "pipeline_rank, data_rank = divmod(rest, data)",
            "data_rank, pipeline_rank = divmod(rest, max(rest // data, 1))",
        ),
        ("a layout that does not divide the model accepted", "if number % size:", "if size > number:"),
        ("a later chunk's layers right behind the first's", "chunk * sum(sizes) + sum", "chunk * sizes[stage] + sum"),
        ("packs of other processes gathered", "if sharing % exchanging:", "if False:"),
        ("an option of experts ignored", "if value != default:", "if False:"),
        ("unequal middle stages accepted", "left % others if others else left", "False if others else left"),
    ),
    *within(
        "training/reference.py",
        REFERENCE,
        ("a killed fill forgotten", "(_read(partial, places) for partial in partial_files)", "()"),
        ("a cache never checked against the model", "elif examples:", "elif False:"),
        ("a damaged cache used", "if intact and fits", "if fits"),
        (
            "a slow process times the others out",
            '    wait_for_all("reference")\n    dist.all_reduce(stopped',
            "    dist.all_reduce(stopped",
        ),
    ),
    *within(
        "training/reference.py",
        RESIDENT,
        ("packs of the CPU's reference as large as a GPU's", 'if device != "cuda":', "if False:"),
        ("larger packs of the reference without effect", "_with_larger_packs(config, factor)", "config"),
    ),
    *within(
        "training/resident.py",
        RESIDENT,
        (
            "the policy not restored",
            "        finally:\n            self._exchange()",
            "        finally:\n            pass",
        ),
        ("the policy scores itself", "with self.in_place(), torch.no_grad():", "with torch.no_grad():"),
    ),
    *within(
        "training/segment_table.py",
        RESIDENT,
        ("compared with the next response", "side, response] for group", "side, max(response - 1, 0)] for group"),
    ),
    *within(
        "training/engine.py",
        "tests/distributed/test_resident_layouts.py",
        ("other ranks keep the reference's weights", "chunk.reset_param_sync_dispatch_state()", "pass"),
    ),
    *within(
        "model/forward.py",
        CUT,
        ("the gathered sequence's gradient summed twice", "tensor_parallel_output_grad=False", ""),
    ),
    *within(
        "parallel/zigzag.py",
        CONTEXT,
        ("the first chunks to the first rank", "return rank, 2 * size - 1 - rank", "return 2 * rank, 2 * rank + 1"),
    ),
    *within(
        "parallel/sequences.py",
        CONTEXT,
        (
            "a completion sees the padding of its prompt",
            "prompt.start + prompt.length))",
            "prompt.start + prompt.slot))",
        ),
        ("earlier chunks unseen", "np.arange(piece.start, begin + length)", "np.arange(begin, begin + length)"),
        ("keys of another rank's rows", "np.argsort(gathered)[rows]", "gathered[rows]"),
        ("gradients of keys summed in 16 bits", "torch.promote_types(grad.dtype, torch.float32)", "grad.dtype"),
        ("gradients of keys not summed", "rows.index_add_(0,", "rows.index_copy_(0,"),
        ("a window's keys cut too short", "-(length + window - 1) :", "-(length + window - 2) :"),
        ("a sink that no query shares", "torch.logaddexp(without, sinks", "torch.maximum(without, sinks"),
        ("a sink's gradient of the other sign", "of_sinks = -(shares", "of_sinks = (shares"),
    ),
    *within(
        "parallel/flash.py",
        CONTEXT,
        ("the flash kernel without the window", "if layout.window is None else {", "if True else {"),
    ),
    *within(
        "model/attention.py",
        "tests/unit/test_model_parity.py -k gradients",
        ("windows of no layer", "packed.windowed if windowed and", "packed.windowed if False and"),
        ("windows of every layer", "packed.windowed if windowed and", "packed.windowed if True and"),
        ("RoPE in every layer", "self.rotates = not (", "self.rotates = True or not ("),
        ("queries not scaled by position", "rotated if self.query_scale is None else", "rotated if True else"),
    ),
    *within(
        "model/rope.py",
        "tests/unit/test_model_parity.py -k gradients",
        (
            "one RoPE for all layers",
            'rope_parameters["sliding_attention" if windowed else',
            'rope_parameters["sliding_attention" if False else',
        ),
    ),
    *within(
        "model/swiglu.py",
        "tests/unit/test_grouped_experts.py -k clamped",
        ("gate not clamped", "gate.clamp(max=ctx.limit)", "gate.clone()"),
        ("up clamped on one side", "up.clamp(-ctx.limit, ctx.limit)", "up.clamp(max=ctx.limit)"),
        ("a gradient beyond the limit", "of_up.masked_fill_(up.abs() > ctx.limit, 0)", "pass"),
        ("the offset of up left out", ".add_(ctx.offset)", ""),
    ),
    *within(
        "model/experts.py",
        "tests/unit/test_grouped_experts.py -k biases",
        ("biases without a row's weight", "added if scale is None else", "added if True else"),
        ("the biases of other experts", "F.pad(ends[:-1], (1, 0))", "F.pad(ends[:-1], (1, 0)) * 0"),
    ),
    *within(
        "model/build.py",
        WITH_EXPERTS,
        ("biases of different experts added", 'setattr(parameter, "sequence_parallel", False)', "pass"),
    ),
    *within(
        "model/norm.py",
        "tests/distributed/test_model_parallel.py -k olmo3",
        ("a norm over the heads of one rank", "squares = _Summed.apply(squares, group)", "pass"),
    ),
    *within(
        "planning/operators.py",
        CONTEXT,
        ("the planner counts pairs outside the window", 'if named.get("window_size_left") is not None:', "if False:"),
    ),
    *within(
        "parallel/products.py",
        CUDA + " -k ddp",
        (
            "the head's gradient added twice",
            'setattr(weight, "grad_added_to_main_grad", True)',
            "return weight.main_grad.to(weight.dtype)",
        ),
        (
            "gradients of tied weights without values",
            'if getattr(weight, "zero_out_wgrad", False):',
            "if False:",
        ),
    ),
    *within(
        "training/run.py",
        "tests/unit/test_deterministic.py",
        ("deterministic runs like others", "with fixed_order() if config", "with fixed_order() if False and config"),
    ),
    *within(
        "model/experts.py",
        "tests/unit/test_grouped_experts.py",
        ("experts one after another on CUDA", 'if device.type != "cuda" or', "if True or"),
        ("rows of other experts", "[*accumulate(counts)]", "[*accumulate(counts[::-1])]"),
        (
            "parameters of experts before they are gathered",
            "weights = [weight_of(matrix) for",
            "weights = [matrix.weight for",
        ),
    ),
    *within(
        "conversion/manifest.py",
        SHARDS + " -k share",
        ("every process digests all files", "% processes == process", "% processes >= 0"),
    ),
    *within(
        "model/swiglu.py",
        FUSED,
        (
            "SwiGLU's gradient of up without its gate",
            "torch.mul(grad, _activated(gate, ctx.gelu), out=of_up)",
            "of_up.copy_(grad)",
        ),
    ),
    *within(
        "model/norm.py",
        FUSED,
        ("norms unfused on CUDA", 'if x.device.type == "cuda":\n            result', "if False:\n            result"),
        ("a norm's gradient without its mean", "torch.addcmul(of_normed, normed, mean, value=-1)", "of_normed"),
    ),
    *within(
        "model/repeated.py",
        TILED,
        (
            "results kept that can be computed again",
            "node if function is not None and issubclass",
            "node if False and issubclass",
        ),
    ),
    *within(
        "model/tiled_mlp.py",
        TILED,
        ("a weight's gradient of the last tile alone", "add_product(total, grad", "add_product(total.zero_(), grad"),
        (
            "an MLP left out where another layer reads it",
            'settings.recompute_method == "block" or settings.recompute_num_layers == 1',
            "True",
        ),
        ("gradients of tiles rounded in sums of 16 bits", "main_grad.dtype == torch.float32", "requires_grad"),
        (
            "gradients of tiles summed in 16 bits",
            "torch.promote_types(parameter.dtype, torch.float32)",
            "parameter.dtype",
        ),
        ("adapters of the second matrix left out of a tile's backward", "if adapter is not None:", "if False:"),
        (
            "gates kept of all tiles",
            "rows = torch.empty_like(x), mlp.rows(x)\n",
            "rows = torch.empty_like(x), len(x)\n",
        ),
    ),
    *within(
        "model/tiled_mlp.py",
        CUT.replace("sequence'", "sequence and tiles'"),
        ("a tile of this rank's rows alone", "return self.config.sequence_parallel and", "return False and"),
    ),
    *within(
        "model/log_probs.py",
        FUSED,
        ("logits rounded to 16 bits", 'if hidden.device.type == "cuda" and hidden', "if False and hidden"),
    ),
    *within(
        "parallel/kernels.py",
        KERNELS,
        ("cuDNN in deterministic runs", 'if deterministic and backend == "auto":', "if False:"),
        ("CUDA's attention for the CPU too", "if not on_cuda:", "if False:"),
    ),
    *within(
        "parallel/layout.py",
        KERNELS,
        (
            "float32 by the kernel that holds all scores",
            "return [SDPBackend.EFFICIENT_ATTENTION]",
            "return [SDPBackend.MATH]",
        ),
        ("prompts on other kernels than cuDNN", "if cudnn_only else", "if False else"),
    ),
    *within(
        "model/build.py",
        CUDA + " -k chooses",
        ("Transformer Engine chooses its kernel", 'return "fused" if', 'return "auto" if'),
    ),
    *within(
        "model/build.py",
        ENGINE,
        ("the option of the fused RoPE ignored", "engine and model.rope_fusion", "engine"),
        ("packs of unequal lengths left to allgather", '!= "allgather"', '!= "none"'),
    ),
    *within(
        "model/attention.py",
        RECOMPUTE,
        (
            "the kept attention of another layer",
            "(results := kept.pop(self.layer_number, None))",
            "(results := kept.pop(min(kept, default=0), None))",
        ),
    ),
    *within(
        "model/offload.py",
        RECOMPUTE,
        (
            "host blocks free before their copy back",
            "        self._checkpoint.parts.append(moved)\n",
            "        self._checkpoint.parts.append(moved)\n        self._blocks.give_back(blocks)\n",
        ),
        (
            "the copy back does not wait for what had the memory",
            "self._stream.wait_event(allocated)",
            "pass",
        ),
        ("a tensor read before its copy is done", "torch.cuda.current_stream().wait_event(saved.arrived)", "pass"),
        (
            "memory used again before its copy is done",
            "torch.cuda.current_stream().wait_event(self._leaving[1])",
            "pass",
        ),
        ("the copy to the host does not wait for its tensor", "self._stream.wait_event(computed)", "pass"),
        ("results of the kept attention in another order", "[moved.order.index(n) for n", "[n for n"),
    ),
    *within(
        "model/kept_attention.py",
        RECOMPUTE,
        ("kept attention computed again", "return next(self.results) if func in KERNELS else", "return"),
    ),
    *within(
        "model/attention.py",
        ENGINE,
        (
            "the fused RoPE without yarn's factor",
            "return rotated if self.scaling == 1 else",
            "return rotated if True else",
        ),
        (
            "angles of the fused RoPE by row number",
            "frequencies.angles(positions)",
            "frequencies.angles(positions.sort()[0])",
        ),
    ),
    *within(
        "planning/states.py",
        "tests/unit/test_rehearsal.py -k calculated",
        ("FP8 copies without their transposes", "return 2 * matrices * layers", "return matrices * layers"),
    ),
    *within(
        "parallel/cpu_attention.py",
        CONTEXT,
        ("completions see the padding of their prompt", "keys.length - common].append", "keys.slot - common].append"),
        ("earlier chunks unseen on the CPU", "run.piece.start, range(before))", "run.piece.start, range(0))"),
        ("a window one token too long on the CPU", "start + 1 - window), min(", "start - window), min("),
        ("keys of a window in the pack's order", "return x.flip(2) if self.seen is Seen.LATER else x", "return x"),
        ("a completion's window ends at its prompt", "keys.start, range(common))", "keys.start, range(0))"),
        ("keys of another rank's rows on the CPU", "np.argsort(gathered), gathered", "gathered, gathered"),
        ("parts merged with equal weights", "output * first + more * second", "(output + more) / 2"),
        ("the log-sum-exp of one part", "more * second, together", "more * second, log_sums"),
        ("gradients of one call", "] += of_sequence", "] = of_sequence"),
        ("16 bits rounded in every part", "torch.promote_types(x.dtype, torch.float32)) for x", "x.dtype) for x"),
    ),
    *within(
        "planning/budget.py",
        BUDGET,
        ("another process's memory", "room = min(room for", "room = max(room for"),
        ("memory of all processes of a machine", "* GIB / here)", "* GIB)"),
        ("the mean of both packs", "(room - least) / (peak - least)", "0.5"),
        ("validation's examples forgotten", "if inputs.data.valid is not None else []", "if False else []"),
    ),
    *within(
        "training/run_folder.py",
        BUDGET_OF_RUN,
        ("a number for other options", "and all(settings[s]", "or all(settings[s]"),
    ),
    *within(
        "training/preflight.py",
        BUDGET_OF_RUN,
        ("another number when a run resumes", '"folders") if resumed else None', '"folders") if False else None'),
    ),
    *within(
        "parallel/device_pack.py",
        EXCHANGE,
        ("positions of the whole pack", "pack.positions[rows]", "pack.positions[: rows.numel()]"),
        (
            "predictions of another rank's tokens",
            "segments=pack.segments[on_rank]",
            "segments=pack.segments[: on_rank.sum()]",
        ),
    ),
    *within(
        "parallel/context/__init__.py",
        METHODS,
        (
            "methods by a list",
            "names = sorted((module.name for",
            'names = sorted(("none", "all_gather", "p2p", "a2a") or (module.name for',
        ),
        ("a method for packs that stay whole", "WHOLE if size == 1 else cp_comm_type", "WHOLE"),
    ),
    *within(
        "model/forward.py",
        METHODS + " -k all_gather",
        ("a pack cut by a mask on the device", "part.tokens[None]", "part.tokens[part.tokens >= 0][None]"),
    ),
    *within(
        "training/ahead.py",
        EXCHANGE,
        (
            "inputs prepared too far ahead",
            "self._next = number + 1, self._thread.submit(self._make, number + 1)",
            "[self._thread.submit(self._make, number + n) for n in (1, 2)]",
        ),
        ("the work of another number", "and ready[0] == number else", "else"),
    ),
    *within(
        "training/engine.py",
        EXCHANGE,
        ("gradients clipped by another norm", "part.config.clip_grad, norm, ", "part.config.clip_grad, norm**2, "),
        (
            "dense layers' gradients alone in the norm",
            "for part in _parts(optimizer) for gradient",
            "for part in _parts(optimizer)[:1] for gradient",
        ),
        ("weights moved without clipping", "part.config.clip_grad > 0:", "part.config.clip_grad > 1:"),
    ),
    *within(
        "training/step.py",
        EXCHANGE,
        (
            "a second reading of the device",
            "sums, grad_norm = parts.sums(of_ranks), total_norm(",
            'parts.scalars["loss"].item()\n    sums, grad_norm = parts.sums(of_ranks), total_norm(',
        ),
    ),
    *within(
        "model/forward.py",
        CONTEXT_RUNS,
        (
            "each context-parallel rank a part of the loss",
            "return reduce_from_tensor_model_parallel_region(compute(states, weight, group), context)",
            "return compute(states, weight, group)",
        ),
    ),
    *within(
        "model/router.py",
        PARITY,
        ("a float64 model's router in float32", "torch.promote_types(logits.dtype, torch.float32)", "torch.float32"),
        ("the chosen experts' weights not renormalised", "if not self.config.moe_router_pre_softmax:", "if False:"),
        (
            "a router's bias in the weights",
            "scores.gather(1, experts)",
            "(scores + self.expert_bias).gather(1, experts)",
        ),
        ("experts chosen without the bias", "scores.detach() + self.expert_bias", "scores.detach()"),
        ("groups compared by their best expert", "best=2)", "best=1)"),
        ("groups of a softmax router by two experts", "best=1)", "best=2)"),
        ("no factor on weights", "if self.config.moe_router_topk_scaling_factor is not None:", "if False:"),
    ),
    *within(
        "model/router.py",
        EXPERTS,
        ("padding counts as load", "chosen = probs * real, chosen & real", "chosen = probs * real, chosen"),
        ("the load of a part of the tokens", "if self.tp_cp_group.size() > 1:", "if False:"),
        ("padding not cut on later stages", 'get_attr_wrapped_model(model, "pre_process")', "True"),
    ),
    *within(
        "conversion/save_folder.py",
        MULTIMODAL,
        ("carried tensors in the model's dtype", "dtypes |= {name: of_source for", "_ = {name: of_source for"),
    ),
    *within(
        "conversion/hf.py",
        MULTIMODAL,
        (
            "a router's bias in the model's dtype",
            "kept = [entry for entry in table if",
            "kept = [entry for entry in () if",
        ),
    ),
    *within(
        "conversion/hf.py",
        EXPERTS,
        (
            "every process loads the first experts",
            "hf.format(layer=number, expert=expert)",
            "hf.format(layer=number, expert=place)",
        ),
        ("experts cut over the wrong processes", "if entry.of_experts:\n        return", "if False:\n        return"),
    ),
    *within(
        "training/checkpoint.py",
        TRAINING + " -k killed",
        ("the schedule starts anew on resuming", 'scheduler.load_state_dict(loaded["scheduler"])', "pass"),
        ("the optimizer starts anew on resuming", 'optimizer.load_state_dict(loaded["optimizer"])', "pass"),
    ),
    *within(
        "training/checkpoint.py",
        SHARDS,
        (
            "one process writes the weights",
            "aside, self._engine.platform.device, self._strategy)",
            "aside, self._engine.platform.device)",
        ),
    ),
    *within(
        "parallel/platform.py",
        CUDA,
        (
            "as many queues of kernels as CUDA likes",
            'os.environ.setdefault(CONNECTIONS, "1")',
            "os.environ.setdefault(CONNECTIONS, '8')",
        ),
    ),
    *within(
        "training/run.py",
        CUDA,
        ("queues of kernels by tensor parallelism alone", " * parallel.context_parallel_size > 1", " > 1"),
    ),
    *within(
        "training/gradients.py",
        CUDA,
        (
            "gradients among the digests",
            "held[name] = digest, gradient.shape, gradient.dtype",
            "held[name] = digest, gradient, gradient.dtype",
        ),
    ),
    *within(
        "training/profiling.py",
        "tests/functional/test_profiling.py",
        (
            "one step too many profiled",
            "if done == self._output.profile_step_end",
            "if done > self._output.profile_step_end",
        ),
        ("every process profiled", "and self._rank in profiled_ranks(output)", ""),
        ("no name for the head", "if model.post_process:", "if not model.post_process:"),
        ("a trace where nsys waits", "and not self._output.use_pytorch_profiler", "and False"),
    ),
    *within(
        "conversion/sharded_write.py",
        SHARDS,
        ("a save copies what it writes", "part.data = in_own_storage(part.data)", "pass"),
    ),
    *within(
        "parallel/optimizer_shards.py",
        SHARDS,
        ("shards of a part placed as if it were the first", "first = part.data.storage_offset()", "first = 0"),
    ),
    *within(
        "parallel/cpu_shim.py",
        SHARDS,
        (
            "the optimizer's state gathered",
            "_reduce_scatter_along_first_dim))\n        _store_optimizer_in_shards(patch)",
            "_reduce_scatter_along_first_dim))",
        ),
    ),
    *within(
        "parallel/sequences.py",
        ENGINE,
        (
            "a sequence's keys without its prompt's",
            "seen.insert(0,",
            "list.insert([], 0,",
        ),
    ),
    *within(
        "data/tokenized/batches.py",
        ENGINE,
        ("FP8's multiple forgotten", "even *= FP8_MULTIPLES", "even *= 1 or FP8_MULTIPLES"),
    ),
    *within(
        "data/tokenized/packs.py",
        ENGINE,
        ("padding of other tokens", "np.resize(np.concatenate(self.tokens), count)", "np.full(count, 7)"),
    ),
    *within(
        "model/transformer_engine.py",
        ENGINE,
        ("widths of another recipe", "FP8_MULTIPLES[model.fp8_recipe]", "16"),
        ("an expert under another's name", r"local_experts.\2.\1.weight", r"local_experts.0.\1.weight"),
    ),
    *within(
        "model/families/llama.py",
        TABLES,
        ("queries taken for keys", 'for part in "qkv")', 'for part in "kqv")'),
        (
            "gate and up swapped",
            '(f"{theirs}.gate_proj.weight", f"{theirs}.up_proj.weight")',
            '(f"{theirs}.up_proj.weight", f"{theirs}.gate_proj.weight")',
        ),
        ("the queries' norm on the keys", 'self_attn.{x}_norm.weight"', 'self_attn.{"qk"[x == "q"]}_norm.weight"'),
    ),
    *within(
        "model/families/fields.py",
        FAMILIES,
        ("an unknown field of config.json accepted", "and not _is_off(value)", "and False"),
        (
            "a window of a part of the layers overlooked",
            'return window if "sliding_attention" in kinds else None',
            "return None",
        ),
    ),
    *within(
        "model/hf_config.py",
        FAMILIES,
        ("a window refused that hides nothing", "window >= config.data.seq_length", "window > config.data.seq_length"),
    ),
    *within(
        "model/rope.py",
        ROPE,
        ("yarn's attention factor dropped", "inverse.float(), float(scaling)", "inverse.float(), 1.0"),
        ("scaled frequencies left out", 'if kind != "default":', "if False:"),
        ("an unknown field of the scaling accepted", "and value is not None:", "and False:"),
    ),
    *within(
        "model/rope_scaling.py",
        ROPE,
        ("another length than the model's accepted", "if scaling.original not in trained:", "if False:"),
        (
            "positions of the shorter model exported",
            'document["max_position_embeddings"] = hf_config.max_position_embeddings',
            "pass",
        ),
    ),
    *within(
        "model/hf_config.py", LONGER, ("--rope-scaling without effect", "if rope_scaling is None else", "if True else")
    ),
    *within(
        "conversion/sidecar_files.py",
        LONGER,
        ("the scaling not exported", "if not rope_scaling.is_read_alike(document, hf_config):", "if 0:"),
    ),
    *within(
        "training/reference.py",
        LONGER,
        ("one reference for all scalings", "if config.model.rope_scaling is not None:", "if False:"),
    ),
    *within(
        "training/run_identity.py",
        LONGER,
        ("resumed with another scaling", '"rope_scaling", "add_special_tokens"', '"add_special_tokens"'),
    ),
    *within(
        "planning/operators.py",
        STEP_COUNTS,
        ("causal attention counted whole", "if not causal:", "if True:"),
        ("attention's backward as short as its forward", "2 if packet in _FORWARD else 5", "2"),
        (
            "grouped queries counted by their keys' heads",
            "sequences, heads, queries, _ = query.shape",
            "sequences, heads, queries, _ = *key.shape[:2], *query.shape[2:]",
        ),
        ("products as slow as the sums that they are added to", "if kind in (PRODUCTS, EXPERTS):", "if False:"),
        ("the host's Adam computed by the GPU", 'places == {"cpu"}', "places == set()"),
        ("copies to the host at the GPU's bandwidth", "if len(places) > 1 and", "if False and"),
    ),
    *within(
        "planning/counts.py",
        STEP_COUNTS,
        (
            "overlapped reductions counted in each pack",
            "self._update if kind == DATA else self._part()",
            "self._part()",
        ),
        ("recomputation counted as forward", "return self._backward if in_backward() else", "return"),
        ("a reference's pass counted as training", "else self._score if self._scores else", "else"),
        ("packs counted together", "part * (1 / packs) for part", "part for part"),
        (
            "the update counted as part of packs",
            "            self._in_pack = False\n            return",
            "            return",
        ),
    ),
    *within(
        "planning/forecast.py",
        STEP_FORECAST,
        ("virtual stages that do not shorten the bubble", "* (stages - 1) / chunks", "* (stages - 1)"),
        ("overlap that hides the last bucket", "total * (1 - 1 / number)", "total"),
        ("a network as fast as links of a node", "bandwidth = min(bandwidth, here * machine.network_gb_per_s)", "pass"),
        ("bytes of products forgotten", "return max(moving, operation.flops", "return max(0, operation.flops"),
        ("the fastest stage forecast", "return max(steps, key", "return min(steps, key"),
        (
            "copies that computing hides forecast",
            "_beyond(self.on_link(tally), sum(computing.values()))",
            "self.on_link(tally)",
        ),
    ),
    *within(
        "planning/machines.py",
        STEP_FORECAST,
        ("a range upside down", "len(value) != 2 or value[0] > value[1]", "len(value) != 2"),
        ("percentages for fractions", "if value[1] > LARGEST_SHARE:", "if False:"),
        ("a node's main memory for each GPU", "value / self.gpus_per_node for", "value for"),
    ),
    *within(
        "planning/calibration.py",
        "tests/functional/test_calibration.py",
        ("calibrated by the first step too", "row in steps[1:] if", "row in steps if"),
        ("calibrated by the fastest step", "rows[len(rows) // 2]", "rows[0]"),
        ("a GPU calibrated by a CPU", 'if device == "cpu" and machine', "if False and machine"),
    ),
    *within(
        "conversion/random_start.py",
        DRAWN,
        ("one draw for all tensors", 'f"{seed} {name}"', 'f"{seed}"'),
        ("a draw without the seed", 'f"{seed} {name}"', 'f"{name}"'),
        ("norms drawn like matrices", "if len(shape) == 1:", "if False:"),
        ("the config's deviation ignored", "dtype=np.float32)) * std", "dtype=np.float32)) * 0.02"),
    ),
    *within(
        "conversion/random_start.py",
        "tests/distributed/test_conversion.py",
        ("each process draws another part", 'f"{seed} {name}"', 'f"{seed} {name} {torch.distributed.get_rank()}"'),
    ),
    *within(
        "parallel/context/none.py",
        CUDA,
        ("lengths of prompts as they are on CUDA", "if kernels in PLANNED else", "if False else"),
    ),
    *within(
        "data/tokenized/batches.py",
        CUDA,
        (
            "padding of prompts not counted on CUDA",
            "tokens(share_prompts, of_pieces, of_prompts)",
            "tokens(share_prompts, of_pieces)",
        ),
    ),
    *within(
        "data/tokenized/packs.py",
        PACKS,
        (
            "completions rounded up like prompts",
            "self.prompt_multiple_of if prompt is None else",
            "self.prompt_multiple_of if True else",
        ),
    ),
    *within(
        "training/engine.py",
        CUDA,
        ("no fused Adam", "if adam is None and not HAVE_APEX_OR_TE", "if False"),
        ("a second Adam fused", "if adam is None and not HAVE_APEX_OR_TE", "if adam is None"),
        ("groups of gloo on CUDA", "create_gloo_process_groups=False", "create_gloo_process_groups=True"),
    ),
    *within(
        "parallel/cpu_shim.py",
        EXCHANGE,
        ("copies of a process for itself", "**options) if group.size() > 1 else None", "**options)"),
    ),
    *within(
        "parallel/cpu_shim.py",
        CUDA,
        ("a checkpoint's kernels loaded on CUDA", "            group |= kernel", "            pass"),
    ),
    *within(
        "training/adam.py",
        ADAM,
        ("remainders dropped", "    low.copy_(remainder)", "    low.zero_()"),
        ("a rounded weight not corrected by its remainder", " + (remainder >> 15))", ")"),
        ("a weight rounded down", ".copy_(high - (low >> 15))", ".copy_(high)"),
        (
            "the second moment in the dtype of the first",
            '"exp_avg_sq": exp_avg_sq_dtype}',
            '"exp_avg_sq": exp_avg_dtype}',
        ),
        ("moments of another dtype not stored", "            moment.copy_(computed)", "            pass"),
        ("a buffer filled before its weights have gone", "gone[number - 2].synchronize()", "pass"),
        ("a gradient read before it has come", "            come[number].synchronize()", "            pass"),
        ("weights that have not all gone", "        current.wait_stream(self._up)", "        pass"),
        ("the second buffer for every piece", "self._buffers[number % 2][0]", "self._buffers[-1][0]"),
        ("weight decay forgotten", 'weight_decay=group["weight_decay"]', "weight_decay=0.0"),
        ("the same step again", '            group["step"] += 1', "            pass"),
        ("a resumed run's count of steps", 'name != "params"}', 'name not in ("params", "step")}'),
        (
            "a remainder of other weights loaded",
            "                split(main, param[piece]",
            "                split(main, param[piece].clone()",
        ),
    ),
    *within(
        "training/engine.py",
        ADAM,
        ("norms of gradients in bfloat16", "if gradients[0].dtype == torch.bfloat16:", "if False:"),
        ("gradients of a smaller Adam not clipped", "norm, decoupled)", "norm, False)"),
    ),
    *within(
        "planning/memory.py",
        "tests/unit/test_rehearsal.py",
        ("memory that was freed counts on", "self.held[block.kind] -= block.size\n        self._total", "self._total"),
        ("what layers keep of collectives called communication", "keep((WORKING, COMMUNICATION)", "keep((WORKING,)"),
        ("gradients of the build called weights", "block.number < peak.blocks", "False"),
    ),
    *within(
        "planning/table.py",
        "tests/unit/test_rehearsal.py",
        ("the last pack rehearsed, not the largest", "if tokens > most:", "if True:"),
    ),
    *within(
        "planning/rehearse.py",
        "tests/unit/test_rehearsal.py",
        ("a first step without moments", "engines.update(optimizer, 1.0)", "pass"),
    ),
    *within(
        "planning/process.py",
        PLAN,
        (
            "copies of sequences that context parallelism shares",
            "/ self.context)\n        self.s =",
            ")\n        self.s =",
        ),
        ("no packs in flight but one", "return min(self.work.packs, self.stages - stage)", "return 1"),
    ),
    *within(
        "planning/estimate.py",
        PLAN,
        ("MLPs kept in tiles too", "return 0.0 if process.tiles else mlp_results", "return mlp_results"),
        ("experts as wide as the MLP", "rows + process.s * 20 * shape.experts", "process.s * 20 * shape.experts"),
    ),
    *within(
        "planning/cost.py",
        PLAN,
        ("operators started in no time", "max(computing, launching)", "computing"),
    ),
    *within(
        "planning/search.py",
        PLAN,
        (
            "layouts that training refuses are proposed",
            "            check_cut(request.hf_config",
            "            (request.hf_config",
        ),
    ),
    *within(
        "planning/candidate.py",
        PLAN,
        ("an option that was set is varied", "return name in self.config.explicit", "return False"),
        ("a save's copies take no memory", "+ self.kept_on_host + self.saved", "+ self.kept_on_host"),
    ),
    *within(
        "planning/choices.py",
        PLAN,
        ("more recomputed than is needed", "(low, middle) if self._fits", "(low, middle) if not self._fits"),
        ("choices beyond the host's memory", "<= limit and self._host", "<= limit or self._host"),
        (
            "the first choice that fits, not the cheapest",
            "if way is not None and",
            "if best is None and way is not None and",
        ),
        ("choices that training refuses", "self._accepted[key] = not options", "self._accepted[key] = True"),
    ),
    *within(
        "planning/plan_file.py",
        PLAN,
        ("the layout is not written", "return name in PLANNED and", "return False and"),
    ),
    *within(
        "conversion/random_start.py",
        CUDA,
        ("one piece on CUDA as large as the tensor", ".split(PIECE)", ".split(tensor.numel())"),
    ),
    *within(
        "api.py",
        API,
        ("the examples of another run overwritten", "fresh.read_bytes() != path.read_bytes()", "False"),
        ("the caller's config changed", "copy.deepcopy(getattr(config, name))", "getattr(config, name)"),
        ("a stopped run called finished", '["progress"]["steps"] == step', '["progress"]["steps"] > 0'),
        ("evaluation read as training", 'last[line["split"]] = line', 'last["train"] = line'),
    ),
    *within("config.py", API, ("options of a loss's earlier definition kept", "del OWNER[name]", "pass")),
    *within(
        "losses/registry.py",
        API,
        ("a loss's earlier definition kept", "LOSSES[name] = kind", "LOSSES.setdefault(name, kind)"),
    ),
    *within(
        "parallel/platform.py",
        "tests/distributed/test_python_runs.py",
        ("a second run finds the addresses of the first", "{next(_starts)}", "1"),
    ),
    *within(
        "benchmark/ratios.py",
        BENCHMARK,
        ("the slower called faster", "[b / a for a, b in zip(case.steps", "[a / b for a, b in zip(case.steps"),
        (
            "the update counted as work",
            'case.phase(number, "forward", "backward") / floor',
            "case.steps[number] / floor",
        ),
        (
            "one slow round fails",
            "ratio.high < before.low * (1 - tolerance)",
            "ratio.low < before.low * (1 - tolerance)",
        ),
        ("TRL with another recomputation", 'or of_case["recompute"] == trl.case["recompute"]', "or True"),
    ),
    *within(
        "benchmark/flops.py",
        "tests/functional/test_gpu_suite.py -k operations_are",
        (
            "attention without its causal half",
            "* causal_pairs(length, before + length)",
            "* length * (before + length)",
        ),
        (
            "responses that do not see their prompt",
            "causal_pairs(length, before + length)",
            "causal_pairs(length, length)",
        ),
    ),
    *within(
        "benchmark/flops.py",
        "tests/unit/test_batches.py -k windows",
        (
            "operations outside the windows counted",
            "windowed_pairs(length, before + length, window)",
            "causal_pairs(length, before + length + 0)",
        ),
    ),
    *within("benchmark/longest.py", BENCHMARK, ("a search that ends early", "WITHIN = 0.03", "WITHIN = 0.3")),
    *within(
        "benchmark/measure.py",
        BENCHMARK,
        ("another table kept", "return record if before == as_json(table) else None", "return record"),
    ),
    *within(
        "model/lora.py",
        LORA,
        ("LoRA's alpha left out of the scale", "alpha_of(model) / (sqrt", "1.0 / (sqrt"),
        (
            "gradients of an expert's replicated adapters not summed over its ranks",
            'if self.expert and (part == "a") == self.column:',
            "if False:",
        ),
        ("rank-stabilised scale left out", "if model.use_rslora else", "if False else"),
        ("adapters of k and v exchanged", "sum(parts.shares[:place]) * unit", "sum(parts.shares[place + 1 :]) * unit"),
        (
            "a replicated adapter's gradient not summed over ranks of sequence parallelism",
            '"sequence_parallel", self.sequence_parallel)',
            '"sequence_parallel", False)',
        ),
        (
            "gradient of A's result not summed over tensor-parallel ranks",
            "return copy_to_tensor_model_parallel_region(inner)",
            "return inner",
        ),
        (
            "no gradient in the first layers that are recomputed",
            "if settings.recompute_granularity is not None:",
            "if False:",
        ),
    ),
    *within(
        "model/tiled_mlp.py",
        LORA,
        (
            "a tile's gradient of this rank's rows alone passed through a frozen matrix",
            "gather_from_sequence_parallel_region(grad, group=self.tp_group) if self.gathers else grad",
            "grad.repeat(self.ranks, 1, 1) if self.gathers else grad",
        ),
    ),
    *within(
        "model/lora.py",
        DROPOUT,
        ("inputs dropped out in evaluation", "if not self.training or not self.dropout:", "if not self.dropout:"),
        (
            "tensor-parallel ranks drop the same of other inputs",
            "tracker.fork() if self.draws_apart else",
            "tracker.fork() if False else",
        ),
    ),
    *within(
        "model/tiled_mlp.py",
        DROPOUT,
        ("a tile drops others backward than forward", "with drawn_again(ctx.random):", "if True:"),
    ),
    *within(
        "training/engine.py",
        DROPOUT,
        ("every step drops the same", "SeedSequence([seed, step, pack,", "SeedSequence([seed, 0, pack,"),
    ),
    *within("model/lora.py", LORA_RUNS, ("the reference has the adapters", "adapter.enabled = False", "pass")),
    *within(
        "model/lora.py",
        "tests/unit/test_lora_families.py -k frozen",
        (
            "a frozen matrix multiplied with every token alone",
            "embeddings.flatten(0, 1).view(embeddings.shape)",
            "embeddings",
        ),
    ),
    *within(
        "conversion/adapters.py",
        "tests/unit/test_lora_families.py",
        ("rows of B in the folder's order", "parts.operators[number]))", "Rename()))"),
        (
            "adapters of a nested model named as those of a model alone",
            "    if outer_model_type(hf_config) is None:\n        return name",
            "    if True:\n        return name",
        ),
    ),
    *within(
        "planning/fewer_layers.py",
        "tests/unit/test_fewer_layers.py",
        ("missing layers added once", "getattr(other.work, name) * times +", "getattr(other.work, name) +"),
        ("layers of another kind added", "kinds[first + size :] == kinds[first:-size]", "kinds[-1] == kinds[first]"),
    ),
    *within(
        "planning/fake.py",
        "tests/unit/test_rehearsal.py -k repeats",
        ("chunks of a recurrence counted once", "repeats.times = times", "repeats.times = 1"),
    ),
    *within(
        "conversion/adapters.py",
        LORA_RUNS,
        ("adapters merged without their scale", "alpha=scale)", "alpha=1.0)"),
        ("rank-stabilised scale lost in PEFT's folder", '"use_rslora": options.use_rslora,', '"use_rslora": False,'),
    ),
    *within(
        "training/preflight.py",
        LORA_RUNS,
        ("adapters resumed beside another model", " or config.model.lora_rank is not None", ""),
    ),
    *within(
        "evaluation/scorers.py",
        TASKS,
        ("RULER's recall as a match of any answer", "return sum(matches) / len(matches)", "return float(any(matches))"),
        (
            "LongBench's F1 of folded spellings",
            "gold = Counter(normalise(answer, fold=False)",
            "gold = Counter(normalise(answer)",
        ),
        ("a choice without brackets read first", "(match for match in matches if match[1])", "iter(matches)"),
    ),
    *within(
        "evaluation/tasks/_task.py",
        TASKS,
        ("no tokens left for the response", "size - self.max_new_tokens)", "size)"),
    ),
    *within(
        "evaluation/tasks/ruler_needles.py",
        TASKS,
        ("a needle at a random depth", "if depth is None else [depth]", "if True else [depth]"),
    ),
    *within(
        "evaluation/server.py",
        SERVED,
        (
            "log-probs of the tokens before a choice",
            "read[length - count : length]",
            "read[length - count - 1 : length - 1]",
        ),
        ("answers on disk asked for again", " if number not in before], answer)", "], answer)"),
        ("the worst choice", "best = max(sorted(of_item)", "best = min(sorted(of_item)"),
        ("messages of another length", "prompt = item.chats[index] if", "prompt = item.chats[0] if"),
    ),
    *within(
        "data/sampling/client.py",
        SERVED,
        ("one request at a time", "range(self._options.concurrency)", "range(1)"),
    ),
    *within(
        "evaluation/intervals.py",
        "tests/unit/test_evaluation_intervals.py",
        ("McNemar's test one-sided", "min(1.0, 2 * tail / 2**discordant)", "min(1.0, tail / 2**discordant)"),
        ("the wrong model better", "other[question] - baseline[question]", "baseline[question] - other[question]"),
    ),
    *within(
        "evaluation/generation.py",
        "tests/unit/test_evaluation_generation.py",
        ("keys of a window taken for all", "type(layer) is DynamicLayer for", "isinstance(layer, DynamicLayer) for"),
    ),
    *within(
        "evaluation/scored.py",
        TASKS,
        ("a question counted once for each depth", "count=len(questions),", "count=len(answered),"),
    ),
    *within(
        "evaluation/contamination.py",
        TASKS,
        ("only whole prompts of the training data compared", "prompts += texts", "pass"),
    ),
    *within(
        "training/answers.py",
        ANSWERS,
        (
            "a draft's token kept unverified",
            "right = number < len(guess) and guess[number] == token",
            "right = number < len(guess)",
        ),
        ("no draft after a changed token", "return answer, guess[number + 1 :]", "return answer, guess[:0]"),
    ),
    *within(
        "training/best.py",
        ANSWERS,
        ("the highest loss is best", "sign = 1 if metric_of(self.metric).higher_is_better else -1", "sign = 1"),
        ("patience not reset", "self.step, self.value, self._without =", "self.step, self.value, _ ="),
    ),
    *within(
        "training/retention.py",
        ANSWERS,
        ("the best checkpoint deleted", "kept = {best, *newest,", "kept = {*newest,"),
    ),
    *within(
        "model/log_probs.py",
        "tests/distributed/test_answers.py",
        (
            "each tensor-parallel rank its own most likely token",
            "dist.all_reduce(places, op=dist.ReduceOp.MIN, group=group)",
            "pass",
        ),
    ),
    *within(
        "parallel/recurrence.py",
        DELTA,
        ("every response from the first prompt's state", "prompts[cast(int, pieces[n].prompt)]", "0"),
        (
            "the convolution of a response begins with zeros",
            "before = (tokens < 0) & (tokens >= -prompt.length)",
            "before = tokens < -len(tokens)",
        ),
        (
            "the prompt's padding before a response",
            "prompt.start + prompt.length + tokens",
            "prompt.start + prompt.slot + tokens",
        ),
    ),
    *within(
        "model/delta_rule.py",
        DELTA,
        (
            "a response from a state of zeros",
            "Scan.apply(layout.responses, states.index_select(0, layout.forks)",
            "Scan.apply(layout.responses, 0 * states[layout.forks]",
        ),
        ("the gradient of a state that is read", "of_state += query[chunks]", "of_state += 0 * query[chunks]"),
        ("the diagonal of a token's own scores", ".triu(1)", ".triu(0)"),
        ("a chunk's decay at its first token", "total[..., -1].exp()", "total[..., 0].exp()"),
    ),
    *within(
        "model/delta_net.py",
        RECURRENT,
        (
            "the norm's gradient of one rank's heads",
            "weight = copy_to_tensor_model_parallel_region(self.norm_weight)",
            "weight = self.norm_weight",
        ),
        (
            "the first heads' parameters on every context-parallel rank",
            "x.chunk(group.size())[group.rank()]",
            "x.chunk(group.size())[0]",
        ),
    ),
    *within(
        "model/latent_attention.py",
        PARITY,
        ("RoPE on halves", "torch.cat((x[..., ::2], x[..., 1::2]), -1)", "x"),
        ("norms of latents with the model's epsilon", "config.kv_lora_rank, EPSILON", "config.kv_lora_rank, 1e-5"),
    ),
    *within(
        "model/latent_attention.py",
        WITH_EXPERTS,
        (
            "the shared channels' gradient of one rank's heads",
            "gather_from_sequence_parallel_region(shared, group=self.tp_group)",
            "gather_from_sequence_parallel_region(shared, tensor_parallel_output_grad=False, group=self.tp_group)",
        ),
    ),
]
