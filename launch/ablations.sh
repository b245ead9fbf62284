#!/usr/bin/env bash
# Converts the sample data, makes synthetic captions of it, and trains and evaluates all runs of configs/ablations.py.
# What is there already is left as it is, so the same command goes on after an interruption.
#   launch/ablations.sh PYTHON DATA [RUNS]      e.g. launch/ablations.sh .venv/bin/python DATA 'base,encoder-*'
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 from=$2 runs=${3:-*}
folder=runs/ablations
data=$folder/data both=$folder/data-synthetic

convert() {
  [ -e "$data/$1" ] || "$python" -m data_pipelines.convert --output="$data/$1" "${@:2}"
}
convert captions --format=webdataset --input="$from/captions/*.tar" --held_out=0.1
convert emoji --format=image_text_parquet --input="$from/captions/openmoji.parquet" --held_out=0.1
convert interleaved --format=obelics --input="$from/interleaved/18f-blog.obelics.parquet" --held_out=0.1
convert text --format=jsonl --input="$from/text/*.jsonl.gz,$from/text/*.jsonl.zst" --held_out=0.05
[ -e "$data/tokenizer.json" ] || "$python" -m data_pipelines.tokenizer train --vocab_size=2048 \
  --input="$data/captions,$data/emoji,$data/interleaved,$data/text" --output="$data/tokenizer.json"

mkdir -p "$both"
for source in captions emoji; do
  [ -e "$both/$source" ] && continue
  "$python" launch/caption_by_colour.py --input="$data/$source" --output="$both/$source.jsonl"
  "$python" -m data_pipelines.recaption --input="$data/$source" --captions="$both/$source.jsonl" --output="$both/$source"
done
for same in interleaved text tokenizer.json; do
  [ -e "$both/$same" ] || ln -s "../data/$same" "$both/$same"
done

[ -e runs/scenes/tokenizer.json ] || "$python" -m data_pipelines.scenes --output=runs/scenes --level=quickstart
# Many runs are the same program on other data or from other weights: it is compiled once.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$folder/compiled}
"$python" -m nmm_jax.sweep --config=configs/ablations.py --folder="$folder" --runs="$runs"
