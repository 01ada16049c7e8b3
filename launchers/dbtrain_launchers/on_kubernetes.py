"""A run as a KubeRay RayJob with a network policy: token authentication, no root, limits, no secret in the text.

Written for KubeRay 1.7. Its submitter puts the entrypoint into a bash line, so words are quoted for a shell here. It
quotes a runtime_env for Go and not for the shell, so variables are set in the pods instead. Without `dashboard-host` it
opens the dashboard on every interface.
"""

import json
import re
import shlex
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from dbtrain_launchers.plan import (
    DNS_LABEL,
    Launcher,
    LaunchPlan,
    Rendered,
    assigned_gpu_findings,
    check_program,
    form_findings,
    plain_findings,
    refuse,
    start_program,
)

_VERSION = re.compile(r"\d+\.\d+\.\d+")
_QUANTITY = re.compile(r"\d+(\.\d+)?([KMGTP]i?|m)?")
_CLAIM = re.compile(r"([a-z0-9][a-z0-9.-]*):(/[A-Za-z0-9_./-]+)")
_SECRET = re.compile(r"([A-Za-z_]\w*)=([a-z0-9][a-z0-9.-]*)/([A-Za-z0-9._-]+)")
_LABEL = "app.kubernetes.io/instance"
_USER = 1000
"""User and group of the images that Ray publishes."""


def installed_ray() -> str:
    """The version of Ray on this machine; "" if it is not installed. The image must have the same one."""
    try:
        return version("ray")
    except PackageNotFoundError:
        return ""


def render(
    plan: LaunchPlan,
    *,
    image: Annotated[str, typer.Option(help="Image with dbtrain and Ray.")],
    namespace: Annotated[str | None, typer.Option(help="Namespace; by default that of kubectl.")] = None,
    memory: Annotated[str, typer.Option(help="Memory of each pod.")] = "32Gi",
    claim: Annotated[list[str] | None, typer.Option(help="Volume claim as NAME:/MOUNT; repeats.")] = None,
    head_claim: Annotated[
        list[str] | None, typer.Option(help="Volume claim of the head only, such as a disk for --ledger; repeats.")
    ] = None,
    secret: Annotated[list[str] | None, typer.Option(help="VARIABLE=SECRET/KEY of the secret store; repeats.")] = None,
    operator_namespace: Annotated[str, typer.Option(help="Namespace of KubeRay's operator.")] = "kuberay-operator",
    retries: Annotated[int, typer.Option(min=0, help="How many new clusters may be tried after failures.")] = 3,
    ray_version: Annotated[str, typer.Option(help="Version of Ray in the image, 2.52 or newer.")] = installed_ray(),
) -> Rendered:
    """Run on Kubernetes as a RayJob with token authentication: one Ray node a pod, one pod a node.

    \b
    Example:
      dbtrain launch kubernetes --nodes 4 --gpus 8 --cpus 32 --image ghcr.io/me/dbtrain:1 --claim data:/data \\
        --head-claim ledger:/ledger -- batch run /data/all.csv --config sdxl_lora --out /data/runs/all --ledger /ledger
    """
    import yaml

    findings = [*plain_findings(image=image), *(assigned_gpu_findings(plan, "Kubernetes") if plan.gpus else [])]
    findings += form_findings(_VERSION, "the version of the image, such as 2.60.0", ray_version=ray_version)
    names = {"namespace": namespace, "operator_namespace": operator_namespace}
    findings += form_findings(DNS_LABEL, "small letters, digits and inner dashes", **names)
    findings += form_findings(_QUANTITY, "a quantity such as 64Gi", memory=memory)
    findings += form_findings(_CLAIM, "NAME:/MOUNT", claim=claim, head_claim=head_claim)
    refuse(findings + form_findings(_SECRET, "VARIABLE=SECRET/KEY", secret=secret))
    head = _pod(plan, image, memory, [*(claim or ()), *(head_claim or ())], secret or ())
    worker = _pod(plan, image, memory, claim or (), secret or ())
    metadata = {"name": plan.name, **({"namespace": namespace} if namespace else {})}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "entrypoint": shlex.join(["python", "-m", "dbtrain", *plan.cluster_words]),
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "backoffLimit": retries,
            "submitterPodTemplate": _submitter(plan, image),
            "rayClusterSpec": _cluster(plan, head, worker, ray_version),
        },
    }
    # YAML writes a list that two pods share once, and a reference to it. JSON makes copies of it first.
    documents = json.loads(json.dumps([job, _policy(plan, metadata, operator_namespace)]))
    return Rendered(("kubectl", "apply", "-f", "-"), yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True))


def _cluster(plan: LaunchPlan, head_pod: dict[str, Any], pod: dict[str, Any], ray_version: str) -> dict[str, Any]:
    """The cluster: a head that also works, and `nodes - 1` workers."""
    head = {"rayStartParams": {"dashboard-host": "$POD_IP"}, "template": _template(plan, "ray-head", head_pod)}
    worker = {
        "groupName": "workers",
        **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), plan.nodes - 1),
        "rayStartParams": {},
        "template": _template(plan, "ray-worker", pod),
    }
    return {
        "rayVersion": ray_version,
        "authOptions": {"mode": "token"},
        "headGroupSpec": head,
        **({"workerGroupSpecs": [worker]} if plan.nodes > 1 else {}),
    }


def _pod(plan: LaunchPlan, image: str, memory: str, claims: Any, secrets: Any) -> dict[str, Any]:
    """The container of a Ray node, without a name, and its volumes."""
    resources = {"cpu": str(plan.cpus or 1), "memory": memory}
    resources |= {"nvidia.com/gpu": str(plan.gpus)} if plan.gpus else {}
    mounts = [_CLAIM.fullmatch(entry).groups() for entry in claims]  # type: ignore[union-attr]
    given = [_SECRET.fullmatch(entry).groups() for entry in secrets]  # type: ignore[union-attr]
    return {
        "image": image,
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            # Kubernetes replaces $(NAME) in values. It reads $$ as one $, without replacing.
            *({"name": name, "value": value.replace("$(", "$$(")} for name, value in plan.env.items()),
            *(
                {"name": name, "valueFrom": {"secretKeyRef": {"name": holder, "key": key}}}
                for name, holder, key in given
            ),
        ],
        "resources": {"requests": resources, "limits": dict(resources)},
        "volumeMounts": [{"name": f"claim-{number}", "mountPath": path} for number, (_, path) in enumerate(mounts)],
        "volumes": [
            {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": name}}
            for number, (name, _) in enumerate(mounts)
        ],
    }


def _template(plan: LaunchPlan, name: str, pod: dict[str, Any]) -> dict[str, Any]:
    """The template of a pod without root rights and without a token of the API server."""
    container = {"name": name, **{key: value for key, value in pod.items() if key != "volumes" and value}}
    container["securityContext"] = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {
        "metadata": {"labels": {_LABEL: plan.name}},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": _USER,
                "runAsGroup": _USER,
                "fsGroup": _USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            **({"volumes": pod["volumes"]} if pod.get("volumes") else {}),
        },
    }


def _submitter(plan: LaunchPlan, image: str) -> dict[str, Any]:
    """The template of the pod that sends the entrypoint to the head and shows the log."""
    resources = {"cpu": "1", "memory": "1Gi"}
    pod = {"image": image, "resources": {"requests": resources, "limits": dict(resources)}}
    template = _template(plan, "ray-job-submitter", pod)
    template["spec"]["restartPolicy"] = "Never"
    return template


def _policy(plan: LaunchPlan, metadata: dict[str, str], operator_namespace: str) -> dict[str, Any]:
    """A network policy: only the run's pods and KubeRay's operator may open connections to the run's pods."""
    selector = {"matchLabels": {_LABEL: plan.name}}
    operator = {"matchLabels": {"kubernetes.io/metadata.name": operator_namespace}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata,
        "spec": {
            "podSelector": selector,
            "policyTypes": ["Ingress"],
            "ingress": [{"from": [{"podSelector": selector}, {"namespaceSelector": operator}]}],
        },
    }


def start(rendered: Rendered) -> int:
    """The exit code of kubectl. The run goes on afterwards; `kubectl get rayjob NAME` shows its state."""
    check_program("kubectl", "install it and connect it to the cluster")
    return start_program(rendered)


LAUNCHER = Launcher(render, ("nodes", "gpus", "cpus", "name"), start)
