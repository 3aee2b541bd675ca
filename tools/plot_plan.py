#!/usr/bin/env python
"""Draw the sharding plan of a recipe: which rank owns which rows of its heaviest sequence.

    python tools/plot_plan.py recipes/llama3_128k.json plan.png
    python tools/plot_plan.py recipes/llama3_128k.json plan.png --parallel.ulysses 2 --parallel.ring 4

A band a rank: context rows (K_0 and V_0), query rows (the T steps) and
target rows (hidden states that labels are made from). With a captured store the sequence is the heaviest of the first
epoch; without one it is max_length tokens, or --fraction of them trained in turns of --turn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eagle_ds.config.outputs import PICTURES, check_output_file
from eagle_ds.config.recipe import load_recipe
from eagle_ds.estimate.plan import heaviest_sequence
from eagle_ds.estimate.planner import choose_ring_mode, in_turns, sharding_for
from eagle_ds.launch import enter_repository
from eagle_ds.sharding.ranges import Ranges
from eagle_ds.sharding.sequence import SequenceSharding

BANDS = (("context", "#4c72b0"), ("query", "#dd8452"), ("target", "#55a868"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("recipe", type=Path, help="recipes/NAME.json")
    parser.add_argument("png", type=Path, help="picture to write (.png, .svg or .pdf)")
    parser.add_argument("--fraction", type=float, help="plan a synthetic sample instead, with this fraction of its rows trained")
    parser.add_argument("--turn", type=int, default=512, help="with --fraction: trained tokens in a row (default 512)")
    options, overrides = parser.parse_known_args()
    try:
        enter_repository(options)
        check_output_file(options.png, "picture", PICTURES)
        recipe = load_recipe(options.recipe, overrides)
        if options.fraction is None:
            documents = heaviest_sequence(recipe, dp=1)[0]
        else:
            documents = [in_turns(recipe.data.max_length, options.fraction, options.turn)]
        mode = choose_ring_mode(recipe, sum(d.num_tokens for d in documents), 2, float("inf"))
        draw(sharding_for(recipe, documents, mode), recipe.name, options.png)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"wrote {options.png}")


def draw(plan: SequenceSharding, name: str, png: Path) -> None:
    """One band a rank and kind of row, over the rows of the sequence."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(12, 1.5 + 0.45 * plan.world))
    for start, _ in plan.document_bounds()[1:]:
        axes.axvline(start, color="0.8", linewidth=0.5)
    for rank in range(plan.world):
        shares: tuple[Ranges, ...] = (plan.context[rank], plan.queries[rank], plan.target_rows(rank))
        for place, ((kind, colour), rows) in enumerate(zip(BANDS, shares, strict=True)):
            bars = [(start, stop - start) for start, stop in rows]
            axes.broken_barh(bars, (rank + 0.27 * place, 0.25), color=colour, label=kind if rank == 0 else None)
    balance = ", ".join(f"{kind} {value:.3f}" for kind, value in plan.balance.items())
    axes.set_title(f"{name}: ulysses {plan.ulysses} x ring {plan.ring}, busiest rank / mean: {balance}", fontsize=10)
    axes.set(xlabel="row of the sequence", ylabel="sequence-parallel rank", xlim=(0, plan.num_tokens), ylim=(plan.world, -0.1))
    axes.set_yticks([rank + 0.4 for rank in range(plan.world)], [str(rank) for rank in range(plan.world)])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.9 / (1.5 + 0.45 * plan.world)), ncols=3, frameon=False)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
