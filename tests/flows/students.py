"""What the stages of the distillation wrote."""

import json
from pathlib import Path
from typing import Any

from flows.pages import contents
from tests.flows.pages.test_report import check_alone


def rows_of(tree: Path) -> list[dict[str, Any]]:
    return contents.table(tree / "reports/student/evaluation/few_steps.csv")


def report_of(tree: Path) -> dict[str, Any]:
    return dict(json.loads((tree / "reports/student/evaluate.json").read_text()))


def page_of(tree: Path) -> str:
    return check_alone((tree / "reports/student/report.html").read_text(encoding="utf-8"))


def record_of(tree: Path, stage: str) -> dict[str, Any]:
    return dict(json.loads((tree / f"reports/made_with/{stage}.json").read_text()))
