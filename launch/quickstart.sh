#!/usr/bin/env bash
# The whole road on a laptop: a corpus, a trained model, a restored checkpoint, an evaluation, a report page.
#   launch/quickstart.sh PYTHON CONFIG RUNS      e.g. launch/quickstart.sh .venv/bin/python quickstart:long runs
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 config=$2 runs=$3
name=${config/:/-}
family=${config%%:*} variant=${config#*:}
[ "$variant" = "$config" ] && variant=""
corpus=$runs/$name-corpus run=$runs/$name

start=$SECONDS
step() { printf '\n== %s (%d s so far)\n' "$1" $((SECONDS - start)); }

documents=(--captions=12000 --interleaved=6000 --text=2500)
[ "$variant" = long ] && documents=(--captions=40000 --interleaved=20000 --text=8000)

step "1/5 generate the corpus: $corpus"
[ -e "$corpus/tokenizer.json" ] || "$python" -m data_pipelines.scenes --output="$corpus" --level=quickstart "${documents[@]}"
step "2/5 train: $run"
"$python" -m nmm_jax.train --config="configs/$family.py${variant:+:$variant}" --config.data.root="$corpus" --workdir="$run"
step "3/5 restore the last checkpoint in a new process and evaluate it"
"$python" -m nmm_jax.evaluate --workdir="$run"
step "4/5 generate"
"$python" -m nmm_jax.generate --workdir="$run" --prompt="<image>" --image="$corpus/sample.png"
step "5/5 report"
"$python" -m nmm_jax.report --workdir="$run"
printf '\nDone in %d s. Open %s/report.html\n' $((SECONDS - start)) "$run"
