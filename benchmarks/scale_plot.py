"""The plot of benchmarks/scale.py."""

from pathlib import Path
from typing import Any


def plot(results: dict[str, Any], path: Path) -> None:
    """Plot time and memory against N and against B as SVG."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "scale"
    from matplotlib import pyplot as plt  # noqa: PLC0415

    parts = [(results["catalogs"], "items", "catalog size N"), (results["batches"], "rows", "batch size B")]
    figure, axes = plt.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex="col")
    for column, (rows, key, label) in enumerate(parts):
        at = [row[key] for row in rows]
        axes[0, column].plot(at, [row["step_ms"] for row in rows], "o-", color="#33566e", label="whole step")
        limit = [row["step_ms"] / row["step_over_products"] for row in rows]
        axes[0, column].plot(at, limit, "s--", color="#b5651d", label="matrix products alone")
        axes[1, column].plot(
            at, [row.get("peak_mib", float("nan")) for row in rows], "o-", color="#33566e", label="peak memory"
        )
        if key == "items":
            own = [row["tables_mib"] for row in rows]
            axes[1, column].plot(at, own, "s--", color="#b5651d", label="tables and their state")
        else:
            axes[1, column].set_ylim(100, 3 * max(row.get("peak_mib", 100.0) for row in rows))
        axes[0, column].set(xscale="log", yscale="log", ylabel="ms per step")
        axes[1, column].set(xscale="log", yscale="log", xlabel=label, ylabel="MiB")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3, which="both")
            axis.legend(frameon=False)
        if key == "items":
            axes[0, column].set_ylim(min(limit) / 3, max(row["step_ms"] for row in rows) * 3)
    axes[0, 0].set_title(f"B = {parts[0][0][0]['rows']:,}, as many distinct items at every N")
    axes[0, 1].set_title(f"N = {parts[1][0][0]['items']:,}")
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")
