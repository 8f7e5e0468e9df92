"""Results of evaluations and metrics of runs, as files that a report reads."""

import json

from megatron_solopo.evaluation.intervals import wilson_interval


def write_evaluation(path, scores, count=100, model="runs/model", unit="documents", data="questions.jsonl", **settings):
    """An evaluation file with the same score for every metric; ``scores`` is {length: score}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics = {}
    for length, score in scores.items():
        interval = list(wilson_interval(score, count))
        metrics[f"{length} {unit}"] = {
            "sub_em": score,
            "em": score,
            "f1": score,
            "count": count,
            "mean_prompt_tokens": 5.0 * length,
            "interval": {"sub_em": interval, "em": interval, "f1": interval},
        }
    path.write_text(json.dumps({"model": model, "data": data, "metrics": metrics, "settings": {"seed": 0, **settings}}))
    return path


def write_run(folder, steps=60, offset=0.0, preference=True):
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w") as out:
        for step in range(1, steps + 1):
            record = {
                "step": step,
                "loss": 2.0 / step + offset,
                "tokens": 100,
                "seconds": 0.5,
                "memory_gib": 1.0 + step / 100,
            }
            if preference:
                record |= {
                    "margin": step / 10 + offset,
                    "accuracy": step / steps,
                    "short_long_gap_nats_per_token": 1.0 / step,
                }
            out.write(json.dumps(record) + "\n")
            if step % 20 == 0:
                out.write(json.dumps({**record, "split": "valid"}) + "\n")
    return folder
