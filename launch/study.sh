#!/usr/bin/env bash
# Makes the data of a study, all its runs and their table; goes on where it was interrupted.
#   launch/study.sh PYTHON generated              e.g. launch/study.sh .venv/bin/python generated
#   launch/study.sh PYTHON real DATA              DATA: the folder of the samples that docs/results.md names
# Runs are made side by side, one a core (JOBS=n: so many).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 study=$2
folder=runs/study
jobs=${JOBS:-$(nproc)}

scenes() {
  [ -e "$folder/scenes/tokenizer.json" ] || "$python" -m data_pipelines.scenes --output="$folder/scenes" --level=full \
    --captions=20000 --interleaved=10000 --text=4000 --held_out=1000 --questions=10
}

convert() {
  [ -e "$folder/samples/$1" ] || "$python" -m data_pipelines.convert --output="$folder/samples/$1" "${@:2}"
}

samples() {
  convert captions --format=webdataset --input="$1/captions/*.tar" --held_out=0.1
  convert interleaved --format=obelics --input="$1/interleaved/18f-blog.obelics.parquet" --held_out=0.1
  convert text --format=jsonl --input="$1/text/openstax-biology-text.jsonl.zst" --held_out=0.1
  [ -e "$folder/samples/tokenizer.json" ] || "$python" -m data_pipelines.tokenizer train --vocab_size=512 \
    --input="$folder/samples/captions,$folder/samples/interleaved,$folder/samples/text" \
    --output="$folder/samples/tokenizer.json"
}

case $study in
  generated) scenes ;;
  real) samples "${3:?give the folder of the samples: launch/study.sh PYTHON real DATA}" ;;
  *) echo "study $study has no data of its own; make its data.root, then run nmm_jax.scaling.sweep" >&2 && exit 2 ;;
esac
"$python" -m nmm_jax.scaling.sweep --config="configs/study.py:$study" --folder="$folder/$study" --jobs="$jobs"
