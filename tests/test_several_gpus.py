"""docs/several-gpus.md: its scripts and manifest are at least well-formed."""

import re
import subprocess
from pathlib import Path

from ruamel.yaml import YAML


def test_the_scripts_and_the_manifest_parse(root: Path) -> None:
    page = (root / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    scripts = re.findall(r"```(?:ba)?sh\n(.*?)```", page, re.DOTALL)
    assert len(scripts) == 3
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (manifest,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    service, job = YAML(typ="safe").load_all(manifest)
    pods = job["spec"]["template"]["spec"]
    assert pods["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    (container,) = pods["containers"]
    assert f"--nnodes={job['spec']['completions']}" in container["command"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pods["volumes"]}
