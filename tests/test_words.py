"""Names, docs of settings and prints: what `python tests/words.py` lists is empty, and it would find faults."""

from pathlib import Path

import pytest
import words


def test_nothing_is_listed() -> None:
    assert [*words.variables(), *words.dependent_docs(), *words.prints()] == []


def test_faults_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "ROOT", tmp_path)
    (tmp_path / "rlora" / "settings").mkdir(parents=True)
    (tmp_path / "rlora" / "a.py").write_text("def f(of, ok):\n    for each in ok:\n        print(each)\n")
    (tmp_path / "rlora" / "settings" / "b.py").write_text(
        'class ScoringConfig:\n    wrong: float = 0.0\n    """Of an answer that is not right."""\n    at: int = 1\n'
    )
    assert [*words.variables()] == ["rlora/a.py:1: variable 'of'", "rlora/a.py:2: variable 'each'"]
    assert [*words.dependent_docs()] == [
        "rlora/settings/b.py:2: doc of wrong: 'Of an answer that is not right.'",
        "rlora/settings/b.py:4: doc of at: ''",
    ]
    assert [*words.prints()] == ["rlora/a.py:3: print"]
