"""The table of docs/paper.md, from the kept results and nothing else."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rank_table
from common import RESULTS, ROOT, Result
from subspaces import holds, in_words
from verdicts import FAILED, HELD, MISSING, at_least, larger, spread, within

PAGE = ROOT / "docs" / "paper.md"
BEGIN, END = "<!-- table -->", "<!-- /table -->"
HEAD = "| claim of the paper | ours | seeds | command | verdict |\n|---|---|---|---|---|"
SHORT, LONG = "`make paper`", "`make paper-long`"


def write(page: Path = PAGE, folder: Path = RESULTS) -> None:
    """Put the tables between their markers of the page."""
    text, results = page.read_text(), read(folder)
    for begin, end, content in (
        (BEGIN, END, table(results)),
        (rank_table.BEGIN, rank_table.END, rank_table.table(results)),
    ):
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    page.write_text(text)


def read(folder: Path = RESULTS) -> dict[str, Result]:
    """The kept results by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def table(results: dict[str, Result]) -> str:
    """One line a claim."""
    lines = [*mechanical(results), *subspaces(results), *scored(results), dimension(results.get("dimension"))]
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
    held = one.get("peak_bytes", {"lora": 0, "full": 1})
    less = held["lora"] / held["full"]
    claim = "Memory of training: down to a third (§4.2); the process's peak, activations included"
    ours = f"{held['lora'] / 1e6:.0f} MB beside {held['full'] / 1e6:.0f} MB of full fine-tuning: {less:.2f}"
    lines.append(row(claim, one, ours, "0", within(less, 0, 0.34)))
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


@dataclass(frozen=True)
class Claim:
    """One comparison of trainings: `rule` on the scores of two jobs of a task; also: jobs shown beside them."""

    text: str
    task: str
    rule: Callable[..., str]
    ours: str
    other: str
    also: tuple[str, ...] = ()

    def line(self, results: dict[str, Result]) -> list[str]:
        """The claim's line."""
        jobs = (self.ours, *self.also, self.other)
        found = {job: _kept(results, self.task, job) for job in jobs}
        values = {job: [one["score"] for one in kept] for job, kept in found.items()}
        seeds = sorted({one["seed"] for kept in found.values() for one in kept})
        sampling = sum(_variance(found[job]) for job in (self.ours, self.other))
        verdict = self.rule(values[self.ours], values[self.other], sampling)
        figures = "; ".join(f"{job} {spread(scores)}" for job, scores in values.items())
        return [self.text, figures, ", ".join(map(str, seeds)) or "-", LONG, verdict]


def _kept(results: dict[str, Result], task: str, job: str) -> list[Result]:
    """The kept trainings of a job, by seed."""
    found = [one for one in results.values() if (one.get("task"), one.get("job")) == (task, job) and "score" in one]
    return sorted(found, key=lambda one: int(one["seed"]))


def _variance(kept: list[Result]) -> float:
    """Of one score, from the choice of rows."""
    return sum(one["error"] ** 2 for one in kept) / len(kept) if kept else 0.0


def scored(results: dict[str, Result]) -> list[list[str]]:
    """The trainings: Tables 2, 3, 5 and 6, and LoRA beside full fine-tuning and frozen features."""
    par = "LoRA is on a par with full fine-tuning or better"
    frozen = "Adapting beats frozen features with a trained head"
    single = {job: [one["score"] for one in _kept(results, "sst2", job)] for job in ("q-r8", "k-r8", "v-r8")}
    best = max(single, key=lambda job: sum(single[job]) / max(len(single[job]), 1))
    others = tuple(job for job in single if job != best)
    claims = (
        Claim(f"{par} (Table 2), SST-2, accuracy", "sst2", at_least, "qv-r8", "full"),
        Claim(f"{frozen}, SST-2", "sst2", larger, "qv-r8", "frozen"),
        Claim("q and v at r = 4 beat one matrix at r = 8 (Table 5), SST-2", "sst2", larger, "qv-r4", best, others),
        Claim(
            "r = 1 does as well as r = 64 (Table 6), SST-2",
            "sst2",
            at_least,
            "qv-r1",
            "qv-r64",
            ("qv-r2", "qv-r4", "qv-r8"),
        ),
        Claim(f"{par} (Table 2), CoLA, Matthews correlation", "cola", at_least, "qv-r8", "full"),
        Claim(f"{frozen}, CoLA", "cola", larger, "qv-r8", "frozen"),
        Claim(f"{par} (Table 3), E2E, BLEU, q and v as in the paper", "e2e", at_least, "qv-r8", "full"),
        Claim(f"{par}, E2E, BLEU, all linear layers", "e2e", at_least, "all-r8", "full"),
    )
    return [claim.line(results) for claim in claims]


def dimension(one: Result | None) -> list[str]:
    """The intrinsic dimension's row."""
    claim = "Low intrinsic dimension (§1, after Aghajanyan et al.), SST-2: ≤ 1 % of the weights for 90 % of the gain"
    if one is None:
        return [claim, "-", "-", "`make paper-long`", MISSING]
    seeds = ", ".join(sorted({str(point["seed"]) for point in one["points"]}))
    verdict = {True: HELD, False: FAILED, None: "no d90 exists"}[holds(one)]
    return [claim, in_words(one), seeds, "`make paper-long`", verdict]
