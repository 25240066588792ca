"""The final tables: ours, torch and XLA on each shape, as a fraction of the device's own ceilings."""

from __future__ import annotations

from typing import Any

from engine.bench.gpu_device.report import Report
from engine.bench.gpu_device.shapes import Shape
from engine.bench.timing import print_table

Ceilings = dict[str, tuple[float, str]]


def print_tables(report: Report) -> None:
    """Prints verdicts, ceilings, and a table for each section that was timed, as far as there are results."""
    _print_verdicts(report)
    ceiling = ceilings(report)
    if ceiling:
        print(", ".join(f"{name} {value:,.0f} {unit}" for name, (value, unit) in ceiling.items()))
    _print_speed(report, "decode", "gb_per_s", ("copy", "read"), ceiling)
    _print_speed(report, "prefill", "tflop_per_s", ("matmul",), ceiling)
    _print_layers(report, ceiling)
    _print_scatter(report)


def ceilings(report: Report) -> Ceilings:
    """The rates that the device reached, with units: GB/s of copy and read, TFLOP/s of matmul."""
    found = {}
    for task, result in report.results("ceilings"):
        key, unit = ("tflop_per_s", "TFLOP/s") if task["what"] == "matmul" else ("gb_per_s", "GB/s")
        found[task["what"]] = (result[key], unit)
    return found


def _print_verdicts(report: Report) -> None:
    checked = report.found.get("correctness", [])
    if not checked:
        return
    wrong = [entry for entry in checked if not entry.get("result", {}).get("ok", False)]
    print(f"correctness: {len(checked) - len(wrong)} of {len(checked)} cases are right")
    for entry in wrong:
        told = entry.get("result", {}).get("where") or entry.get("error") or entry.get("skipped")
        print(f"  {entry['task']['case']['name']}: {str(told)[:300]}")


def _print_speed(report: Report, section: str, rate: str, shares: tuple[str, ...], ceiling: Ceilings) -> None:
    """Every contender on each shape of a section; ``x ours`` is its time divided by that of our fastest."""
    names = dict.fromkeys(Shape.of(task["shape"]).name for task, _ in report.results(section))
    rows = []
    for name in names:
        contenders = _contenders(report, section, name)
        ours = min((result["us"] for label, result in contenders if label.startswith("ours")), default=None)
        for label, result in contenders:
            parts = [f"{result[rate] / ceiling[share][0]:.1%}" if share in ceiling else "" for share in shares]
            times = f"{result['us'] / ours:.2f}" if ours else ""
            rows.append([f"{name}: {label}", f"{result['us']:,.1f}", f"{result[rate]:,.0f}", *parts, times])
    if rows:
        unit = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s"}[rate]
        print()
        print_table([section, "µs", unit, *(f"of {share}" for share in shares), "x ours"], rows)


def _contenders(report: Report, section: str, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Label and result of every contender on the shape of this name, ours first."""
    found = []
    for task, result in report.results(section):
        if Shape.of(task["shape"]).name == name:
            found.append((f"{_whose(task)} page {task['shape']['page_size']}{_marks(result)}", result))
    rivals = []
    for rival in ("sdpa", "flex"):
        for task, result in report.results(rival):
            if Shape.of(task["shape"]).name == name:
                rivals.append((_rival(task), result))
    return found + sorted(rivals, key=lambda rival: float(rival[1]["us"]))


def _whose(task: dict[str, Any]) -> str:
    return "xla" if task["impl"] == "xla" else f"ours ({task['impl']})"


def _marks(result: dict[str, Any]) -> str:
    """Marks of a time that is not reliable."""
    return (", host-bound" if result["host_bound"] else "") + ("" if result["finite"] else ", NOT FINITE")


def _rival(task: dict[str, Any]) -> str:
    if "backend" not in task:
        return f"torch flex page {task['shape']['page_size']}"
    return f"torch {task['backend'].removesuffix('_attention')}{' folded' if task['folded'] else ''}"


def _print_layers(report: Report, ceiling: Ceilings) -> None:
    """Time per layer in a program of many layers, time to only read its cache, and time of the whole program."""
    rows = []
    for task, result in report.results("layers"):
        shape = Shape.of(task["shape"])
        floor = f"{shape.kv_bytes / ceiling['read'][0] / 1e3:,.1f}" if "read" in ceiling else ""
        whole = result["one_us"] * result["calls"]
        name = f"{result['calls']} x ({shape.name}): {_whose(task)}{_marks(result)}"
        rows.append([name, f"{result['us']:,.1f}", floor, f"{whole / 1e3:,.2f}"])
    if rows:
        print()
        print_table(["layers", "µs per layer", "µs to read", "ms in all"], rows)


def _print_scatter(report: Report) -> None:
    rows = [
        [f"{task['tokens']} tokens: {task['writer']}", f"{result['us']:,.1f}", f"{result['gb_per_s']:,.0f}"]
        for task, result in report.results("scatter")
    ]
    if rows:
        print()
        print_table(["scatter", "µs", "GB/s"], rows)
