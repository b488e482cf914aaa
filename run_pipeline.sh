#!/usr/bin/env bash
# From photos, with cameras or without, to a clean 3D Gaussian Splatting scene: sets up .venv, runs stages 0-3 and the evaluation.
# Without arguments: the demo scene. Run it again to go on after an interruption; what is finished is not done again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$root/.venv/bin/python

usage() {
  cat <<'TEXT'
usage: bash run_pipeline.sh [-s SCENE] [-m OUT] [options]

  -s SCENE               COLMAP scene (images/, sparse/0), a folder with transforms.json,
                         or a folder of 3 to 30 photos without cameras                       [demo/study]
  -m OUT                 output folder, an ordinary 3DGS model folder                        [out/<name of SCENE>]
  --keep-every N         keep every Nth photo as input
  --keep-indices I,J,..  keep these photos (positions in name order)
  --keep-count K         keep K photos, evenly spaced                                        [demo scene: 6]
  --eval                 hold every 8th photo out for the evaluation alone
  --all-images           photos without cameras: find the cameras with the test photos, too
  --test-every N         with --eval: every Nth instead of every 8th
  --novel MODE           where to make pseudo views: auto, given, coverage, interpolate, orbit, perturb
  --num-novel N          how many, where they are not given                                  [24]
  --rounds N             render, fix and optimise in N rounds, further out each time         [1]
  --support              also show what photos hold up and what was made up
  --preset NAME          settings from configs/<script>/NAME.yaml
  --device DEVICE        cpu (or cuda, where supported)
  --seed N               seed of everything random                                           [0]
  --overwrite            rebuild what was made with other settings
TEXT
}

refuse() {
  printf 'error: %s\n\n' "$1" >&2
  usage >&2
  exit 2
}

scene='' out='' preset=''
views=()   # for stage 0 alone: what is kept, novel and test
common=()  # for every stage
device=()  # for the evaluation, which takes no more of what the stages have in common
seed=()    # for the stages that draw random numbers
train=()   # for the stages that optimise
rounds=1
while [ $# -gt 0 ]; do
  flag=$1
  shift
  case $flag in # --flag=value and --flag_name as in the stages
    --*=*)
      set -- "${flag#*=}" "$@"
      flag=${flag%%=*}
      ;;
  esac
  case $flag in --*) flag=${flag//_/-} ;; esac
  case $flag in
    -h | --help)
      usage
      exit 0
      ;;
    --eval | --all-images) views+=("$flag") && continue ;;
    --overwrite) common+=("$flag") && continue ;;
    --support) train+=("$flag") && continue ;;
    -s | -m | --source | --model-dir | --keep-every | --keep-indices | --keep-count | --test-every | --novel | --num-novel | --rounds | --preset | --device | --seed) ;;
    *) refuse "unknown argument $flag" ;;
  esac
  case ${1:-} in '' | --* | -[a-z]) refuse "$flag needs a value" ;; esac
  value=$1
  shift
  case $flag in
    -s | --source) scene=$value ;;
    -m | --model-dir) out=$value ;;
    --preset) preset=$value ;;
    --rounds)
      [[ $value =~ ^[1-9][0-9]*$ ]] || refuse "--rounds needs a number from 1 on, got $value"
      rounds=$value
      ;;
    --device) common+=("$flag" "$value") device=("$flag" "$value") ;;
    --seed) seed=("$flag" "$value") ;;
    --keep-indices) # positions may also be separated by spaces
      while [[ ${1:-} =~ ^[0-9,]+$ ]]; do
        value=$value,$1
        shift
      done
      views+=("$flag" "$value")
      ;;
    *) views+=("$flag" "$value") ;;
  esac
done

if [ -z "$scene" ]; then
  scene=$root/demo/study
  : "${out:=$root/out/demo}"
  case " ${views[*]-} " in *' --keep-'*) ;; *) views+=(--keep-count 6) ;; esac
fi
[ -e "$scene" ] || refuse "no such scene: $scene"
: "${out:=out/$(basename "$(cd "$(dirname "$scene/.")" && pwd)")}"

if [ -n "$preset" ] && ! compgen -G "$root/configs/*/$preset.yaml" >/dev/null; then
  known=$(cd "$root/configs" && for file in */*.yaml; do basename "$file" .yaml; done | sort -u | paste -sd ' ' -)
  refuse "unknown preset $preset; there is: $known"
fi

# Each step is a job of its own process group, so that one signal ends it with all its children, and none is left behind.
set -m
child=''
stop() {
  trap '' INT TERM HUP
  if [ -n "$child" ]; then
    kill -TERM -- "-$child" 2>/dev/null || true # not INT: what a shell starts in the background ignores that
    wait "$child" 2>/dev/null || true
  fi
  printf '\nStopped. The same command goes on from where it was.\n' >&2
  exit 130
}
trap stop INT TERM HUP

run() {
  local code=0
  "$@" </dev/null &
  child=$!
  wait "$child" || code=$?
  child=''
  if [ "$code" != 0 ]; then
    [ "$code" = 130 ] && stop
    if [ "$code" -gt 128 ]; then # killed, or crashed: it had no time to say so itself
      printf 'error: %s was ended by signal %d (9: most likely out of memory). The same command goes on from where it was.\n' "$(basename "$2")" $((code - 128)) >&2
    fi
    exit "$code"
  fi
}

stage() {
  local script=$1
  shift
  local arguments=("$@" ${common[@]+"${common[@]}"})
  if [ -n "$preset" ] && [ -f "$root/configs/$script/$preset.yaml" ]; then
    arguments+=(--preset "$preset")
  fi
  printf '\n== %s\n' "$script" >&2
  run "$python" "$root/$script.py" "${arguments[@]}"
}

# torch's workers sleep between operations instead of spinning on the cores that the kernels' threads need.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}

SECONDS=0
run bash "$root/tools/setup_env.sh"
stage stage0_point_guidance -s "$scene" -m "$out" ${views[@]+"${views[@]}"} ${seed[@]+"${seed[@]}"}
stage stage1_3dgs_init -s "$scene" -m "$out" ${seed[@]+"${seed[@]}"} ${train[@]+"${train[@]}"}
for number in $(seq "$rounds"); do
  round=()
  if [ "$rounds" -gt 1 ]; then round=(--round "$number/$rounds"); fi
  stage stage2_artifact_fix -s "$scene" -m "$out" ${round[@]+"${round[@]}"}
  stage stage3_3dgs_mixed_opt -s "$scene" -m "$out" ${seed[@]+"${seed[@]}"} ${train[@]+"${train[@]}"} ${round[@]+"${round[@]}"}
done
printf '\n== evaluate\n' >&2
run "$python" "$root/tools/evaluate.py" -s "$scene" -m "$out" ${device[@]+"${device[@]}"}

splat=$(ls -d "$out"/point_cloud/iteration_*/point_cloud.ply | sort -V | tail -n 1)
printf '\nDone in %d min %02d s.\n  report  %s\n  splat   %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$out/report.html" "$splat"
