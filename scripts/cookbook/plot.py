"""The curves of a campaign as one picture: python scripts/cookbook/plot.py benchmarks/results/cookbook

Runs with the cookbook's Python, which has matplotlib. Knows only the result files. Writes `curves.svg` beside them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

# One panel per recipe, in this order; a recipe without a file is left out.
PANELS = ("sl_loop", "chat_sl", "rl_importance_sampling", "rl_default_loss", "dpo", "on_policy_distillation")
COLUMNS = 3


def main(directory: Path) -> None:
    """Draw what is there."""
    results = {name: _read(directory / f"{name}.json") for name in PANELS if (directory / f"{name}.json").exists()}
    # A salt of its own keeps the file the same for the same curves.
    mpl.rcParams["svg.hashsalt"] = "treadle"
    rows = -(-len(results) // COLUMNS)
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 2.8 * rows), squeeze=False)
    for axis in axes.flat[len(results) :]:
        axis.remove()
    for axis, (name, result) in zip(axes.flat, results.items(), strict=False):
        for run in result["runs"]:
            axis.plot(run["curves"][run["verdict"]["metric"]], linewidth=1.2)
        axis.set_title(name, fontsize=10)
        axis.set_ylabel(result["runs"][0]["verdict"]["metric"], fontsize=8)
        axis.set_xlabel("logged point", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(directory / "curves.svg", metadata={"Date": None})


def _read(path: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]))
