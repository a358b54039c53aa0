"""`ddpm import`, run from the command line with the real DVC."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from diffusion.errors import UserError
from flows import dvc_add, importing
from flows.paths import Paths
from tests.command import ddpm

pytestmark = pytest.mark.slow


def run(tree: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    if program == "flows":
        return ddpm(tree, *arguments, environment={})
    return subprocess.run([sys.executable, "-m", program, *arguments], cwd=tree, capture_output=True, text=True)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with git and DVC repositories."""
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    assert run(folder, "dvc", "init", "-q").returncode == 0
    return folder


NETWORK = "network.fourier_features: []\nnetwork.classes: true\n"
"""What an import prints for images with classes that replace the digits."""


@pytest.fixture
def tree(digits_tree: Path, empty: Path) -> Path:
    """A working tree with git and DVC, and a folder of images."""
    shutil.copytree(empty, digits_tree, dirs_exist_ok=True)
    for name in ("a/1.png", "b/2.png", "b/.hidden.png"):
        path = digits_tree / "elsewhere" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (3, 3), 7).save(path)
    return digits_tree


def status(tree: Path) -> set[str]:
    """Files under data/raw and in the cache."""
    return {str(path.relative_to(tree)) for place in ("data/raw", ".dvc/cache") for path in (tree / place).rglob("*")}


@pytest.mark.parametrize("link", [False, True])
def test_a_folder_is_added_to_dvc(tree: Path, link: bool) -> None:
    done = run(tree, "flows", "import", "elsewhere", "--name", "own", *(["--link"] if link else []))
    assert done.returncode == 0, done.stderr
    assert f'shard.source: "data/raw/own"\npairs.height: 3\npairs.width: 3\n{NETWORK}' in done.stdout
    params = YAML(typ="safe").load(tree / "params.yaml")
    assert (params["shard"]["source"], params["pairs"]["width"]) == ("data/raw/own", 3)
    assert "    git add data/raw/own.dvc data/raw/.gitignore\n" in done.stdout
    copy = tree / "data" / "raw" / "own"
    assert sorted(str(path.relative_to(copy)) for path in copy.rglob("*.*")) == ["a/1.png", "b/2.png"]
    assert (copy / "a" / "1.png").is_symlink() == link
    assert (copy / "a" / "1.png").read_bytes() == (tree / "elsewhere" / "a" / "1.png").read_bytes()
    assert (tree / "data" / "raw" / ".gitignore").read_text() == "/own\n"
    record = YAML(typ="safe").load(tree / "data" / "raw" / "own.dvc")
    assert record["outs"][0]["nfiles"] == 2
    assert run(tree, "dvc", "status", "-q", "data/raw/own.dvc").returncode == 0


def test_a_license_is_recorded_beside_the_data_and_not_kept_for_others(tree: Path) -> None:
    page = "https://example.org/own?id=7"
    given = ["--license", "cc-by-4.0", "--source-url", page]
    done = run(tree, "flows", "import", "elsewhere", "--name", "own", *given)
    assert done.returncode == 0, done.stderr
    assert "License: CC-BY-4.0, in data/licenses.yaml; model cards state it\n" in done.stdout
    assert "    git add data/raw/own.dvc data/raw/.gitignore data/licenses.yaml\n" in done.stdout
    file = tree / "data/licenses.yaml"
    assert YAML(typ="safe").load(file) == {"data/raw/own": {"license": "CC-BY-4.0", "url": page}}
    (tree / "data/raw/own.dvc").unlink()
    shutil.rmtree(tree / "data/raw/own")
    assert run(tree, "flows", "import", "elsewhere", "--name", "own").returncode == 0
    assert not YAML(typ="safe").load(file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--license", "free"], "--license: must be an SPDX identifier such as CC-BY-4.0"),
        (["--license", "MIT", "--source-url", "example.org"], "--source-url: string should match"),
        (["--source-url", "https://example.org"], "--source-url: needs --license"),
    ],
)
def test_an_invalid_license_imports_nothing(tree: Path, options: list[str], message: str) -> None:
    before = status(tree)
    done = run(tree, "flows", "import", "elsewhere", "--name", "own", *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"ddpm import: error: {message}")
    assert status(tree) == before


def test_classes_and_splits_are_printed(tree: Path) -> None:
    for name in ("set/Train/cat/1.png", "set/Train/cat/2.png", "set/Train/dog/3.png", "set/valid/cat/4.png"):
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (3, 3), 7).save(path)
    Image.new("L", (3, 3), 7).save(tree / "set" / "cover.png")
    (tree / "set" / "Train" / "dog" / "notes.txt").write_text("no image")
    (tree / "set" / "@eaDir").mkdir()
    (tree / "set" / "@eaDir" / "thumb.png").write_bytes(b"")
    (tree / "set" / "valid" / "dog").symlink_to(tree / "elsewhere" / "b")
    done = run(tree, "flows", "import", "set", "--name", "own")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "Imported 5 images (2 val, 3 train), for the shard stage to decode.\n"
        "Classes: 2 classes: cat 3, dog 2\n"
        "Splits: train is Train/ of the source, val is valid/ of the source, test is taken from train by a hash of the "
        "pixels\n"
        "Rejected: Train/dog/notes.txt: not an image by its name or content\n"
        "Rejected: cover.png: outside the folders of the splits\n"
        "The shard stage will stop: set: 1 of 6 images cannot be used, more than shard.max_rejected (0.05) allows: "
        "repair or remove them, or increase it; 'cover.png': outside the folders of the splits\n"
        "Pixels: 3x3, greyscale (5 images looked at); at 3x3, none is cropped or enlarged\n"
        "Contact sheet: .ddpm/imports/own.png shows some images as the network will see them; `ddpm params pairs` "
        "lists what changes that\n\n"
    )
    copy = tree / "data" / "raw" / "own"
    assert {str(path.relative_to(copy)) for path in copy.rglob("*.png")} == {
        "Train/cat/1.png", "Train/cat/2.png", "Train/dog/3.png", "valid/cat/4.png", "valid/dog/2.png", "cover.png"
    }  # fmt: skip


def test_a_class_named_like_a_split_needs_an_option(tree: Path) -> None:
    (tree / "elsewhere" / "b").rename(tree / "elsewhere" / "train")
    refused = run(tree, "flows", "import", "elsewhere", "--name", "own")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("ddpm import: error: elsewhere: named like a split, but read as a class: train;")
    assert refused.stderr.count("\n") == 1
    assert "--split-names-as-classes" in refused.stderr
    done = run(tree, "flows", "import", "elsewhere", "--name", "own", "--split-names-as-classes")
    assert done.returncode == 0, done.stderr
    assert "Classes: 2 classes: a 1, train 1\n" in done.stdout
    assert 'shard.source: "data/raw/own"\nshard.split_names_as_classes: true\n' in done.stdout


@pytest.mark.parametrize("link", [False, True])
def test_a_broken_link_is_reported(tree: Path, link: bool) -> None:
    (tree / "elsewhere" / "a" / "gone.png").symlink_to("nowhere")
    before = status(tree)
    done = run(tree, "flows", "import", "elsewhere", "--name", "own", *(["--link"] if link else []))
    assert (done.returncode, done.stderr) == (
        1,
        "ddpm import: error: elsewhere/a/gone.png: cannot be read (No such file or directory)\n",
    )
    assert status(tree) == before


def test_dvc_restores_linked_files_without_the_originals(tree: Path) -> None:
    assert run(tree, "flows", "import", "elsewhere", "--name", "own", "--link").returncode == 0
    (tree / "elsewhere" / "a" / "1.png").unlink()
    assert run(tree, "dvc", "checkout", "-q", "--force").returncode == 0
    with Image.open(tree / "data" / "raw" / "own" / "a" / "1.png") as image:
        assert image.getpixel((0, 0)) == 7


def test_an_npz_file_is_imported_as_a_file(tree: Path) -> None:
    np.savez(tree / "x.npz", images=np.zeros((3, 2, 2), np.uint8))
    done = run(tree, "flows", "import", "x.npz", "--name", "own")
    assert done.returncode == 0, done.stderr
    assert 'shard.source: "data/raw/own.npz"\n' in done.stdout
    assert (tree / "data" / "raw" / "own.npz").read_bytes() == (tree / "x.npz").read_bytes()


@pytest.mark.parametrize(("name", "kind"), [("pictures.zip", "zip"), ("pictures.v2.tar.gz", "gztar")])
def test_an_archive_is_imported_as_a_file_and_read_in_place(tree: Path, name: str, kind: str) -> None:
    for number in range(40):
        Image.new("L", (3, 3), number).save(tree / "elsewhere" / "a" / f"x{number}.png")
    ending = name.partition(".")[2].removeprefix("v2.")
    shutil.make_archive(str(tree / name.removesuffix(f".{ending}")), kind, tree / "elsewhere")
    done = run(tree, "flows", "import", name, "--name", "own", "--size", "8")
    assert done.returncode == 0, done.stderr
    assert f'shard.source: "data/raw/own.{ending}"\n{NETWORK}' in done.stdout  # the size is the default
    assert run(tree, "flows", "shard").returncode == 0
    manifest = json.loads((tree / "data" / "shards" / "manifest.json").read_text())
    assert manifest["classes"] == ["a", "b"]
    assert sum(split["samples"] for split in manifest["splits"].values()) == 42


def test_parameters_that_do_not_fit_are_found_before_anything_is_copied(tree: Path) -> None:
    assert run(tree, "flows", "set", "network.patch_size=4").returncode == 0
    before = status(tree), (tree / "params.yaml").read_bytes()
    done = run(tree, "flows", "import", "elsewhere", "--name", "own")
    assert (done.returncode, done.stdout) == (1, "")
    message = "params.yaml with what was found: network.patch_size (4) exceeds the images' side"
    assert done.stderr == f"ddpm import: error: {message}\n"
    assert (status(tree), (tree / "params.yaml").read_bytes()) == before
    assert run(tree, "flows", "import", "elsewhere", "--name", "own", "--size", "5000").returncode == 2
    assert run(tree, "flows", "import", "elsewhere", "--name", "own", "--size", "8").returncode == 0


def test_without_params_the_parameters_are_named(tree: Path) -> None:
    (tree / "params.yaml").unlink()
    done = run(tree, "flows", "import", "elsewhere", "--name", "own")
    assert done.returncode == 0, done.stderr
    fields = (
        "shard.source, shard.split_names_as_classes, shard.layout, shard.value_range, shard.max_pixels, pairs.height,"
    )
    assert f"params.yaml: not there; set {fields}" in done.stdout


@pytest.mark.parametrize(
    ("path", "name", "message"),
    [
        ("elsewhere", "a/b", "--name: must start with a letter"),
        ("elsewhere", "..", "--name: must start with a letter"),
        ("elsewhere", "a.b", "--name: must start with a letter"),
        ("params.yaml", "own", "params.yaml: no images in a supported format"),
        ("missing", "own", "missing: no such file or folder"),
        ("data/raw/digits.npz", "digits", "data/raw/digits.npz: already exists"),
    ],
)
def test_invalid_imports_give_one_line_and_leave_nothing(tree: Path, path: str, name: str, message: str) -> None:
    before = status(tree)
    done = run(tree, "flows", "import", path, "--name", name)
    assert (done.returncode, done.stdout) == (2 if message.startswith("--") else 1, "")
    assert done.stderr.startswith(f"ddpm import: error: {message}")
    assert done.stderr.count("\n") == 1
    assert status(tree) == before


def test_outside_of_the_pipeline_nothing_is_created(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    done = run(tmp_path / "outside", "flows", "import", str(tree / "elsewhere"), "--name", "own")
    message = "ddpm import: error: .dvc: no such folder here; run this in the pipeline's folder\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    assert list((tmp_path / "outside").iterdir()) == []


def test_names_of_classes_are_printed_in_one_line(tree: Path) -> None:
    for name in ("cat\nand dog", "fox\x1b[31m"):
        (tree / "set" / name).mkdir(parents=True)
        Image.new("L", (3, 3), 7).save(tree / "set" / name / "1.png")
    done = run(tree, "flows", "import", "set", "--name", "own")
    assert done.returncode == 0, done.stderr
    assert "\nClasses: 2 classes: cat\\nand dog 1, fox\\x1b[31m 1\n" in done.stdout
    assert "\nThe shard stage will stop: set: only 2 images; add some, since train, val and test need" in done.stdout


def test_if_dvc_fails_its_error_is_shown_and_nothing_is_left(tree: Path) -> None:
    before = status(tree)
    (tree / ".dvc" / "config").write_text("no section\n")
    done = run(tree, "flows", "import", "elsewhere", "--name", "own")
    assert done.returncode == 1
    assert "ddpm import: error: dvc add" in done.stderr.splitlines()[-1]
    assert "config file error" in done.stderr.splitlines()[-1]
    assert status(tree) == before


def test_an_error_of_dvc_is_reported(tree: Path) -> None:
    assert run(tree, "dvc", "cache", "dir", "--local", str(tree / "params.yaml")).returncode == 0
    done = run(tree, "flows", "import", "elsewhere", "--name", "own")
    assert done.returncode == 1
    assert "Not a directory" in done.stderr
    assert "support" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("ddpm import: error: dvc add data/raw/own: unexpected error - ")


def test_a_concurrent_import_of_the_same_name_is_rejected(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really, reached, go_on = dvc_add._dvc_add, threading.Event(), threading.Event()

    def slow(target: Path, root: Path, link: bool) -> None:
        reached.set()
        assert go_on.wait(60)
        really(target, root, link)

    monkeypatch.setattr(dvc_add, "_dvc_add", slow)
    first = threading.Thread(target=importing.import_data, args=(str(tree / "elsewhere"), "own", Paths(tree), False))
    first.start()
    assert reached.wait(60)
    threading.Timer(0.5, go_on.set).start()
    with pytest.raises(UserError, match="already exists"):
        importing.import_data(str(tree / "elsewhere" / "a"), "own", Paths(tree), link=False)
    first.join()
    assert sorted(path.name for path in (tree / "data/raw/own").rglob("*.png")) == ["1.png", "2.png"]
    assert (tree / "data/raw/own.dvc").exists()
    assert (tree / "data/raw/.gitignore").read_text() == "/own\n"


def test_sigterm_undoes_an_import(tree: Path) -> None:
    for number in range(3000):
        (tree / "elsewhere" / "a" / f"{number}.png").write_bytes((tree / "elsewhere" / "a" / "1.png").read_bytes())
    before = status(tree)
    command = [sys.executable, "-m", "flows", "import", "elsewhere", "--name", "own"]
    process = subprocess.Popen(command, cwd=tree, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tree / "data" / "raw").glob(".own.*/own/a/*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert said.splitlines()[-1] == "ddpm import: stopped by SIGTERM"
    assert process.returncode == 128 + signal.SIGTERM
    assert status(tree) == before


@pytest.mark.parametrize(("low", "high"), [("0", "0"), ("9", "1"), ("nan", "1"), ("-1e308", "1e308")])
def test_a_range_of_values_is_checked_first(tree: Path, low: str, high: str) -> None:
    done = run(tree, "flows", "import", "elsewhere", "--name", "own", "--value-range", low, high)
    assert done.returncode == 2
    assert done.stderr.startswith("ddpm import: error: --value-range: ")
    assert done.stderr.count("\n") == 1


def test_a_range_of_values_is_for_more_than_8_bits(tree: Path) -> None:
    done = run(tree, "flows", "import", "elsewhere", "--name", "own", "--value-range", "0", "1")
    assert done.returncode == 2
    assert done.stderr.startswith("ddpm import: error: --value-range: for arrays, and greyscale pictures with more")
    assert "own" not in {path.name for path in (tree / "data/raw").iterdir()}


def test_what_was_chosen_for_other_images_is_reset(tree: Path) -> None:
    run(tree, "flows", "set", "pairs.channels=5", "evaluate.shown_channels=[4]")
    done = run(tree, "flows", "import", "elsewhere", "--name", "own")
    assert done.returncode == 0, done.stderr
    assert "evaluate.shown_channels: []" in done.stdout
    assert "network.fourier_features: []" in done.stdout


def test_a_name_that_dvc_cannot_track_is_named(tree: Path) -> None:
    (tree / "elsewhere" / "a" / os.fsdecode(b"\xff.png")).write_bytes((tree / "elsewhere/a/1.png").read_bytes())
    done = run(tree, "flows", "import", "elsewhere", "--name", "own")
    assert (done.returncode, done.stdout) == (1, "")
    assert "udcff.png': DVC cannot track a name that is not in UTF-8; rename the file" in done.stderr


def test_files_looked_at_that_cannot_be_read_are_told(tree: Path) -> None:
    (tree / "elsewhere" / "a" / "9.png").write_bytes(b"damaged")
    done = run(tree, "flows", "import", "elsewhere", "--name", "own")
    assert " looked at, of which 1 cannot be read, such as a/9.png: not an image" in done.stdout
