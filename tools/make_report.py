#!/usr/bin/env python3
"""Write the report of a run: runs/NAME/report.html, one file with its pictures inside.

    tools/make_report.py runs/smollm2_cpu

The report shows loss, accuracy and acceptance curves; acceptance length before and after training, if
tools/eval_acceptance.py has measured it; throughput, wait for data and memory; the resolved recipe; and the
commands that serve the draft with SGLang and vLLM. It reads only the files in the run folder.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder, such as runs/NAME")
    args = parser.parse_args()

    from eagle_ds.reporting.report import write_report

    try:
        print(write_report(args.run))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
