from pathlib import Path

from bench.batch_norm_images import BUDGETS, KINDS, runs, table
from bench.runs import Results


def test_runs_of_a_seed_differ_in_the_statistics_alone() -> None:
    for budget in BUDGETS.values():
        seed = runs(budget, 2)[: len(KINDS)]
        assert [run.spec["training"].pop("batch_norm") for run in seed] == list(KINDS)
        assert all(run.spec == seed[0].spec for run in seed)
        assert len({run.name for run in runs(budget, 2)}) == 2 * len(KINDS)


def test_table_compares_what_is_done_with_the_first_kind(tmp_path: Path) -> None:
    results = Results(tmp_path / "lines.jsonl")
    for run in runs(BUDGETS["cifar100"], 2)[:5]:
        results.add(run, {"accuracy": {"measured": 0.2, "views": 0.25, "running": 0.3}[run.row] + run.seed / 100})
    rows = table(BUDGETS.values(), 2, results).splitlines()[2:]
    assert rows == [
        "| cifar100 6000 x 10 | `measured` | 2 | 20.50 | – |",
        "| cifar100 6000 x 10 | `views` | 2 | 25.50 | +5.00 (+5.00 to +5.00) |",
        "| cifar100 6000 x 10 | `running` | 1 | 30.00 | +10.00 (one seed) |",
    ]
