"""Write `docs/engines.md` from runs of the tests: which model, in which dtype, in which engine, was shown to do what.

    python tools/generate_engines_docs.py [RUN.xml ...] [RUN.jsonl ...]

Without runs it writes the table of tested versions only. RUN.xml: `pytest --junitxml` of tests/engines, whose tests record a
`cell` each. RUN.jsonl: lines of `tests/gpu/vllm_matrix.py`.
Text above the first table is the document's own and kept.
"""

from __future__ import annotations

import ast
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from peerload.engines.versions import TESTED
from peerload.testing.families import FAMILIES

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "engines.md"
MARK = "<!-- Generated from here on by tools/generate_engines_docs.py -->\n"
ENGINES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "transformers": "transformers",
    "sglang to vllm": "A SGLang seed feeds vLLM",
    "vllm to sglang": "A vLLM seed feeds SGLang",
}


@dataclass
class Cell:
    """What was shown of one engine, family and dtype, by column ("same TP", "mixed TP"). refused: (with EP, reason)."""

    layouts: set[int] = field(default_factory=set)
    refused: set[tuple[bool, str]] = field(default_factory=set)
    cpu: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    gpu: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))

    def text(self, column: str) -> str:
        found, results = [], defaultdict(list)
        for pair, result in sorted(self.gpu[column].items()):
            results[result].append(pair)
        found += [f"tested on H200 ({', '.join(pairs)}{result})" for result, pairs in results.items()]
        if self.cpu[column]:
            found.append(f"tested on CPU ({', '.join(sorted(self.cpu[column]))})")
        if len(self.layouts) > (column == "mixed TP"):
            sizes = "" if self.layouts == {1, 2, 4} else f" of TP {', '.join(map(str, sorted(self.layouts)))}"
            found.append(f"layouts{sizes} tested on CPU")
        whole = sorted(reason for ep, reason in self.refused if not ep)
        found += [f"falls back: {reason}" for reason in whole]
        found += [f"with EP falls back: {reason}" for reason in sorted({r for ep, r in self.refused if ep} - set(whole))]
        return "; ".join(found) or "not run"


def cells_of(run: Path) -> Iterator[dict[str, object]]:
    """What the passed tests of a JUnit file have recorded."""
    for case in ElementTree.parse(run).iter("testcase"):  # noqa: S314 - our own file
        if case.find("failure") is None and case.find("error") is None and case.find("skipped") is None:
            for recorded in case.iter("property"):
                if recorded.get("name") == "cell":
                    yield ast.literal_eval(recorded.get("value", "{}"))


def column(seed_tp: int, tp: int) -> str:
    return "same TP" if seed_tp == tp else "mixed TP"


def collect(runs: Iterable[Path]) -> dict[tuple[str, str, str], Cell]:
    """By engine, family and quantization."""
    table: dict[tuple[str, str, str], Cell] = defaultdict(Cell)
    for run in runs:
        if run.suffix == ".jsonl":
            for row in map(json.loads, run.read_text().splitlines()):
                model, _, quantization = str(row["model"]).partition("-bf16")
                name, _, tail = model.removesuffix("-large").partition("-fp8")
                family = {"llama": "Llama", "qwen3-moe": "Qwen3-MoE"}[name]
                cell = table[row["engine"].split()[0], family, f"fp8{tail}" if tail else quantization or "bf16"]
                cell.gpu[column(row["seed_tp"], row["tp"])][f"{row['seed_tp']}->{row['tp']}"] = result_of(row)
            continue
        for told in cells_of(run):
            engine = str(told["engine"])
            if "seed_tp" in told:
                seed_tp, tp = int(str(told["seed_tp"])), int(str(told["tp"]))
                pair = f"{seed_tp}->{tp}"
                if "quantization" in told:
                    family, quantization = str(told["family"]), str(told["quantization"])
                    pair += " in one process"
                elif found := FAMILIES.get(str(told["family"])):
                    family, quantization = found.architecture, found.quantization
                else:  # made by transformers, for this test
                    family, quantization = str(told["family"]), "bf16"
                table[engine, family, quantization].cpu[column(seed_tp, tp)].add(pair)
                continue
            cell = table[engine, str(told["family"]), str(told["quantization"])]
            if told["result"] == "trace == probe":
                cell.layouts.add(int(str(told["tp"])))
            else:
                cell.refused.add((told.get("ep", 1) != 1, reason_of(str(told["result"]))))
    return table


def reason_of(result: str) -> str:
    """Why the engine loads it itself, in words: tests hold patterns of messages."""
    if result == "dropped":
        return "the engine's loader drops some of its tensors"
    return result.removeprefix("refused: ").replace("\\", "").replace("|", " or ")


def result_of(row: dict[str, object]) -> str:
    """What a line of the GPU matrix says, in a few words."""
    if "failed" in row or row["wrong"]:
        return " FAILED"
    sources = row["sources"]
    assert isinstance(sources, list)
    disk = [size for size, source in sources if str(source).startswith("disk:")]
    return f": computed by post-processing, {disk[0]} from disk" if disk else ""


def versions() -> str:
    rows = [f"| {ENGINES[engine]} | {t.version} | {t.how} |\n" for engine, releases in TESTED.items() for t in releases]
    return "\n## Tested versions\n\n| engine | version | what was run |\n|---|---|---|\n" + "".join(rows)


def main() -> int:
    document = DOCUMENT.read_text(encoding="utf-8")
    before, _, tables = document.partition(MARK)
    if len(sys.argv) < 2:
        tables = tables[tables.index("\n## vLLM\n") :]
        DOCUMENT.write_text(before + MARK + versions() + tables, encoding="utf-8")
        return 0
    table = collect(map(Path, sys.argv[1:]))
    order = {(f.architecture, f.quantization): i for i, f in enumerate(FAMILIES.values())}
    text = MARK + versions()
    for engine, title in ENGINES.items():
        rows = sorted((k for k in table if k[0] == engine), key=lambda k: order.get((k[1], k[2]), len(order)))
        if rows:
            text += f"\n## {title}\n\n| family | dtype | same TP | mixed TP |\n|---|---|---|---|\n"
            for key in rows:
                text += f"| {key[1]} | {key[2]} | {table[key].text('same TP')} | {table[key].text('mixed TP')} |\n"
    DOCUMENT.write_text(before + text, encoding="utf-8")
    sys.stdout.write(f"{len(table)} cells\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
