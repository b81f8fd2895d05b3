#!/usr/bin/env bash
# The whole life of mini on one page: draw, train, evaluate, export. From nothing to the weights in mirada/assets/mini.
#
#   recipes/mini_speedrun.sh cpu            two cores, a few hours; PRECISION=bfloat16 where the CPU has avx512_bf16
#   recipes/mini_speedrun.sh gpu            one GPU; 8 processes draw
#
# Fonts and words come from Debian packages and from the package itself:
#   apt-get install fonts-dejavu fonts-liberation fonts-freefont-ttf fonts-open-sans fonts-roboto-unhinted fonts-lato \
#     fonts-cantarell fonts-crosextra-carlito fonts-crosextra-caladea fonts-hack fonts-inconsolata fonts-ebgaramond \
#     fonts-comic-neue fonts-noto-core fonts-firacode fonts-linuxlibertine
# Every stage resumes where it was stopped: run the same command again.
set -euo pipefail
cd "$(dirname "$0")/.."
size=${1:-cpu} run=${2:-runs/mini-${1:-cpu}} python=${PYTHON:-.venv/bin/python}
case $size in
    gpu) options=(--size gpu --run "$run" --device cuda --precision bfloat16 --workers 8) ;;
    *) options=(--size "$size" --run "$run" --precision "${PRECISION:-float32}") ;;
esac

[ -e "$run/base/tokenizer.json" ] || $python recipes/mini.py tokenizer "${options[@]}"
for stage in letters dense text projector reading all hold; do
    [ -e "$run/$stage.safetensors" ] || $python recipes/mini.py train "$stage" "${options[@]}"
done
$python recipes/mini.py export "${options[@]}" --out "$run/mini"
$python recipes/mini_eval.py --model "$run/mini" --samples 500 --card "$run/mini/card.json" | tee "$run/held_out.md"
