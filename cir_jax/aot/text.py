"""A report as lines of text, at most 98 characters wide."""

from collections.abc import Sequence
from typing import Any

NOTE = "not measured on hardware"
_LABEL = f"{NOTE}; estimate: the compiler's and a model of the links; ideal: a roofline"


def of_report(report: dict[str, Any]) -> str:
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    lines = [
        f"{report['config']} on {report['topology']}, {report['chips']} chips: {verdict}, "
        f"{report['usable_gib']:.2f} GiB of a device are usable",
        "",
        *_memory(report),
    ]
    for program in report["programs"]:
        if not program["fits"]:
            lines.append(refusal(report, program))
    lines += ["", *_buffers(report)]
    if any("estimate" in program for program in report["programs"]):
        lines += ["", *_programs(report)]
    if "decode" in report:
        lines += ["", *_decode(report)]
    if "step" in report:
        lines += ["", *_step(report)]
    if report.get("overrides"):
        lines += ["", "overrides: " + " ".join(report["overrides"])]
    return "\n".join(lines)


def of_slices(reports: Sequence[dict[str, Any]]) -> str:
    """A line for each slice."""
    rows = [
        ("slice", "chips", "fits", "GiB", "usable", "update", "decode", "step s", "chip-h", "cost")
    ]
    for report in reports:
        step = report.get("step", {})
        update = [p for p in report["programs"] if p["program"] == "update" and "estimate" in p]
        seconds = update[0]["estimate"]["seconds"] if update else None
        rate = update[0]["tokens"] / seconds / report["chips"] if seconds else None
        bucket = step.get("lengths", {}).get("bucket", 0)
        decode = [x for x in report.get("decode", ()) if x["bucket"] >= bucket]
        rows.append(
            (
                report["topology"],
                str(report["chips"]),
                "yes" if report["fits"] else "no",
                number(max(p["live_gib"] for p in report["programs"]), 2),
                number(report["usable_gib"], 2),
                number(rate, 0),
                number(decode[0]["tokens_per_s_per_chip"] if decode else None, 0),
                number(step.get("seconds"), 0),
                number(step.get("chip_hours"), 0),
                number(step.get("cost"), 0),
            )
        )
    lines = [*table(rows), "update, decode: tokens/s/chip by the compiler's estimate, " + NOTE]
    for report in reports:
        if report.get("overrides"):
            lines.append(f"{report['topology']}: " + " ".join(report["overrides"]))
    return "\n".join(lines)


def refusal(report: dict[str, Any], program: dict[str, Any]) -> str:
    """One line with the numbers."""
    return (
        f"{program['program']} does not fit: needs {program['live_gib']:.2f} GiB with what is "
        f"held beside it, of {report['usable_gib']:.2f} usable"
    )


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns padded, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def number(value: float | None, digits: int = 1) -> str:
    return "?" if value is None else f"{value:,.{digits}f}"


def _memory(report: dict[str, Any]) -> list[str]:

    def listed(sizes: dict[str, float]) -> str:
        return ", ".join(f"{name} {size:.2f}" for name, size in sizes.items())

    rows = [("GiB of a device", "fits", "program", "with all held", "compiled, s", "host GiB")]
    for p in report["programs"]:
        rows.append(
            (
                p["program"],
                "yes" if p["fits"] else "no",
                number(p["gib"], 2),
                number(p["live_gib"], 2),
                number(p["compile_s"], 0),
                number(p["host_gib"], 2),
            )
        )
    return [
        *table(rows),
        f"held through the run, GiB: {listed(report['held_gib'])}; through a rollout besides: "
        f"{listed(report['rollout_gib'])}",
    ]


def _buffers(report: dict[str, Any]) -> list[str]:
    lines = []
    largest = max(report["programs"], key=lambda p: p["live_gib"])
    lines.append(f"largest buffers of {largest['program']}, MiB:")
    for buffer in largest["top_buffers"][:5]:
        lines.append(f"  {buffer['bytes'] / 2**20:8.0f}  {buffer['shapes'][:84]}")
    return lines


def _programs(report: dict[str, Any]) -> list[str]:
    header = ("estimate", "tokens", "s", "compute", "attention", "blocking", "overlapped", "ideal")
    rows = [header]
    collectives = []
    for p in report["programs"]:
        if "estimate" not in p:
            continue
        parts = ("seconds", "compute_s", "attention_s", "blocking_s", "overlapped_s")
        seconds = [number(p["estimate"][part], 2) for part in parts]
        tokens = f"{p['tokens']:,}" if "tokens" in p else ""
        rows.append((p["program"], tokens, *seconds, number(p["ideal_s"], 2)))
        blocking, beside = (
            [c for c in p["collectives"] if c["blocking"] == wanted] for wanted in (True, False)
        )
        collectives.append(
            f"  {p['program']}: {sum(c['count'] for c in blocking):,} blocking, "
            f"{sum(c['bytes'] for c in blocking) / 1e9:,.1f} GB; "
            f"{sum(c['count'] for c in beside):,} overlapped, "
            f"{sum(c['bytes'] for c in beside) / 1e9:,.1f} GB"
            + (f"; model FLOPs {p['model_flops']:.3g}" if "model_flops" in p else "")
        )
    return [_LABEL, *table(rows), "collectives of a device:", *collectives]


def _decode(report: dict[str, Any]) -> list[str]:
    rows = [("decode step, longest row", "GB", "x ideal", "ms", "ideal ms", "tok/s/chip", "ideal")]
    for line in report["decode"]:
        seconds = line["estimate"]["seconds"]
        rows.append(
            (
                f"{line['bucket']:,}",
                number(line["bytes"] / 1e9, 2),
                number(line["bytes_ratio"], 3),
                number(seconds and seconds * 1e3),
                number(line["ideal_s"] * 1e3),
                number(line["tokens_per_s_per_chip"], 0),
                number(line["ideal_tokens_per_s_per_chip"], 0),
            )
        )
    return [_LABEL, *table(rows)]


def _step(report: dict[str, Any]) -> list[str]:
    step = report["step"]
    lengths = step["lengths"]
    rows = [("an RL step, seconds", "estimate", "ideal")]
    for name, phase in step["phases"].items():
        rows.append((name, number(phase["seconds"]), number(phase["ideal_s"])))
    rows.append(("all", number(step["seconds"]), number(step["ideal_s"])))
    cost = f", {step['cost']:,.0f} at {step['price']:g} a chip's hour" if "cost" in step else ""
    return [
        _LABEL,
        *table(rows),
        f"{step['tokens_per_s_per_chip']:,.0f} tokens/s/chip; {step['steps']} steps: "
        f"{step['chip_hours']:,.0f} chip-hours{cost}",
        f"of {lengths['response']} tokens a response, {lengths['prompt']} a prompt, slots always "
        "full, no waiting for programs",
    ]
