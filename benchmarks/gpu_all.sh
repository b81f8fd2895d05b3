#!/bin/sh
# All measurements that want a GPU, checks first, each with a limit of seconds: at most nine minutes together.
#
#     benchmarks/gpu_all.sh FOLDER [PYTHON]
#
# FOLDER gets a JSON file and a log of each. Exit status 1: one failed, stopped at its limit, or missed its goal; the others ran.
# Needs torch with CUDA and triton, and for the ratio transformers; the package need not be installed, nor is there a download.
set -u
folder=${1:?usage: benchmarks/gpu_all.sh FOLDER [PYTHON]}
python=${2:-python3}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$folder" || exit 1
folder=$(cd "$folder" && pwd)
export PYTHONPATH="$here/..:$here/../tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
unset TRITON_INTERPRET MIRADA_GPU_KERNELS
failed=0

measure() { # seconds name arguments...
    limit=$1 name=$2
    shift 2
    began=$(date +%s)
    timeout "$limit" "$python" "$here/$name.py" "$@" >"$folder/$name.log" 2>&1
    status=$?
    tail -n 40 "$folder/$name.log"
    echo "== $name: exit $status after $(($(date +%s) - began)) s of $limit"
    [ $status -eq 0 ] || failed=1
}

measure 130 gpu_kernels --json "$folder"
measure 60 gpu_parity
measure 150 gpu_decode --json "$folder"
measure 70 gpu_prefill --json "$folder"
measure 130 gpu_throughput --json "$folder"
exit $failed
