#!/bin/sh
# Check, measure and train on a GPU: benchmarks/on_gpu.sh check|serve|train OUT [OPTIONS]. benchmarks/on_gpu.py explains
# it. It needs no installation: Python finds packages that are missing in the folders of PYTHONPATH.
cd "$(dirname "$0")/.." || exit
PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m benchmarks.on_gpu "$@"
