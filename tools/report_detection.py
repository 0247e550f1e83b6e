"""Compares finished MMDetection runs on their test sets: a table of mAP and calibration, and drawn detections.

    python tools/report_detection.py OUT NAME=WORK_DIR[,WORK_DIR...] [NAME=...]

Runs given under one name are averaged (seeds); the pictures show the first of each. Each work dir's own config says
which test set and metrics are used (VOCMetric and selfkd_mmdet.DetectionCalibration).
"""

import argparse
from pathlib import Path

from selfkd_mmdet.report import detect, draw, table
from selfkd_mmengine.report import run_groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', help='folder for table.md and detections.png')
    parser.add_argument('groups', nargs='+', metavar='NAME=WORK_DIR[,WORK_DIR...]')
    args = parser.parse_args()
    try:
        work_dirs = run_groups(args.groups)
    except ValueError as error:
        parser.error(str(error))
    groups = {name: [detect(folder) for folder in folders] for name, folders in work_dirs.items()}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    text = table(groups)
    (out / 'table.md').write_text(text + '\n')
    draw(groups, str(out / 'detections.png'))
    print(f'{text}\n\nwrote {out}')


if __name__ == '__main__':
    main()
