#!/usr/bin/env bash
# From the corpus in examples/data to a trained model: tokenizer, indexed binaries, training with two processes that is
# stopped half-way and resumed, curves, a Hugging Face folder and a sample of text. `make demo` runs it inside .venv;
# everything goes to runs/demo.
set -euo pipefail
cd "$(dirname "$0")/.."

out=runs/demo
recipe=examples/recipes/demo.yaml
export OMP_NUM_THREADS=1 # two processes share two cores

rm -rf "$out"
mkdir -p "$out/data"

echo "== tokenizer and indexed binaries"
python -m tools.preprocess.train_tokenizer --input examples/data/corpus.jsonl.xz --output "$out/data/tokenizer" \
    --vocab-size 4096
python -m tools.preprocess.tokenize_corpus --input examples/data/corpus.jsonl.xz --tokenizer "$out/data/tokenizer" \
    --output-prefix "$out/data/all" --append-eod --workers 2
python -m tools.preprocess.split_dataset "$out/data/all" --shares 95,5 --output-dir "$out/data"

echo "== training, tensor parallelism over 2 processes with sequence parallelism; stops half-way"
train="torchrun --standalone --nproc-per-node 2 examples/pretrain.py --config $recipe"
train="$train data.tokenizer=$out/data/tokenizer"
$train training.exit_after_steps=90

echo "== training goes on from the checkpoint"
$train --resume

echo "== result"
python examples/demo_report.py --config "$out/config.yaml"

echo "== Hugging Face folder, and text"
python -m tools.convert.megatron_to_hf --checkpoint "$out" --output "$out/hf" --format qwen3_5_text
python -m tools.convert.verify "$out" "$out/hf" # transformers loads it, and its logits are ours
python examples/generate.py --checkpoint "$out" --prompt "The server" --max-new-tokens 40
