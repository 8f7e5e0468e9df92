"""examples/launch without starting anything: schemas of the Kubernetes file, and what shell files share."""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "examples" / "launch"
KUBERNETES = "1.31"

kubernetes_validate = pytest.importorskip("kubernetes_validate")
jsonschema = pytest.importorskip("jsonschema")


def strict(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


COUNT = {"type": "integer", "minimum": 0}
REPLICAS = strict(
    {
        "replicas": COUNT,
        "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
        "template": {"type": "object"},  # a pod template, which Kubernetes' schema checks
    },
    "replicas",
    "template",
)
PYTORCH_JOB = strict(
    {
        "apiVersion": {"const": "kubeflow.org/v1"},
        "kind": {"const": "PyTorchJob"},
        "metadata": strict({"name": {"type": "string"}, "namespace": {"type": "string"}}, "name"),
        "spec": strict(
            {
                "nprocPerNode": {"type": "string"},
                "runPolicy": strict(
                    {
                        "activeDeadlineSeconds": COUNT,
                        "backoffLimit": COUNT,
                        "cleanPodPolicy": {"enum": ["All", "Running", "None"]},
                        "managedBy": {"type": "string"},
                        "schedulingPolicy": {"type": "object"},
                        "suspend": {"type": "boolean"},
                        "ttlSecondsAfterFinished": COUNT,
                    }
                ),
                "pytorchReplicaSpecs": strict({"Master": REPLICAS, "Worker": REPLICAS}, "Master"),
            },
            "pytorchReplicaSpecs",
        ),
    },
    "apiVersion",
    "kind",
    "metadata",
    "spec",
)
"""Fields and types of the operator's CRD (github.com/kubeflow/trainer, release 1.9, manifests/base/crds/
kubeflow.org_pytorchjobs.yaml), less elasticPolicy: a run here has a fixed number of processes."""


def check(documents: list[dict[str, Any]]) -> None:
    """Raises jsonschema.ValidationError where the API server would refuse a document or drop a field of it."""
    claim, job = documents
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    jsonschema.validate(job, PYTORCH_JOB)
    for replicas in job["spec"]["pytorchReplicaSpecs"].values():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "template": replicas["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


@pytest.fixture
def documents() -> list[dict[str, Any]]:
    """Of the file; no two parts of it are the same object, though they share a YAML anchor."""
    text = (LAUNCH / "pytorchjob.yaml").read_text(encoding="utf-8")
    return [yaml.safe_load(yaml.dump(document, Dumper=_Plain)) for document in yaml.safe_load_all(text)]


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def test_the_kubernetes_file_follows_the_schemas(documents: list[dict[str, Any]]) -> None:
    check(documents)


def fields(node: Any, path: tuple = ()) -> list[tuple]:
    """Where names of fields are Kubernetes'; names of resources are free."""
    if isinstance(node, list):
        return [field for index, item in enumerate(node) for field in fields(item, (*path, index))]
    if not isinstance(node, dict) or path[-1:] in (("limits",), ("requests",)):
        return []
    return [field for name, item in node.items() for field in [(*path, name), *fields(item, (*path, name))]]


def test_any_misspelt_field_is_noticed(documents: list[dict[str, Any]]) -> None:
    names = fields(documents)
    assert len(names) > 80
    for *parents, name in names:
        wrong = copy.deepcopy(documents)
        node: Any = wrong
        for parent in parents:
            node = node[parent]
        node[f"{name}x"] = node.pop(name)
        with pytest.raises((jsonschema.ValidationError, KeyError)):
            check(wrong)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("nprocPerNode",), 8),
        (("pytorchReplicaSpecs", "Master", "restartPolicy"), "Sometimes"),
        (("pytorchReplicaSpecs", "Worker", "replicas"), "1"),
        (("pytorchReplicaSpecs", "Worker", "template", "spec", "terminationGracePeriodSeconds"), "10m"),
        (("pytorchReplicaSpecs", "Worker", "template", "spec", "volumes", 0), {"persistentVolumeClaim": {}}),
    ],
)
def test_a_value_of_the_wrong_kind_is_noticed(documents: list[dict[str, Any]], path: tuple, value: Any) -> None:
    *parents, name = path
    node: Any = documents[1]["spec"]
    for parent in parents:
        node = node[parent]
    node[name] = value
    with pytest.raises(jsonschema.ValidationError):
        check(documents)


def test_everything_that_the_pods_reference_is_defined(documents: list[dict[str, Any]]) -> None:
    """What no schema sees: the claim, mounted volumes, the script, and a container with the operator's name."""
    claim, job = documents
    for replicas in job["spec"]["pytorchReplicaSpecs"].values():
        pod = replicas["template"]["spec"]
        (container,) = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert container["name"] == "pytorch"
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        assert volumes["data"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
        (script,) = [word for word in container["command"][2].split() if word.endswith(".sh")]
        assert (ROOT / script).is_file()


@pytest.mark.parametrize("path", sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")]), ids=lambda path: path.name)
def test_shell_files_parse(path: Path) -> None:
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
