"""What several test files use: small real runs of each toolkit, and processes to run them in."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
