#!/bin/sh
# All bundles of a recipe, from speech to bundles under out/: `sh configs/train-bundles.sh compact` (two CPU cores, hours)
# or `full_size` (a GPU). Wants training speech in data/speech. The same command goes on where it was stopped.
set -eu
trap 'exit 130' INT TERM
size=$1 recipe=configs/$1/recipe.toml
[ -f "$recipe" ] || { echo "$recipe: no such file; give compact or full_size" >&2; exit 2; }
[ -d data/speech ] || { echo "data/speech: no such folder; put or link the training speech there" >&2; exit 2; }

dataset="kb-make-dataset --sofa samples/hrtf/mit_kemar_normal_pinna.sofa --absorption 0.3 0.8"
$dataset --responses-only --rooms 400 --anechoic 1 --seed 11 --output data/anechoic
$dataset --responses-only --rooms 1200 --anechoic 0.25 --seed 12 --output data/rooms
for task in ss tse; do
    $dataset --seed 2026 --anechoic 0.25 --val 200 --speech samples/speech/valid --task $task --output data/valid-$task
done
# Four voices of every speaker's, for target speech extraction.
[ -d data/voices ] || kb-make-voices --speech data/speech --output data/voices --seed 14

sed -n 's/^\[stages\.\(.*\)\]$/\1/p' "$recipe" | while read -r stage; do
    run=runs/$size/$stage
    # Going on with a run that has ended changes nothing.
    if [ -e "$run/last.ckpt" ]; then resume=--resume; else resume=; rm -rf "$run"; fi
    kb-train --config "$recipe" --stage "$stage" --run-dir "$run" $resume </dev/null
done
for bundle in ss-alone ss-48ms tse-alone tse-48ms; do
    run=runs/$size/$bundle
    rm -rf "out/$size/$bundle"
    kb-export --config "$run/config.json" --checkpoint "$run/last.ckpt" --half-speaker \
        --note "configs/$size/card.md" --output "out/$size/$bundle"
done
