"""docs/results.md shows what the kept records give, and its pictures are there."""

from __future__ import annotations

import re

import pytest

from tools import results


def test_every_number_is_what_the_records_give() -> None:
    page = results.PAGE.read_text(encoding="utf-8")
    again, plans = results.refreshed(page)
    assert again == page, "run tools/results.py"
    assert plans
    for plan in plans.values():
        assert plan.results, plan.experiment.name


def test_a_number_that_was_changed_by_hand_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    page = results.PAGE.read_text(encoding="utf-8")
    copy = tmp_path / "results.md"
    copy.write_text(re.sub(r"(\| dynamic[^\n]*\| )(\d)", lambda found: f"{found[1]}9{found[2]}", page, count=1))
    monkeypatch.setattr(results, "PAGE", copy)
    monkeypatch.setattr("sys.argv", ["results.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        results.main()
    assert ended.value.code == 1
    assert "run tools/results.py" in capsys.readouterr().err


def test_pictures_are_there() -> None:
    page = results.PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"\]\((results/[^)]+)\)", page)
    assert shown
    for name in shown:
        assert (results.PAGE.parent / name).read_text(encoding="utf-8").startswith("<svg"), name
