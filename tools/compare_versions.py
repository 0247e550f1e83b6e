"""Trains each row of the promises' table, and says which rows end as they did with another version of the plugins.

    git worktree add ../before COMMIT
    python tools/compare_versions.py --plugins ../before/plugins --out before.json
    python tools/compare_versions.py --out after.json --against before.json

The rows and what drives them are this checkout's, in both runs. Rows whose toolkits are not installed are left out;
further arguments are pytest's, as in ``-k mmdet``.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'  # sums of floats depend on the number of threads; set before torch is imported

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def digest(weights) -> str:
    """One for all names, types, shapes and bits of a state dict."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        found.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return found.hexdigest()


class Trainings:
    """Takes the place of a promise's test: trains its row once, and keeps what comes of it."""

    def __init__(self, plugins):
        self.plugins, self.found = plugins, {}

    def pytest_collection_finish(self):
        import helpers.fairseq

        import selfkd

        helpers.fairseq.USER_DIR = str(self.plugins / 'selfkd_fairseq')
        assert self.plugins in Path(selfkd.__file__).parents, f'selfkd is that of {selfkd.__file__}'

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        row, runs = (pyfuncitem.funcargs[name] for name in ('row', 'runs'))
        result = runs.train(runs.config())
        losses = [runs.total(step) for step in result['steps']]
        self.found[str(row)] = dict(weights=digest(result['weights']), losses=losses)
        return True


def difference(before, after) -> str:
    """Of two entries of the files, in words."""
    if before is None or after is None:
        return f'only {"after" if before is None else "before"}'
    pairs = enumerate(zip(before['losses'], after['losses']), 1)
    first = next((f'losses differ from step {step} on: {a} | {b}' for step, (a, b) in pairs if a != b), '')
    if len(before['losses']) != len(after['losses']):
        first = first or f'{len(before["losses"])} steps | {len(after["losses"])}'
    return first or ('equal' if before['weights'] == after['weights'] else 'losses are equal, final weights differ')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--plugins', type=Path, default=ROOT / 'plugins', help="a folder of plugins (this checkout's)")
    parser.add_argument('--out', type=Path, required=True, help='the JSON file to write')
    parser.add_argument('--against', type=Path, help='a JSON file written before, to compare with')
    args, rest = parser.parse_known_args()
    plugins = args.plugins.resolve()
    sys.path.insert(0, str(plugins))
    os.environ['PYTHONPATH'] = os.pathsep.join([str(plugins), os.environ.get('PYTHONPATH', '')])
    trainings = Trainings(plugins)
    test = f'{ROOT}/tests/promises/test_promises.py::test_it_acts_and_weight_zero_is_plain_training_to_the_last_bit'
    status = pytest.main(['-p', 'no:cacheprovider', '--rootdir', str(ROOT), test, *rest], plugins=[trainings])
    args.out.write_text(json.dumps(trainings.found, indent=1) + '\n')
    if args.against:
        before = json.loads(args.against.read_text())
        for name in sorted({*before, *trainings.found}):
            print(f'{name}: {difference(before.get(name), trainings.found.get(name))}')
    return int(status)


if __name__ == '__main__':
    sys.exit(main())
