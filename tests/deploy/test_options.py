"""Values of the command line that are refused."""

import pytest

from deploy.service.options import parser


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("threads", "1025", "--threads: must be from 0 to 1024 (got 1025)"),
        ("threads", "-1", "--threads: must be from 0 to 1024 (got -1)"),
        ("threads", "9" * 30, f"--threads: must be from 0 to 1024 (got {'9' * 30})"),
        ("cache", "1.5", "--cache: must be 0 or a positive integer (got 1.5)"),
        ("max-images", "0", "--max-images: must be a positive integer (got 0)"),
        ("max-images", "9" * 30, f"--max-images: must be a positive integer (got {'9' * 30})"),
        ("max-images", "1\n2", "--max-images: must be a positive integer (got 1 2)"),
        ("max-wait", "nan", "--max-wait: must be a non-negative number (got nan)"),
        (
            "cors",
            "page.example",
            "--cors: must be https://HOST[:PORT], without a path, or * (got page.example)",
        ),
    ],
)
def test_wrong_values(option: str, value: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parser().parse_args(["--model", "x", f"--{option}={value}"])
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m deploy.service: error: argument {line}"


def test_the_least_and_the_most() -> None:
    found = parser().parse_args(
        ["--model", "x", "--threads", "1024", "--cache", "0", "--max-images", "1", "--cors", "*"]
    )
    assert (found.threads, found.cache, found.max_images, found.cors) == (1024, 0, 1, ["*"])
