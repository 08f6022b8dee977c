"""The whole kill campaign from the command line; see scripts/kill_campaign."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import report
from kill_campaign import Campaign, Kill, plan, summary

# Kills on one data directory; then it is compared, thrown away, and the result so far is written.
KILLS_PER_LEG = 30
MAX_LEGS = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the data, the order of kills and their delays")
    parser.add_argument("--per-cell", type=int, default=10, help="kills of the worker and of the server at each phase")
    parser.add_argument("--resume", type=Path, default=None, help="an earlier result, whose kills count")
    report.add_arguments(parser)
    args = parser.parse_args()
    kills = [] if args.resume is None else [Kill(**kill) for kill in json.loads(args.resume.read_text())["kills"]]
    folder = Path(tempfile.mkdtemp(prefix="kill-campaign-"))
    campaign = Campaign(folder, seed=args.seed)
    context = report.context()
    campaign.write_reference()
    # A phase that does not come in time is tried again in a later leg, and given up in the end.
    for _ in range(MAX_LEGS):
        left = plan(args.per_cell, Counter(kill.cell for kill in [*kills, *campaign.kills]))
        if not left:
            break
        random.Random(args.seed + len(campaign.kills)).shuffle(left)
        campaign.run_leg(left[:KILLS_PER_LEG], on_kill=_say)
        report.write(report.path_of(args, "kills"), _result(context, args, campaign, [*kills, *campaign.kills]))
    result = _result(context, args, campaign, [*kills, *campaign.kills])
    rows = list(result["summary"]["cells"].items())
    report.print_table("Kills survived without a difference", ["phase / victim", "kills"], rows)
    report.print_table("Compared", ["what", "count"], list(result["compared"].items()))
    folder.rmdir()
    return 1 if left else 0


def _say(kill: Kill) -> None:
    print(f"{kill.cell}: back after {max(kill.pauses_s):.1f} s", flush=True)


def _result(context: dict[str, Any], args: argparse.Namespace, campaign: Campaign, kills: list[Kill]) -> dict[str, Any]:
    return {
        **context,
        "config": {"seed": args.seed, "per_cell": args.per_cell},
        "compared": {
            "answers": campaign.num_answers,
            "rounds": campaign.num_rounds,
            "final_states": campaign.num_states,
            "differences": 0,
            "client_errors": 0,
        },
        "summary": summary(kills),
        "kills": [asdict(kill) for kill in kills],
    }


if __name__ == "__main__":
    raise SystemExit(main())
