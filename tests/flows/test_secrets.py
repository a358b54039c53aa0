"""Passwords and signatures in URLs are in no message and no file; tests/e2e searches a whole run for other secrets."""

import io
import shutil
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest

from diffusion.errors import UserError, without_secrets
from flows import workspace
from flows.services import Services
from tests.command import ddpm
from tests.flows.conftest import git
from tests.fuzz import IMAGES
from tests.sources.test_locations import serving
from tests.training import trees

CANARY = "canary-77aa"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"at https://me:{CANARY}@host:81/a b", "at https://host:81/a b"),
        (f"https://{CANARY}@host/a", "https://host/a"),  # a token
        (f"postgresql+psycopg://me:{CANARY}@host/db (refused)", "postgresql+psycopg://host/db (refused)"),
        (f"s3://b/k?X-Amz-Signature={CANARY}", "s3://b/k"),
        (f"https://host/k?sig={CANARY}: no such file", "https://host/k: no such file"),
        (f"url='https://host/k?sig={CANARY}')", "url='https://host/k')"),
        (f"http://a:{CANARY}/1@host", f"http://a:{CANARY}/1@host"),  # a port and a path
        ("sftp://me@host/a, s3://b/a@c", "sftp://me@host/a, s3://b/a@c"),
        ("http://host/#/runs?a=b", "http://host/#/runs?a=b"),
        ("sqlite:////a/b.db", "sqlite:////a/b.db"),
    ],
)
def test_what_is_secret_in_a_url(text: str, shown: str) -> None:
    assert without_secrets(text) == shown
    assert str(UserError(text)) == shown


def test_an_unreachable_store_is_named_without_its_password(whole_tree: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(whole_tree, tree)
    environment = trees.ENVIRONMENT | {"MLFLOW_TRACKING_URI": f"http://me:{CANARY}@127.0.0.1:9"}
    done = ddpm(tree, "track", environment=environment)
    assert done.returncode == 1
    assert "MLflow at http://127.0.0.1:9: " in done.stderr
    assert CANARY not in done.stdout + done.stderr


def test_the_recorded_addresses_have_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"https://me:{CANARY}@mlflow.example.org")
    services = Services(tmp_path)
    assert services.addresses()["MLFLOW_TRACKING_URI"] == "https://mlflow.example.org"
    assert CANARY in services.environment()["MLFLOW_TRACKING_URI"]  # the worker needs it


@pytest.mark.parametrize("command", [["set", "shard.source={}"], ["import", "{}", "--name", "a", "--link"]])
def test_a_source_with_a_password_is_refused(digits_tree: Path, command: list[str]) -> None:
    (digits_tree / ".dvc").mkdir()
    before = (digits_tree / "params.yaml").read_bytes()
    url = f"https://me:{CANARY}@127.0.0.1:9/a.zip"
    done = ddpm(digits_tree, *(part.format(url) for part in command), environment=trees.ENVIRONMENT)
    assert done.returncode == 1
    assert CANARY not in done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    assert (digits_tree / "params.yaml").read_bytes() == before


@pytest.mark.slow
def test_an_import_forgets_the_password_of_its_url(repository: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The server needs none; what counts is what is written and shown."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(4):
            archive.writestr(f"{number}.png", IMAGES["png"])
    served = repository.parent / "served"
    served.mkdir()
    (served / "a.zip").write_bytes(buffer.getvalue())

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with serving(partial(Quiet, directory=str(served))) as url:
        secret = url.replace("://", f"://me:{CANARY}@")
        options = ("--name", "own", "--license", "MIT")
        done = ddpm(repository, "import", f"{secret}/a.zip?sig={CANARY}", *options, environment={})
        assert done.returncode == 0, done.stderr
        missing = ddpm(repository, "import", f"{secret}/b.zip?sig={CANARY}", "--name", "b", environment={})
        assert missing.returncode == 1
    assert CANARY not in done.stdout + done.stderr + missing.stdout + missing.stderr + "".join(capfd.readouterr())
    assert f"error: {url}/b.zip: " in missing.stderr
    assert f"imported from {url}/a.zip" in (repository / "data/raw/own.zip.dvc").read_text()
    assert [path for path in repository.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()] == []


@pytest.mark.slow
def test_an_error_of_dvc_has_no_password(repository: Path) -> None:
    local = f"['remote \"r\"']\n    url = https://me:{CANARY}@127.0.0.1:9/\n[core]\n    remote = r\n"
    (repository / ".dvc/config.local").write_text(local)
    (repository / "data/raw/gone.dvc").write_text(f"outs:\n- md5: {'0' * 32}\n  size: 1\n  path: gone\n")
    git("add", "--all")
    with pytest.raises(UserError) as caught:
        workspace.dvc(repository, "pull", "data/raw/gone.dvc")
    assert CANARY not in str(caught.value)
