#!/usr/bin/env bash
# The runs of this folder, one after another; started again, it skips those that are finished and continues the others.
#   taskset -c 0 bash experiments/time-to-loss/run.sh gpt OUT [PATTERN]
#   taskset -c 1 bash experiments/time-to-loss/run.sh cifar10 OUT [PATTERN] --data-dir DATA
# OUT gets a folder per run; PATTERN (a regular expression) chooses runs by their names. PYTHON is the interpreter.
set -uo pipefail
what=${1:?gpt or cifar10} out=${2:?the folder for the runs} pattern=${3:-.}
shift $(( $# < 3 ? $# : 3 ))
# One core computes, and freed memory stays with the process, as fr_jax.launch sets it.
export NPROC=2 GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:glibc.malloc.trim_threshold=68719476736:glibc.malloc.top_pad=268435456}

runs_cifar10() {
  for seed in 0 1; do
    echo "ddg-K4-M4-pred-seed$seed --method ddg --K 4 --microbatches 4 --weight-prediction 1 --seed $seed"
    echo "bp-M4-seed$seed --method bp --K 1 --microbatches 4 --seed $seed"
    echo "fr-K4-M4-pred-seed$seed --method fr --K 4 --microbatches 4 --weight-prediction 1 --seed $seed"
    echo "bp-M1-seed$seed --method bp --K 1 --microbatches 1 --seed $seed"
  done
}

gpt() {  # optimizer rate steps seed method K M prediction
  local warmup=200 name=$5-K$6-M$7 own=""
  (( $3 < 1000 )) && warmup=100
  [[ $8 == 1 ]] && name+=-pred
  case $5 in
    bp) name=bp ;;
    fr | ddg) own=" --weight-prediction $8" ;;
  esac
  echo "$1/$name-$3-lr$2-seed$4 --optimizer $1 --learning-rate $2 --steps $3 --warmup $warmup --seed $4 --method $5 --K $6 --microbatches $7$own"
}

runs_gpt() {
  local rate seed steps other
  # Back-propagation's curve, and the rates of short runs.
  for rate in 0.006 0.012 0.024; do gpt muon $rate 500 0 bp 1 1 0; done
  for rate in 0.012 0.024; do gpt muon $rate 500 0 fr 8 8 1; done
  for rate in 0.006 0.012; do
    for steps in 1000 1500; do gpt muon $rate $steps 0 bp 1 1 0; done
  done
  for rate in 0.003 0.006; do
    gpt adamw $rate 500 0 bp 1 1 0
    gpt adamw $rate 500 0 fr 8 8 1
  done
  gpt adamw 0.006 1000 0 bp 1 1 0
  # The rates of runs of 2,000 updates.
  for other in "muon 0.006" "muon 0.012" "muon 0.024" "adamw 0.003" "adamw 0.006"; do
    gpt $other 2000 0 bp 1 1 0
    gpt $other 2000 0 ddg 8 8 1
    gpt $other 2000 0 fr 8 8 1
  done
  # Three seeds.
  for rate in 0.006 0.012; do
    for seed in 0 1 2; do
      gpt muon $rate 2000 $seed bp 1 1 0
      gpt muon $rate 2000 $seed ddg 8 8 1
      gpt muon $rate 2000 $seed fr 8 8 1
      gpt muon $rate 2000 $seed ddg 4 4 1
      gpt muon $rate 2000 $seed fr 4 4 1
    done
  done
  # Other numbers of micro-batches, no prediction, PipeDream-2BW.
  gpt muon 0.012 2000 0 ddg 8 16 1
  gpt muon 0.012 2000 0 2bw 8 8 0
  gpt muon 0.012 2000 0 ddg 8 8 0
  gpt muon 0.012 2000 0 fr 8 8 0
  gpt muon 0.012 2000 0 ddg 8 1 1
  gpt muon 0.012 2000 0 fr 8 1 1
  # Long runs.
  gpt muon 0.006 8000 0 bp 1 1 0
  gpt muon 0.006 10000 0 bp 1 1 0
  gpt muon 0.006 10000 0 ddg 8 8 1
  gpt muon 0.006 10000 0 fr 8 8 1
}

case $what in
  cifar10)
    program="cifar --model resnet20 --dataset cifar10 --epochs 12 --batch-size 128 --learning-rate 0.1 --warmup 391 --devices 1" ;;
  gpt)
    program="lm --depth 8 --width 64 --heads 4 --context 64 --batch-size 16 --schedule cosine --weight-decay 0.1 --clip 1 --devices 1"
    program+=" --test-examples 512 --eval-every 500 --checkpoint-every 500 --log-every 25" ;;
  *) echo "run.sh: $what is neither gpt nor cifar10" >&2; exit 2 ;;
esac

runs_"$what" | {
  failed=0
  while read -r name flags; do
    [[ $name =~ $pattern && ! -e $out/$name/summary.json ]] || continue
    resume=""
    [[ -e $out/$name/config.json ]] && resume=--resume
    echo "== $name"
    # shellcheck disable=SC2086
    "${PYTHON:-python}" -m fr_jax.experiments.$program $flags "$@" --workdir "$out/$name" $resume </dev/null && continue
    failed=$?
    echo "run.sh: $name ended with $failed" >&2
    (( failed == 130 || failed == 143 )) && break # asked to stop
  done
  exit $failed
}
