"""Compares finished MMPretrain runs on their test sets: table, reliability diagram, risk-coverage plot.

    python tools/report.py OUT NAME=WORK_DIR[,WORK_DIR...] [NAME=...] [--ood FOLDER]

    python tools/report.py work_dirs/report plain=work_dirs/plain_0,work_dirs/plain_1 'PS-KD=work_dirs/pskd_0'

Runs given under one name are averaged (seeds). Each work dir's own config says which test set is used.
"""

import argparse

from selfkd_mmengine.report import run_groups
from selfkd_mmpretrain.report import predict, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', help='folder for table.md, runs.json, reliability.png, risk_coverage.png')
    parser.add_argument(
        '--ood', metavar='FOLDER', help='images of another kind: adds AUROC, AUPR, FPR95 and ood_roc.png'
    )
    parser.add_argument('groups', nargs='+', metavar='NAME=WORK_DIR[,WORK_DIR...]')
    args = parser.parse_args()
    try:
        work_dirs = run_groups(args.groups)
    except ValueError as error:
        parser.error(str(error))
    groups = {name: [predict(folder, ood=args.ood) for folder in folders] for name, folders in work_dirs.items()}
    print(write_report({'': groups}, args.out))
    print(f'\nwrote {args.out}')


if __name__ == '__main__':
    main()
