"""The last words: ours beside torch's and XLA's on each shape, and how near to the device's own ceilings."""

from __future__ import annotations

from typing import Any

from engine.bench.gpu_device.report import Report
from engine.bench.gpu_device.shapes import Shape
from engine.bench.timing import print_table


def print_tables(report: Report) -> None:
    """Prints what there is of: verdicts, ceilings, decode, prefill."""
    checked = report.found.get("correctness", [])
    if checked:
        right = sum(entry.get("result", {}).get("ok", False) for entry in checked)
        print(f"correctness: {right} of {len(checked)} cases are right")
        for entry in checked:
            if not entry.get("result", {}).get("ok", False):
                told = entry.get("result", {}).get("where") or entry.get("error") or entry.get("skipped")
                print(f"  {entry['task']['case']['name']}: {str(told)[:300]}")
    ceiling = ceilings(report)
    print(", ".join(f"{name} {value:,.0f} {unit}" for name, (value, unit) in ceiling.items()))
    _print_speed(report, "decode", "gb_per_s", [("of copy", "copy"), ("of read", "read")], ceiling)
    _print_speed(report, "prefill", "tflop_per_s", [("of matmul", "matmul")], ceiling)


def ceilings(report: Report) -> dict[str, tuple[float, str]]:
    """What the device itself reached, with the unit: GB/s of copy and read, TFLOP/s of matmul."""
    found = {}
    for task, result in report.results("ceilings"):
        key, unit = ("tflop_per_s", "TFLOP/s") if task["what"] == "matmul" else ("gb_per_s", "GB/s")
        found[task["what"]] = (result[key], unit)
    return found


def _print_speed(
    report: Report,
    section: str,
    rate: str,
    shares: list[tuple[str, str]],
    ceiling: dict[str, tuple[float, str]],
) -> None:
    ours = report.results(section)
    if not ours:
        return
    unit = {"gb_per_s": "GB/s", "tflop_per_s": "TFLOP/s"}[rate]
    header = [section, "µs", unit, *(title for title, _ in shares)]
    rows = []
    names = list(dict.fromkeys(Shape.of(task["shape"]).name for task, _ in ours))
    for name in names:
        for label, result in _contenders(report, section, name):
            parts = [f"{result[rate] / ceiling[key][0]:.0%}" if key in ceiling else "" for _, key in shares]
            rows.append([f"{name}: {label}", f"{result['us']:,.1f}", f"{result[rate]:,.0f}", *parts])
    print()
    print_table(header, rows)


def _contenders(report: Report, section: str, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Label and result of all that did the shape of this name."""
    found = []
    for task, result in report.results(section):
        if Shape.of(task["shape"]).name == name:
            marks = "!" * (result["host_bound"] + 2 * (not result["finite"]))
            found.append((f"{task['impl']} page {task['shape']['page_size']}{marks}", result))
    rivals = [
        (f"torch {task['backend'].removesuffix('_attention')}{' folded' if task['folded'] else ''}", result)
        for task, result in report.results("sdpa")
        if Shape.of(task["shape"]).name == name
    ]
    return found + sorted(rivals, key=lambda rival: rival[1]["us"])
