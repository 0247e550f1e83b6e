"""The public CI calls make targets that exist, and the issue forms are forms."""

import re

import pytest
import yaml
from helpers import ROOT

FORMS = sorted((ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml'))


def test_the_workflow_calls_make_targets_only():
    workflow = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())
    targets = set(re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE))
    called = [step['run'].split() for job in workflow['jobs'].values() for step in job['steps'] if 'run' in step]
    called = [command for command in called if command[0] != 'go']  # gets actionlint
    assert all(command[0] == 'make' and command[1] in targets for command in called)
    locally = set(re.findall(r'^make (\S+)$', (ROOT / '.ci/run').read_text(), re.MULTILINE))
    assert locally <= {command[1] for command in called}


@pytest.mark.parametrize('form', FORMS, ids=lambda form: form.stem)
def test_an_issue_form_has_what_the_platform_asks_for(form):
    read = yaml.safe_load(form.read_text())
    assert {'name', 'description', 'body'} <= set(read)
    assert all(
        part['type'] in ('input', 'textarea', 'dropdown') and part['attributes']['label'] for part in read['body']
    )
    assert len({part['id'] for part in read['body']}) == len(read['body'])
