"""Compare two objectives with the same data, seed and number of epochs, by a significance test on the same queries.

    python examples/compare_objectives.py

`twotower compare DATA --objectives a,b --out DIR` does this for any number of objectives and seeds, each run in its
own process, and writes a report. This program is the core of it.
"""

from quickstart import purchases

import twotower as tt

OBJECTIVES = ("expected-count", "in-batch")  # corrected by construction; uncorrected, as most code does it
METRIC = "NDCG@20"


def main() -> None:
    """Train a model with each objective, and compare the metric query by query."""
    split = tt.splits.leave_last_out(tt.Interactions.from_frame(purchases()))
    per_query = {}
    for objective in OBJECTIVES:
        settings = [f"objective={objective}", "training.max_epochs=8", "training.batch_size=128", "training.seed=0"]
        model = tt.fit(split, tt.Config.load(overrides=settings))
        row = tt.evaluate(model, split.test).rows[0]  # the model; the baselines follow
        per_query[objective] = row.per_query[METRIC]
        print(
            f"{objective}: {METRIC} {row.values[METRIC]:.3f}, coverage of the catalog {row.values['coverage@20']:.2f}"
        )

    first, second = (per_query[objective] for objective in OBJECTIVES)
    found = tt.evaluation.paired_comparison(first, second)
    interval = f"95 % interval {found.low:+.3f} to {found.high:+.3f}"
    print(f"difference {found.difference:+.3f}, {interval}, p = {found.p_value:.3f}, {found.num_queries} queries")
    print("the interval is over queries, for one seed: run several seeds before you believe a difference")


if __name__ == "__main__":
    main()
