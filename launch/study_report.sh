#!/usr/bin/env bash
# From a study's table of results to its fits, figures and page; nothing is trained.
#   launch/study_report.sh PYTHON TABLE OUTPUT [HELD_OUT]
#   launch/study_report.sh .venv/bin/python docs/scaling_study/generated.csv runs/study/report 'size==w96'
# OUTPUT gets ARCHITECTURE.json of each architecture in the table, figures/ and report.html. HELD_OUT: a condition on
# the rows that are predicted and not fitted.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 table=$2 output=$3
held_out=${4:-size==w96}
mkdir -p "$output"

fits=()
for architecture in $(tail -n +2 "$table" | cut -d, -f2 | sort -u); do
  law=(--law=dense)
  [ "$architecture" = late ] && law=(--law=late --n_vision=n_vision --d_vision=d_vision)
  "$python" -m nmm_jax.scaling.fit --runs="$table" --where="architecture==$architecture" "${law[@]}" --n=n --d=d \
    --compute=c --loss=loss_captions,loss_interleaved,loss_text --held_out="$held_out" --bootstrap=200 \
    --output="$output/$architecture.json" | tee "$output/$architecture.txt"
  fits+=("--fit=$output/$architecture.json")
done
"$python" -m nmm_jax.scaling.plot "${fits[@]}" --output="$output/figures"
"$python" -m nmm_jax.scaling.report --runs="$table" "${fits[@]}" --output="$output/report.html" \
  --title="$(basename "$table" .csv)"
