"""Cloud TPU queued resources: a script that asks for a pod, runs on all its workers, and asks again when it is taken (host)."""

from __future__ import annotations

from collections.abc import Sequence

from launch.plan import File, Plan, Process
from launch.script import quote, quote_path, tied_to_input, worker_script
from launch.target import QueuedTarget


def plan_queued(target: QueuedTarget, words: Sequence[str]) -> Plan:
    path = f"runs/launch/{target.name}.sh"
    title = f"tpu-queued: {target.accelerator} in {target.zone}"
    return Plan(title, (File(path, _script(target, words)),), (Process(target.name, ("bash", path), {}),))


def _script(target: QueuedTarget, words: Sequence[str]) -> str:
    return "\n".join(["#!/bin/bash", "set -uo pipefail", _settings(target), _functions(target, words), LOOP])


def _settings(target: QueuedTarget) -> str:
    return f"""NAME={target.name}
PLACE=(--project={target.project} --zone={target.zone})
ARCHIVE=runs/launch/{target.name}.tar.gz
POLL={target.poll_s}
RESTARTS={target.restarts}
REFUSED=3 # at first a matter of quota or of rights, later perhaps of a deletion under way
"""


def _functions(target: QueuedTarget, words: Sequence[str]) -> str:
    """What is committed is what runs: the archive is of HEAD."""
    env = {"SIF_JAX_DISTRIBUTED": "auto"} | target.env
    run = tied_to_input(worker_script((*target.program, *words), env, workdir=target.workdir))
    lines = (f"set -euo pipefail\nmkdir -p {quote_path(target.workdir)}", f"cd {quote_path(target.workdir)}")
    unpack = f'tar -xzf "$HOME/{target.name}.tar.gz"'
    setup = "\n".join([*lines, unpack, f"BUCKET={target.bucket}", *target.setup])
    spot = " --spot" if target.spot else ""
    return f"""create() {{
  gcloud compute tpus queued-resources create "$NAME" "${{PLACE[@]}}" --node-id="$NAME" \\
    --accelerator-type={target.accelerator} --runtime-version={target.runtime}{spot}
}}
state() {{
  local answer
  if answer=$(gcloud compute tpus queued-resources describe "$NAME" "${{PLACE[@]}}" --format='value(state.state)' 2>&1); then
    echo "$answer"
  elif [[ $answer == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo UNKNOWN # the network, or a login that ran out
  fi
}}
remove() {{
  [ "$(state)" = NONE ] || gcloud compute tpus queued-resources delete "$NAME" "${{PLACE[@]}}" --force --quiet
}}
on_all_workers() {{
  gcloud compute tpus tpu-vm ssh "$NAME" "${{PLACE[@]}}" --worker=all --command="$1" --quiet
}}
set_up() {{
  gcloud compute tpus tpu-vm scp "$ARCHIVE" "$NAME":{target.name}.tar.gz "${{PLACE[@]}}" --worker=all --quiet &&
    on_all_workers {_remote(setup)}
}}
run() {{
  on_all_workers {_remote(run)}
}}
"""


def _remote(script: str) -> str:
    """One word for the local shell, which the worker's shell reads as `bash -c` and one word."""
    return quote(f"bash -c {quote(script)}")


# Exit code 2 of the program is bad input, which a second try meets again; 75, a run that was preempted, is tried again as
# failures are. gcloud passes the code of a worker on. A pod that is
# still ACTIVE after a failure is used again. Whatever happens, the queued resource is deleted in the end, and with it the bill.
LOOP = """wait_until_active() {
  while :; do
    case "$(state)" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | NONE) return 1 ;;
    esac
    sleep "$POLL"
  done
}
prepare() {
  if [ "$(state)" != ACTIVE ]; then
    remove
    create || return $REFUSED
    wait_until_active || return 1
  fi
  set_up
}
stop() {
  trap - EXIT INT TERM
  remove
  exit "$1"
}

if [ "$(state)" != NONE ]; then
  echo "error: is the name $NAME free? fix: log in; delete that queued resource; or change name: in the target" >&2
  exit 2
fi
trap 'stop 143' TERM
trap 'stop 130' INT
trap 'stop $?' EXIT
git archive --format=tar.gz -o "$ARCHIVE" HEAD || exit 1
ready=no
for attempt in $(seq 0 "$RESTARTS"); do
  echo "attempt $attempt" >&2
  if [ $ready = no ] || [ "$(state)" != ACTIVE ]; then
    ready=no
    prepare
    case $? in
      0) ready=yes ;;
      "$REFUSED") [ "$attempt" != 0 ] || { echo "error: the request was refused, see above" >&2; exit 1; } ;;
    esac
  fi
  if [ $ready = yes ]; then
    run
    code=$?
    case $code in
      0 | 2) exit "$code" ;;
    esac
    echo "exit code $code, the queued resource is $(state)" >&2
  fi
  sleep "$POLL"
done
echo "error: given up after $RESTARTS restarts" >&2
exit 1
"""
