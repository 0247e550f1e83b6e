"""Parity with the authors' released code, for whoever has it: three clones in one folder.

    git clone https://github.com/lgcnsai/PS-KD-Pytorch
    git clone https://github.com/alinlab/cs-kd
    git clone https://github.com/MingiJi/FRSKD
    SELFKD_RELEASED=. python -m pytest PATH/TO/tests/released

Nothing of it is copied here, and nothing fetches it. ``SELFKD_FIDELITY=docs/fidelity.md`` writes that page's tables.
"""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import released_code as released
from mmengine.registry import DefaultScope

ROWS = {}  # (section, what): {quantity: largest difference}


@pytest.fixture
def float64_without_cuda(monkeypatch):
    """What the authors' code asks of CUDA is done where the tensors are; NumPy's old names, which it uses, exist."""
    monkeypatch.setattr(torch.Tensor, 'cuda', lambda self, *args, **kwargs: self)
    monkeypatch.setattr(torch.nn.Module, 'cuda', lambda self, *args, **kwargs: self)
    monkeypatch.setattr(torch.cuda, 'FloatTensor', released.float_tensor)
    monkeypatch.setattr(torch.Tensor, 'bernoulli_', released.bernoulli_)
    for name, kind in (('float', float), ('int', int)):
        monkeypatch.setattr(np, name, kind, raising=False)
    kind = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield
    torch.set_default_dtype(kind)


@pytest.fixture
def measured():
    """Notes a difference for the table: measured('Networks', 'DenseNet-121', logits=1e-15)."""

    def note(section, what, **differences):
        ROWS.setdefault((section, what), {}).update(differences)

    return note


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    lines = []
    for section in dict.fromkeys(section for section, _ in ROWS):
        rows = {what: row for (s, what), row in ROWS.items() if s == section}
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        lines += [f'### {section}', '', f'| | {" | ".join(c.replace("_", " ") for c in columns)} |']
        lines.append('| --- ' * (len(columns) + 1) + '|')
        lines += [f'| {what} | {" | ".join(_number(row.get(c)) for c in columns)} |' for what, row in rows.items()]
        lines.append('')
    terminalreporter.write_line('\n'.join(lines))
    commits = [f'[{name}]({url}) at `{released.commit(name)}`' for name, url in released.REPOSITORIES.items()]
    page = os.environ.get('SELFKD_FIDELITY')
    if page and terminalreporter.stats.get('failed'):
        terminalreporter.write_line('SELFKD_FIDELITY: not written, since tests failed')
    elif page:
        text = Path(page).read_text()
        for mark, block in (('commits', ', '.join(commits)), ('table', '\n'.join(lines))):
            pattern = rf'(<!-- {mark} -->\n).*(<!-- end of {mark} -->)'
            text, found = re.subn(pattern, lambda m, block=block: f'{m[1]}{block}\n{m[2]}', text, flags=re.DOTALL)
            if not found:
                raise ValueError(f'SELFKD_FIDELITY: {page} has no lines <!-- {mark} --> and <!-- end of {mark} -->')
        Path(page).write_text(text)


def _number(value) -> str:
    if value is None:
        return ''
    if isinstance(value, str) or value == 0:
        return str(value or 0)
    return f'{value:.1e}' if abs(value) < 1e-2 else f'{value:.4g}'
