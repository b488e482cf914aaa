#!/usr/bin/env bash
# Set up .venv, lint, and run the tests. Arguments go to pytest: bash run_tests.sh tests/test_log.py -k plain
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
bash tools/setup_env.sh --dev
python=.venv/bin/python

"$python" -m ruff check .
"$python" -m ruff format --check .

# Two test processes share the cores: without a limit each would start one thread per core.
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} # no spinning between operations: there are always more threads than cores
exec "$python" -m pytest -n 2 --dist loadfile "$@"
