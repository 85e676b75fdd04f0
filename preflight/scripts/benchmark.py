"""Measure the preflight and its peers on the collection of set-ups, and write docs/benchmark.md.

Run each tool in an environment that has it. Its figures go into docs/benchmark.json, of which the
page is made:

    export OMP_NUM_THREADS=1
    python preflight/scripts/benchmark.py measure causal-preflight
    python preflight/scripts/benchmark.py measure torch-audit
    python preflight/scripts/benchmark.py measure traincheck  # half an hour
    python preflight/scripts/benchmark.py page
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1]
DATA, PAGE = FOLDER / "docs/benchmark.json", FOLDER / "docs/benchmark.md"
TEMPLATE = Path(__file__).with_name("benchmark_template.md")
SEEDS = (0,)
LABELS = ("shift", "pad", "causal", "reduction", "eos", "position")
STEPS = 3  # optimizer steps of a set-up that torch-audit and TrainCheck see
Run = dict[str, Any]  # "case", "label" and "twin" (None where right), "found" per seed
sys.path[:0] = [str(FOLDER / "src"), str(FOLDER / "tests")]


def cpu_seconds() -> float:
    """CPU time of this process and of its children, which other load does not change."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def run_preflight(setup: Any, seed: int) -> list[str]:
    """The labels of the findings."""
    from causal_preflight import preflight

    model, batch, loss_fn, options = setup
    return list(preflight(model, batch, loss_fn, seed=seed, **options).faults)


def run_torch_audit(setup: Any, seed: int) -> list[str]:
    """The rules that optimizer steps break, as `autopatch` reports them; no hardware hints."""
    import torch
    from torch_audit import Severity, autopatch

    model, batch, loss_fn, _ = setup
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    auditor = autopatch(model.train(), optimizer=optimizer, every_n_steps=1, reporters=[])
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_fn(model, batch) if loss_fn else model(**batch).loss
        if loss.requires_grad:  # otherwise the loss has called backward itself
            loss.backward()
        optimizer.step()
    found = auditor.finish(report=False).findings
    auditor.unpatch()
    warnings = {f.rule_id for f in found if f.severity >= Severity.WARN}
    return sorted(x for x in warnings if not x.startswith("TA2"))


def measure(run: Callable[[Any, int], list[str]]) -> dict[str, Any]:
    """What the tool reports on every set-up with every seed, and the median of its seconds."""
    from audit_cases import FAULTY, RIGHT

    cases = [(name, None, None, build) for name, build in RIGHT.items()]
    cases += [(name, label, twin, build) for name, (label, twin, build) in FAULTY.items()]
    runs, seconds = list[Run](), list[float]()
    for name, label, twin, build in cases:
        found = []
        for seed in SEEDS:
            setup, started = build(seed), cpu_seconds()
            try:
                found.append(run(setup, seed))
            except Exception as error:
                found.append([f"raised {type(error).__name__}"])
            seconds.append(cpu_seconds() - started)
        runs.append({"case": name, "label": label, "twin": twin, "found": found})
    return {"seconds": round(statistics.median(seconds), 2), "runs": runs}


def measure_traincheck() -> dict[str, Any]:
    """Infer invariants from a right program, and check them on others, by the tool's commands.

    The set-up `plain` with seed 0 is the reference. Checked are the same with seed 1, and the first
    faulty set-up of each label whose right twin is `plain`.
    """
    from audit_cases import FAULTY

    first = {label: name for name, (label, twin, _) in [*FAULTY.items()][::-1] if twin == "plain"}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def command(tool: str, *arguments: str) -> str:
            done = subprocess.run(
                [Path(sys.executable).with_name(f"traincheck-{tool}"), *arguments],
                cwd=work, capture_output=True, text=True, check=True,
            )  # fmt: skip
            return done.stdout

        def trace(name: str, build: str, seed: int, *arguments: str) -> str:
            program = PROGRAM.format(paths=sys.path[:2], build=build, seed=seed, steps=STEPS)
            (work / f"{name}.py").write_text(program)
            options = ("--models-to-track", "model", "--output-dir", f"{name}_trace")
            command("collect", "--pyscript", f"{name}.py", *options, *arguments)
            return f"{name}_trace"

        started = cpu_seconds()
        command("infer", "-f", trace("reference", "RIGHT['plain']", 0), "-o", "invariants.json")
        reference = cpu_seconds() - started
        programs = [("plain", None, "RIGHT['plain']")]
        programs += [(name, label, f"FAULTY['{name}'][2]") for label, name in first.items()]
        runs, seconds, on_right = list[Run](), list[float](), set[str]()
        for name, label, build in programs:  # the right one first
            started = cpu_seconds()
            traced = trace(name, build, 1, "--invariants", "invariants.json")
            command("check", "-f", traced, "-i", "invariants.json", "-o", f"{name}_result")
            seconds.append(cpu_seconds() - started)
            twin = "plain" if label else None
            found = violations(work / f"{name}_result")
            on_right = on_right if label else found
            both = len(found & on_right)
            seen = [f"{both} invariants that the right run violates"] if both else []
            seen += sorted(found - on_right)
            runs.append({"case": name, "label": label, "twin": twin, "found": [seen]})
    figures = {"seconds": round(statistics.median(seconds), 1), "reference": round(reference, 1)}
    return {**figures, "runs": runs}


def violations(folder: Path) -> set[str]:
    """The invariants that a check found violated, as text, from logs of JSON objects in a row."""
    found, decoder = set[str](), json.JSONDecoder()
    for log in folder.rglob("failed.log"):
        text = log.read_text().strip()
        while text:
            violation, end = decoder.raw_decode(text)
            found.add(violation["invariant"]["text_description"])
            text = text[end:].strip()
    return found


PROGRAM = """\
import sys
sys.path[:0] = {paths}
import torch
from traincheck import annotate_stage
from audit_cases import FAULTY, RIGHT
annotate_stage("init")
build = {build}
model, _, loss_fn, _ = build({seed})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
annotate_stage("training")
for step in range({steps}):
    optimizer.zero_grad()
    loss = loss_fn(model, build({seed} + step)[1])
    loss.backward()
    optimizer.step()
"""


def summarize(runs: list[Run]) -> dict[str, list[bool]]:
    """Per run whether it is told apart (all, and of each label), named exactly, or an alarm.

    A faulty run is told apart if something is reported that is not reported on the right twin with
    the same seed; it is named if its label alone is reported. A right run with any report is an
    alarm.
    """
    right = {run["case"]: run["found"] for run in runs if run["label"] is None}
    told: dict[str, list[bool]] = {key: [] for key in ("told", "named", *LABELS)}
    for run in (run for run in runs if run["label"]):
        for found, on_twin in zip(run["found"], right[run["twin"]], strict=True):
            apart = bool(set(found) - set(on_twin))
            told["told"].append(apart)
            told[run["label"]].append(apart)
            told["named"].append(found == [run["label"]])
    return {**told, "alarms": [bool(found) for runs in right.values() for found in runs]}


TOOLS: dict[str, Callable[[], dict[str, Any]]] = {
    "causal-preflight": lambda: measure(run_preflight),
    "torch-audit": lambda: measure(run_torch_audit),
    "traincheck": measure_traincheck,
}


def environment() -> dict[str, str]:
    """Versions and the processor, as the page names them."""
    info = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    processor = next((x.split(": ")[1] for x in info.splitlines() if "model name" in x), "unknown")
    return {"python": platform.python_version(), "torch": version("torch"), "processor": processor}


def dump(data: dict[str, Any]) -> str:
    """JSON with one set-up a line."""
    tools = []
    for tool, figures in data.items():
        head = json.dumps({k: v for k, v in figures.items() if k != "runs"})
        rows = ",\n  ".join(map(json.dumps, figures["runs"]))
        tools.append(f'{json.dumps(tool)}: {head[:-1]}, "runs": [\n  {rows}\n]}}')
    return "{\n" + ",\n".join(tools) + "\n}\n"


def of(hits: list[bool]) -> str:
    """`3 of 69`; a dash where there is nothing to count."""
    return f"{sum(hits)} of {len(hits)}" if hits else "–"


def page(data: dict[str, Any]) -> str:
    """The Markdown page of the figures."""
    figures = {name: summarize(tool["runs"]) for name, tool in data.items()}
    rows = [
        ["", *(f"{name} {tool['version']}" for name, tool in data.items())],
        ["---", *("---:" for _ in data)],
        ["faulty runs told apart from the right twin", *(of(x["told"]) for x in figures.values())],
        ["right runs with an alarm", *(of(x["alarms"]) for x in figures.values())],
        ["CPU seconds a run, median", *(f"{tool['seconds']:g}" for tool in data.values())],
        ["CPU seconds for a reference", *(f"{t.get('reference', 0):g}" for t in data.values())],
    ]
    rows += [[f"told apart: {x}", *(of(f[x]) for f in figures.values())] for x in LABELS]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    named = of(figures["causal-preflight"]["named"])
    cases = data["causal-preflight"]["runs"]
    where = {f"Python {t['python']}, torch {t['torch']}, {t['processor']}" for t in data.values()}
    return TEMPLATE.read_text(encoding="utf-8").format(
        table=table, named=named, faulty=sum(bool(x["label"]) for x in cases),
        right=sum(not x["label"] for x in cases), steps=STEPS, where="; ".join(sorted(where)),
        seeds=", ".join(map(str, SEEDS)),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("measure", "page"))
    parser.add_argument("tool", nargs="?", choices=TOOLS)
    chosen = parser.parse_args()
    if chosen.command == "page":
        PAGE.write_text(page(json.loads(DATA.read_text(encoding="utf-8"))), encoding="utf-8")
    elif chosen.tool is None:
        parser.error(f"measure needs a tool: {', '.join(TOOLS)}")
    else:
        figures = {"version": version(chosen.tool), **environment(), **TOOLS[chosen.tool]()}
        data = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
        data[chosen.tool] = figures
        text = dump({tool: data[tool] for tool in TOOLS if tool in data})
        DATA.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
