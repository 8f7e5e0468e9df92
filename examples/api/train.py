"""SoLoPO from Python, on one example of invented text: python examples/api/train.py MODEL (a Hugging Face folder)."""

import sys

from megatron_solopo import Config, PreferenceGroup, evaluate, train

question, fact = "Where is the Louvre?", "The Louvre is in Paris."
noise = [f"Shelf {number} holds a lamp." for number in range(30)]
short = [{"role": "user", "content": f"{fact} {question}"}]  # the evidence alone
long = [{"role": "user", "content": f"{' '.join(noise)} {fact} {question}"}]  # the evidence among distractors
group = PreferenceGroup("louvre", short, long, chosen="In Paris.", rejected="On a shelf.")

options = dict(preference_loss="orpo", train_iters=10, global_batch_size=1, seq_length=2048, lr=1e-4)
config = Config.from_options(hf_path=sys.argv[1], train_data=[group], save="runs/api", save_hf="runs/api-hf", **options)
result = train(config)  # under torchrun: on all its processes
print(f"{result.checkpoint}: loss {result.metrics['loss']:.3f}, margin {result.metrics['margin']:.3f}")

documents = [{"text": fact, "is_supporting": True}, *({"text": text} for text in noise)]
asked = [{"question": question, "answer": "Paris", "documents": documents}]
scores = evaluate("runs/api-hf", asked, source="jsonl", context_documents=[1, 31], max_new_tokens=8)
print({length: values["sub_em"] for length, values in scores.metrics.items()})
