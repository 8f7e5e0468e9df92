#!/usr/bin/env bash
# The demo's data once more, through a server: responses from `transformers serve`, pairs, token ids, a page to look at,
# and a training run on the result. Needs a finished demo (`make demo` or `QUICK=1 make demo`); takes a few minutes.
#
#   source .venv/bin/activate
#   bash examples/quickstart/served.sh runs/demo runs/served
set -euo pipefail
demo=${1:?usage: served.sh DEMO_FOLDER OUTPUT_FOLDER} out=${2:?usage: served.sh DEMO_FOLDER OUTPUT_FOLDER}
model=$(realpath "$demo/base-hf")
port=${PORT:-8765}
mkdir -p "$out"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

transformers serve "$model" --host 127.0.0.1 --port "$port" --device cpu >"$out/server.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null || true' EXIT
until grep -q "Uvicorn running" "$out/server.log"; do
    kill -0 $server 2>/dev/null || { tail -n 5 "$out/server.log" >&2; exit 1; }
    sleep 0.2
done

solopo sample-responses --server "http://127.0.0.1:$port/v1" --model "$model" --contexts "$demo/contexts.jsonl" \
    --limit 100 --samples 8 --max-new-tokens 4 --concurrency 8 --output "$out/responses.jsonl" --overwrite
kill $server
head -n 100 "$demo/contexts.jsonl" >"$out/contexts.jsonl"
solopo build-pairs --contexts "$out/contexts.jsonl" --responses "$out/responses.jsonl" --tokenizer "$model" \
    --output "$out/groups.parquet"
solopo inspect-data --data "$out/groups.parquet" --tokenizer "$model" --output "$out/groups.html"
rm -rf "$out/tokens"
solopo tokenize-data --data "$out/groups.parquet" --tokenizer "$model" --output "$out/tokens" --workers 2
torchrun --standalone --nproc_per_node 2 pretrain_solopo.py --hf-path "$model" --train-data "$out/tokens" \
    --preference-loss orpo --train-epochs 4 --global-batch-size 8 --micro-batch-size 4 --seq-length 512 --lr 3e-4 \
    --device cpu --save "$out/solo" --save-hf "$out/solo-hf" --overwrite
