"""Every library notebook and guide runs from top to bottom: its examples are its tests."""
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if 'papers' not in p.parts and not any(part.startswith(('_', '.')) for part in p.relative_to(ROOT).parts))


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix())
def test_notebook_runs(path, monkeypatch):
    from nbdev.test import test_nb
    monkeypatch.chdir(ROOT)
    passed, seconds = test_nb(path, skip_flags=['slow', 'gpu'])
    assert passed, f'{path.name} failed; its error is in the output above. Alone: nbdev_test --path {path.relative_to(ROOT)}'
