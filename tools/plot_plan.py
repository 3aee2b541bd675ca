#!/usr/bin/env python3
"""Draw the sharding of a recipe: which rank owns which rows of its heaviest sequence.

    python tools/plot_plan.py recipes/llama3_128k.json plan.png
    python tools/plot_plan.py recipes/llama3_128k.json plan.png --parallel.ulysses 2 --parallel.ring 4

Each rank has three bands: context rows (K_0 and V_0), query rows (the TTT steps) and target rows (their
hidden states give the labels). With a captured store, the sequence is the heaviest one of the first epoch.
Without a store, it is one sample of max_length tokens, all trained. --fraction draws a synthetic sample
instead, trained in turns of --turn tokens.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eagle_ds.config.outputs import PICTURES, check_output_file
from eagle_ds.config.recipe import load_own_recipe
from eagle_ds.estimate.fit import choose_ring_mode
from eagle_ds.estimate.sequences import document_in_turns, heaviest_sequence, sharding_for
from eagle_ds.launch import enter_repository
from eagle_ds.sharding.ranges import Ranges
from eagle_ds.sharding.sequence import SequenceSharding

BANDS = (("context", "#4c72b0"), ("query", "#dd8452"), ("target", "#55a868"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("recipe", type=Path, help="recipes/NAME.json")
    parser.add_argument("png", type=Path, help="picture to write (.png, .svg or .pdf)")
    parser.add_argument(
        "--fraction", type=float, help="draw a synthetic sample with this fraction of its tokens trained"
    )
    parser.add_argument(
        "--turn", type=int, default=512, help="with --fraction: consecutive trained tokens (default 512)"
    )
    options, overrides = parser.parse_known_args()
    try:
        enter_repository(options)
        check_output_file(options.png, "picture", PICTURES)
        recipe = load_own_recipe(options.recipe, overrides)
        if options.fraction is None:
            documents = heaviest_sequence(recipe, dp=1)[0]
        else:
            documents = [document_in_turns(recipe.data.max_length, options.fraction, options.turn)]
        mode = choose_ring_mode(recipe, sum(d.num_tokens for d in documents), 2, float("inf"))
        draw(sharding_for(recipe, documents, mode), recipe.name, options.png)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.png}")


def draw(sharding: SequenceSharding, name: str, png: Path) -> None:
    """Draw one band per rank and kind of row over the rows of the sequence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 1.5 + 0.45 * sharding.world))
    for start, _ in sharding.document_bounds()[1:]:
        axes.axvline(start, color="0.8", linewidth=0.5)
    for rank in range(sharding.world):
        shares: tuple[Ranges, ...] = (
            sharding.context[rank],
            sharding.queries[rank],
            sharding.target_rows(rank),
        )
        for place, ((kind, colour), rows) in enumerate(zip(BANDS, shares, strict=True)):
            bars = [(start, stop - start) for start, stop in rows]
            axes.broken_barh(
                bars, (rank + 0.27 * place, 0.25), color=colour, label=kind if rank == 0 else None
            )
    balance = ", ".join(f"{kind} {value:.3f}" for kind, value in sharding.balance.items())
    axes.set_title(
        f"{name}: ulysses {sharding.ulysses} x ring {sharding.ring}, busiest rank / mean: {balance}",
        fontsize=10,
    )
    axes.set(
        xlabel="row of the sequence",
        ylabel="sequence-parallel rank",
        xlim=(0, sharding.num_tokens),
        ylim=(sharding.world, -0.1),
    )
    axes.set_yticks(
        [rank + 0.4 for rank in range(sharding.world)], [str(rank) for rank in range(sharding.world)]
    )
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.9 / (1.5 + 0.45 * sharding.world)), ncols=3, frameon=False
    )
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
