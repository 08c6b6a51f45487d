"""GKE: a JobSet over one or more TPU slices, restarted as a whole until it is done (host)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import yaml

from launch.plan import File, Plan, Process
from launch.script import worker_script
from launch.target import GkeTarget
from sif_jax.errors import InputError

BAD_INPUT = 2
GRACE_S = 120  # between SIGTERM and SIGKILL, when a node is taken away


def plan_gke(target: GkeTarget, words: Sequence[str]) -> Plan:
    path = f"runs/launch/{target.name}.yaml"
    hosts = hosts_per_slice(target)
    # create refuses a name that exists: a running job is not replaced by accident
    create = Process("kubectl", ("kubectl", "create", "-f", path), {})
    title = f"gke: {target.slices} slice(s) {target.accelerator} {target.topology}, {hosts} processes each"
    space = f"-n {target.namespace}"
    follow = f"kubectl logs {space} -f -l jobset.sigs.k8s.io/jobset-name={target.name} --prefix --max-log-requests 64"
    note = f"{follow}; kubectl delete jobset {space} {target.name}"
    text = yaml.safe_dump(job_set(target, words), sort_keys=False, width=10_000)
    return Plan(title, (File(path, text),), (create,), note=note)


def hosts_per_slice(target: GkeTarget) -> int:
    chips = math.prod(map(int, target.topology.split("x")))
    if chips % target.chips_per_host:
        expected = f"a number that divides the {chips} chips of {target.topology}"
        raise InputError("hosts would be uneven", value=f"chips_per_host={target.chips_per_host}", expected=expected)
    return chips // target.chips_per_host


def job_set(target: GkeTarget, words: Sequence[str]) -> dict[str, Any]:
    labels = {"kueue.x-k8s.io/queue-name": target.queue} if target.queue else {}
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": target.name,
            "namespace": target.namespace,
            "labels": labels,
            "annotations": exclusive,
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": target.restarts,
                # of the Job's policy below: bad input, which a restart meets again
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "slice", "replicas": target.slices, "template": _job(target, words)}],
        },
    }


def _job(target: GkeTarget, words: Sequence[str]) -> dict[str, Any]:
    hosts = hosts_per_slice(target)
    bad_input = {"containerName": "sif-jax", "operator": "In", "values": [BAD_INPUT]}
    return {
        "spec": {
            "parallelism": hosts,
            "completions": hosts,
            "completionMode": "Indexed",
            "backoffLimit": 0,  # one lost pod ends the slice, and the JobSet starts all slices again
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": bad_input}]},
            "template": {"spec": _pod(target, words)},
        }
    }


def _pod(target: GkeTarget, words: Sequence[str]) -> dict[str, Any]:
    spot = {"cloud.google.com/gke-spot": "true"} if target.spot else {}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": target.accelerator,
            "cloud.google.com/gke-tpu-topology": target.topology,
            **spot,
        },
        "containers": [_container(target, words)],
        "volumes": [{"name": "sif", "persistentVolumeClaim": {"claimName": target.volume_claim}}],
    }


def _container(target: GkeTarget, words: Sequence[str]) -> dict[str, Any]:
    env = {"SIF_JAX_DISTRIBUTED": "auto"} | target.env
    script = worker_script((*target.program, *words), env, setup=target.setup, workdir=target.workdir)
    secret = {"envFrom": [{"secretRef": {"name": target.secret}}]} if target.secret else {}
    return {
        "name": "sif-jax",
        "image": target.image,
        # Kubernetes replaces $(NAME) in a command and reads $$ as $
        "command": ["bash", "-c", script.replace("$", "$$")],
        "resources": {"limits": {"google.com/tpu": target.chips_per_host}},
        "volumeMounts": [{"name": "sif", "mountPath": target.mount}],
        **secret,
    }
