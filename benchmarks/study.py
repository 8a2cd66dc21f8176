"""Run the reference study: bias and spread of every form and pool on synthetic catalogs.

python benchmarks/study.py --json benchmarks/results/study.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from reference_study.study import study
from rich.console import Console


def main() -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=1500, help="Redraws for each cell.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="File for the results.")
    arguments = parser.parse_args()
    found = study(draws=arguments.draws, seed=arguments.seed)
    Console().print(found)
    if arguments.json:
        arguments.json.write_text(json.dumps(found.to_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
