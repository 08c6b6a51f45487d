"""Clusters: what is rendered for SLURM, GKE and TPU pods is well formed, and behaves as it should under stand-ins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import PLANNERS
from launch.gke import job_set
from launch.plan import File
from launch.script import PREEMPTED_ENV
from launch.target import load_target
from sif_jax.errors import InputError
from tests.launch_targets import COMMAND, ROOT, fake_command, fake_path, probe, probed, write_target

WORDS = (*COMMAND, "data.image_root=it's [a] $HOME $(id) `id`", "data.buckets.tokens=[16, 32]")
NAME = f"from-a-test-{os.getpid()}"  # the files of tests that run beside each other lie in one folder
SETUP = ["echo 'set up' # $x", '[ -n "$HOME" ] || { echo no; }']


def rendered(path: Path, words=WORDS) -> File:
    target = load_target(path)
    (file,) = PLANNERS[target.kind](target, words).files
    return file


@pytest.mark.parametrize("kind", ["slurm", "tpu-queued"])
def test_rendered_scripts_are_bash(kind, tmp_path):
    script = rendered(write_target(tmp_path, kind, setup=SETUP, env={"A": "it's $B"}))
    checked = subprocess.run(["bash", "-n"], input=script.text, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


# --- SLURM


def test_a_slurm_job_is_requeued_warned_before_its_limit_and_keeps_its_log(tmp_path):
    lines = rendered(write_target(tmp_path, "slurm", nodes=3, options=["--qos=high"])).text.splitlines()
    options = {line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")}
    wanted = {
        "--requeue",
        "--signal=SIGTERM@120",
        "--open-mode=append",
        "--nodes=3",
        "--ntasks-per-node=1",
        "--qos=high",
    }
    assert wanted <= options
    assert lines[0] == "#!/bin/bash"
    assert all(line.startswith("#SBATCH ") for line in lines[1 : len(options) + 1])  # sbatch reads no further


def run_batch(tmp_path: Path, code: int, requeues: int = 0) -> tuple[subprocess.CompletedProcess, list[dict], str]:
    """The batch script under a stand-in for srun that starts one task, with what scontrol was told."""
    log = tmp_path / "scontrol.log"
    fake_command(tmp_path, "srun", '#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done\nexec "$@"\n')
    fake_command(tmp_path, "scontrol", f'#!/bin/bash\necho "$@" >> {log}\n')
    target = write_target(tmp_path, "slurm", program=probe(tmp_path, f"sys.exit({code})"), restarts=2, gpus_per_node=2)
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": str(requeues)}
    done = subprocess.run(
        ["bash", "-c", rendered(target).text], env=fake_path(tmp_path) | slurm, capture_output=True, text=True
    )
    return done, probed(done.stdout), log.read_text() if log.is_file() else ""


@pytest.mark.parametrize(
    ("code", "requeues", "ends_with", "told"),
    [(0, 0, 0, ""), (2, 0, 2, ""), (1, 0, 0, "requeue 77\n"), (75, 1, 0, "requeue 77\n"), (1, 2, 1, "")],
    ids=["done", "bad input", "failure", "saved before the time limit", "no restarts left"],
)
def test_a_slurm_job_goes_back_to_the_queue_unless_it_is_done_or_its_input_is_bad(
    code, requeues, ends_with, told, tmp_path
):
    done, (probe_of,), asked = run_batch(tmp_path, code, requeues)
    assert (done.returncode, asked) == (ends_with, told), done.stderr
    assert probe_of == {"argv": list(WORDS), "env": {"SIF_JAX_DISTRIBUTED": "auto", **PREEMPTED_ENV}}


def test_a_slurm_task_keeps_all_gpus_of_its_node_where_jax_would_take_one(tmp_path):
    assert "export JAX_LOCAL_DEVICE_IDS=0,1,2\n" in rendered(write_target(tmp_path, "slurm", gpus_per_node=3)).text


def test_the_launcher_hands_the_rendered_script_to_sbatch(tmp_path):
    fake_command(tmp_path, "sbatch", f'#!/bin/bash\ncp "$1" {tmp_path}/given\necho Submitted batch job 77\n')
    target = write_target(tmp_path, "slurm", name=NAME)
    command = [sys.executable, ROOT / "launch" / "run.py", target, *WORDS]
    done = subprocess.run(command, env=fake_path(tmp_path), capture_output=True, text=True, check=True)
    file = rendered(target)
    (ROOT / file.path).unlink()
    assert (tmp_path / "given").read_text() == file.text
    assert done.stdout.startswith("Submitted batch job 77\nsqueue --me")


# --- GKE


def expanded(text: str) -> str:
    """What Kubernetes makes of a command's word when no variable is defined: `$$` is `$`, all else stays."""
    return text.replace("$$", "$")


def test_a_job_set_restarts_as_a_whole_but_not_for_bad_input(tmp_path):
    job = yaml.safe_load(rendered(write_target(tmp_path, "gke", restarts=7, slices=2, queue="multislice-queue")).text)
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert spec["failurePolicy"]["maxRestarts"] == 7
    assert spec["failurePolicy"]["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]
    (slices,) = spec["replicatedJobs"]
    (rule,) = slices["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert slices["replicas"] == 2
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "multislice-queue"}


@pytest.mark.parametrize(
    ("topology", "chips", "hosts"), [("4x4", 4, 4), ("16x16", 4, 64), ("2x2x4", 4, 4), ("2x4", 8, 1)]
)
def test_a_slice_has_one_pod_for_each_of_its_hosts(topology, chips, hosts, tmp_path):
    target = load_target(write_target(tmp_path, "gke", topology=topology, chips_per_host=chips))
    spec = job_set(target, WORDS)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["completionMode"]) == (hosts, hosts, "Indexed")
    assert spec["template"]["spec"]["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}


def test_hosts_that_would_hold_uneven_chips_are_refused(tmp_path):
    with pytest.raises(
        InputError, match="hosts would be uneven; got 'chips_per_host=3'; expected a number that divides"
    ):
        rendered(write_target(tmp_path, "gke", chips_per_host=3))


def test_words_come_through_yaml_kubernetes_and_bash_as_they_were(tmp_path):
    target = write_target(
        tmp_path, "gke", program=probe(tmp_path), workdir=str(ROOT), setup=SETUP, env={"SIF_JAX_NOTE": "$(x) $$ 'y'"}
    )
    job = yaml.safe_load(rendered(target).text)
    (container,) = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    done = subprocess.run(list(map(expanded, container["command"])), capture_output=True, text=True, check=True)
    assert done.stdout.startswith("set up\n")
    assert probed(done.stdout) == [
        {"argv": list(WORDS), "env": {"SIF_JAX_DISTRIBUTED": "auto", "SIF_JAX_NOTE": "$(x) $$ 'y'", **PREEMPTED_ENV}}
    ]


# --- TPU pods

# A cloud with one queued resource: its state is a file; ssh runs the command here, in a home of its own.
GCLOUD = """#!/bin/bash
cd DIRECTORY
shift 2 # compute tpus
echo "$1 $2 $3" >> calls
state=$(cat state 2>/dev/null)
case "$1 $2" in
  "queued-resources create") [ ! -e refuse ] || { echo "quota exceeded" >&2; exit 1; }; echo ACTIVE > state ;;
  "queued-resources describe") [ -n "$state" ] && echo "$state" || { echo "ERROR: NOT_FOUND: nothing" >&2; exit 1; } ;;
  "queued-resources delete") rm -f state ;;
  "tpu-vm scp") mkdir -p home && cp "$CHECKOUT/$3" "home/${4#*:}" ;;
  "tpu-vm ssh")
    for word; do
      case $word in --command=*) HOME=DIRECTORY/home exec bash -c "cd && ${word#--command=}" ;; esac
    done ;;
esac
"""


def run_pod(tmp_path: Path, more: str, **changes) -> tuple[subprocess.CompletedProcess, list[str]]:
    fake_command(tmp_path, "gcloud", GCLOUD.replace("DIRECTORY", str(tmp_path)))
    fake_command(tmp_path, "git", '#!/bin/bash\nmkdir -p "$(dirname "$4")"; tar -czf "$4" Makefile\n')
    program = probe(tmp_path, more.replace("DIRECTORY", str(tmp_path)))
    target = write_target(tmp_path, "tpu-queued", name=NAME, program=program, **changes)
    command = [sys.executable, ROOT / "launch" / "run.py", target, *WORDS]
    env = fake_path(tmp_path) | {"CHECKOUT": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    for file in (ROOT / "runs" / "launch").glob(f"{NAME}.*"):
        file.unlink()
    return done, (tmp_path / "calls").read_text().splitlines()


# The first time the pod is taken away while the program runs; the second time it is done.
PREEMPTED = """
if not os.path.exists("DIRECTORY/again"):
    open("DIRECTORY/again", "w").close()
    open("DIRECTORY/state", "w").write("SUSPENDED")
    sys.exit(255)
print(sorted(os.listdir()), os.environ.get("SET"))
"""


def test_a_pod_that_is_taken_away_is_asked_for_again_and_deleted_in_the_end(tmp_path):
    done, calls = run_pod(tmp_path, PREEMPTED, setup=["echo set up on $BUCKET"])
    assert done.returncode == 0, done.stderr
    assert [each["argv"] for each in probed(done.stdout)] == [list(WORDS)] * 2
    assert "exit code 255, the queued resource is SUSPENDED" in done.stderr
    assert "['Makefile'] None" in done.stdout  # in the unpacked checkout
    assert done.stdout.count("set up on buck") == 2
    changes = [call for call in calls if call.split()[1] in ("create", "delete")]
    create, delete = f"queued-resources create {NAME}", f"queued-resources delete {NAME}"
    assert changes == [create, delete, create, delete]


def test_bad_input_on_a_pod_is_not_tried_again_and_leaves_no_pod(tmp_path):
    done, calls = run_pod(tmp_path, "sys.exit(2)")
    assert (done.returncode, len(probed(done.stdout))) == (2, 1)
    assert calls[-1] == f"queued-resources delete {NAME}"


def test_a_failure_on_a_healthy_pod_is_tried_again_on_that_pod_until_restarts_run_out(tmp_path):
    done, calls = run_pod(tmp_path, "sys.exit(1)", restarts=1)
    assert (done.returncode, len(probed(done.stdout))) == (1, 2)
    assert "error: given up after 1 restarts" in done.stderr
    assert sum("create" in call for call in calls) == 1
    assert calls[-1] == f"queued-resources delete {NAME}"


def test_a_set_up_that_fails_never_lets_the_program_run(tmp_path):
    done, calls = run_pod(tmp_path, "", restarts=1, setup=["false", "echo went on"])
    assert (done.returncode, probed(done.stdout)) == (1, [])
    assert "went on" not in done.stdout
    assert calls[-1] == f"queued-resources delete {NAME}"


def test_a_first_request_that_is_refused_is_not_repeated(tmp_path):
    (tmp_path / "refuse").touch()
    done, calls = run_pod(tmp_path, "")
    assert done.returncode == 1
    assert "quota exceeded\nerror: the request was refused" in done.stderr
    assert sum("create" in call for call in calls) == 1


def test_a_queued_resource_that_exists_already_is_left_alone(tmp_path):
    (tmp_path / "state").write_text("ACTIVE\n")
    done, calls = run_pod(tmp_path, "")
    assert done.returncode == 2
    assert f"is the name {NAME} free?" in done.stderr
    assert (tmp_path / "state").is_file()
    assert {call.split()[1] for call in calls} == {"describe"}


def test_the_flags_that_create_a_queued_resource_are_those_of_the_target(tmp_path):
    text = rendered(
        write_target(tmp_path, "tpu-queued", accelerator="v6e-16", runtime="v2-alpha-tpuv6e", spot=False)
    ).text
    assert "--accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e\n" in text
    assert "PLACE=(--project=proj --zone=europe-west4-b)\n" in text
