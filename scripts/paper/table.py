"""The table of docs/paper.md, from the kept results and nothing else."""

import json
from collections import defaultdict
from pathlib import Path

from common import RESULTS, ROOT, Result
from subspaces import holds, in_words
from verdicts import FAILED, HELD, MISSING, larger, spread, within

PAGE = ROOT / "docs" / "paper.md"
BEGIN, END = "<!-- table -->", "<!-- /table -->"
HEAD = "| claim of the paper | ours | seeds | command | verdict |\n|---|---|---|---|---|"
SHORT, LONG = "`make paper`", "`make paper-long`"


def write(page: Path = PAGE, folder: Path = RESULTS) -> None:
    """Put the table between the markers of the page."""
    text = page.read_text()
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(read(folder))}\n{END}{rest.split(END)[1]}")


def read(folder: Path = RESULTS) -> dict[str, Result]:
    """The kept results by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def table(results: dict[str, Result]) -> str:
    """One line a claim."""
    lines = [*mechanical(results), *subspaces(results), *scored(results), *absent(results)]
    return "\n".join([HEAD, *("| " + " | ".join(cells) + " |" for cells in lines)])


def row(claim: str, found: Result | None, ours: str, seeds: str, verdict: str) -> list[str]:
    """A line of what `make paper` measures."""
    return [claim, ours, seeds, SHORT, verdict] if found else [claim, "-", "-", SHORT, MISSING]


def mechanical(results: dict[str, Result]) -> list[list[str]]:
    """The start, latency, size, and the cost of a step."""
    lines = []
    one = results.get("start", {})
    equal = "bit-equal output" if one.get("equal") else "another output"
    lines.append(row("ΔW = 0 at the start (§4.1)", one, equal, "0", within(float(one.get("equal", 0)), 1, 1)))
    one = results.get("latency", {})
    ratio = one.get("ratio", {"merged": 0.0, "unmerged": 0.0})
    figures = f"merged {ratio['merged']:.3f} × base, unmerged {ratio['unmerged']:.3f} ×"
    lines.append(
        row("No latency after merging (§4.1, Table 1)", one, figures, "0", within(ratio["merged"], 0.97, 1.03))
    )
    one = results.get("size", {})
    megabytes = [one.get(key, 0) / 1e6 for key in ("adapter_bytes", "base_bytes")]
    ours = f"{megabytes[0]:.2f} MB beside {megabytes[1]:.1f} MB: 1/{one.get('ratio', 0):.0f}"
    claim = "Checkpoints are far smaller (§4.2; 1/10,000 for GPT-3): ≤ 1/100 here"
    lines.append(row(claim, one, ours, "0", within(one.get("ratio", 0), 100, 1e9)))
    one = results.get("step", {})
    held = one.get("state_bytes", {"lora": 0, "full": 1})
    less = held["lora"] / held["full"]
    claim = "Memory for weights, gradients and moments: down to a third (§4.2; computed, activations left out)"
    lines.append(row(claim, one, f"{less:.2f} of full fine-tuning", "-", within(less, 0, 0.34)))
    speed = 1 / one.get("ratio", {"lora": 1.0})["lora"]
    claim = "A step is 25 % faster than full fine-tuning's (§4.2)"
    lines.append(row(claim, one, f"{speed:.2f} × as fast", "0", within(speed, 1.25, 99)))
    return lines


def subspaces(results: dict[str, Result]) -> list[list[str]]:
    """Figures 3 and 4 and Table 7."""
    lines = []
    for name, claim in (
        ("phi-ranks", "Top direction of r = 8 lies in that of r = 64, φ > 0.5 (§7.2, Fig. 3; of two seeds here)"),
        ("phi-seeds", "Two seeds at r = 64 share more than random, 8 directions (§7.2, Fig. 4)"),
    ):
        one = results.get(name, {})
        phi, chance = (one.get(key, {"1": 0.0, "8": 0.0}) for key in ("phi", "random"))
        ours = f"φ(1,1) {phi['1']:.3f} (random {chance['1']:.3f}), φ(8,8) {phi['8']:.3f} (random {chance['8']:.3f})"
        verdict = within(phi["1"], 0.5, 1) if name == "phi-ranks" else within(phi["8"], 2 * chance["8"], 1)
        lines.append(row(claim, one, ours, "0, 1", verdict))
    one = results.get("amplification", {})
    change, along, own, chance = (one.get(k, 0.0) for k in ("change", "along_change", "along_own", "along_random"))
    ours = (
        f"‖ΔW‖ {change:.2f}; ‖UᵀW0V‖ {along:.2f} along ΔW, {own:.2f} along W0's own, {chance:.2f} random; "
        f"factor {one.get('factor', 0):.2f}"
    )
    verdict = within(one.get("factor", 0), 2, 1e9)
    lines.append(row("ΔW amplifies directions W0 does not emphasise, by ≥ 2 (§7.3, Table 7)", one, ours, "0", verdict))
    return lines


def scored(results: dict[str, Result]) -> list[list[str]]:
    """The trainings: Tables 5 and 6, and LoRA beside full fine-tuning and frozen features."""
    found, rows, seeds = defaultdict(list), 400, set()
    for one in results.values():
        if one.get("task") == "SST-2":
            found[one["job"]].append(one["accuracy"])
            rows = one["settings"]["eval_rows"]
            seeds.add(one["seed"])
    used = ", ".join(map(str, sorted(seeds))) or "-"

    def line(claim: str, jobs: tuple[str, ...], verdict: str) -> list[str]:
        return [claim, "; ".join(f"{job} {spread(found[job])}" for job in jobs), used, LONG, verdict]

    level = larger(found["qv-r8"], found["full"], rows)
    single = ("q-r8", "k-r8", "v-r8")
    best = max((found[job] for job in single if found[job]), key=lambda v: sum(v) / len(v), default=[])
    both = larger(found["qv-r4"], best, rows) if all(found[job] for job in single) else MISSING
    ranks = ("qv-r1", "qv-r2", "qv-r4", "qv-r8", "qv-r64")
    more = larger(found["qv-r64"], found["qv-r1"], rows)
    return [
        line("LoRA is on a par with full fine-tuning or better (Table 2), SST-2", ("qv-r8", "full"), level),
        line(
            "Adapting beats frozen features with a trained head, SST-2",
            ("qv-r8", "frozen"),
            larger(found["qv-r8"], found["frozen"], rows),
        ),
        line("q and v at r = 4 beat one matrix at r = 8 (Table 5), SST-2", ("qv-r4", *single), both),
        line(
            "r = 1 does as well as r = 64 (Table 6), SST-2",
            ranks,
            {HELD: FAILED, FAILED: HELD}.get(more, more),
        ),
    ]


def absent(results: dict[str, Result]) -> list[list[str]]:
    """What has no script or no result yet, said."""
    lines = [
        ["The same comparisons on CoLA (Matthews correlation, Table 2)", "-", "-", "-", MISSING],
        ["E2E NLG, BLEU (Table 3)", "-", "-", "-", MISSING],
    ]
    return [*lines, dimension(results.get("dimension"))]


def dimension(one: Result | None) -> list[str]:
    """The intrinsic dimension's row."""
    claim = "Low intrinsic dimension (§1, after Aghajanyan et al.), SST-2: ≤ 1 % of the weights for 90 % of the gain"
    if one is None:
        return [claim, "-", "-", "`make paper-long`", MISSING]
    seeds = ", ".join(sorted({str(point["seed"]) for point in one["points"]}))
    verdict = {True: HELD, False: FAILED, None: "no d90 exists"}[holds(one)]
    return [claim, in_words(one), seeds, "`make paper-long`", verdict]
