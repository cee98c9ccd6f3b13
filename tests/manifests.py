"""The Kubernetes manifests as `kubectl apply -k` would send them."""

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
MANIFESTS = ROOT / "k8s"
BASE, MINIKUBE, HA = "k8s", "k8s/overlays/minikube", "k8s/overlays/ha"
KUSTOMIZATIONS = (BASE, MINIKUBE, HA)
OUR_IMAGE = "payment-service"

Object = dict[str, Any]


@functools.cache
def rendered(kustomization: str) -> tuple[Object, ...]:
    """All objects of a kustomization. kubectl has kustomize inside, and asks no cluster for this."""
    command = [str(Path(sys.executable).parent / "kubectl"), "kustomize", kustomization]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # deprecations among it
    return tuple(yaml.safe_load_all(done.stdout))


def of_kind(kustomization: str, kind: str) -> dict[str, Object]:
    """Its objects of one kind, by name."""
    return {each["metadata"]["name"]: each for each in rendered(kustomization) if each["kind"] == kind}


def one(kustomization: str, kind: str, name: str = OUR_IMAGE) -> Object:
    """One of them."""
    return of_kind(kustomization, kind)[name]


def pod_templates(kustomization: str) -> dict[str, Object]:
    """The template of each workload, by the label `app` of its pods."""
    found = [each["spec"]["template"] for each in rendered(kustomization) if "containers" in _pod_spec(each)]
    return {template["metadata"]["labels"]["app"]: template for template in found if "metadata" in template}


def containers(template: Object) -> list[Object]:
    """Its containers, those that run first among them."""
    spec = template["spec"]
    return [*spec.get("initContainers", ()), *spec["containers"]]


def server(kustomization: str) -> Object:
    """The container that serves."""
    (found,) = pod_templates(kustomization)["payment-service"]["spec"]["containers"]
    return dict(found)


def examples(kustomization: str) -> dict[str, Object]:
    """The Secrets of its example, by name."""
    file = {BASE: MANIFESTS, MINIKUBE: MANIFESTS, HA: ROOT / HA}[kustomization] / "secret.example.yaml"
    return {each["metadata"]["name"]: each for each in yaml.safe_load_all(file.read_text(encoding="utf-8"))}


def _pod_spec(each: Object) -> Object:
    template = each.get("spec", {}).get("template", {})
    return dict(template.get("spec", {}))
