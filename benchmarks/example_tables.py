"""The tables of what examples and notebooks found."""

import itertools

import claims
from results import TableError, example, markdown


def mnist() -> str:
    """From the run of examples/train_mlp.py that made the README's picture."""
    metrics = example("mnist", "metrics.csv")
    rows = []
    for network, label in (("bn", "with"), ("no-bn", "without")):
        steps = {
            int(row["step"]): float(row["test_accuracy"])
            for row in metrics
            if row["network"] == network
        }
        passed = [step for step, accuracy in steps.items() if accuracy > 0.97]
        rows.append(
            {
                "batch normalization": label,
                **{f"test accuracy at {step}": f"{steps[step]:.1%}" for step in (100, 500, 2000)},
                f"at {max(steps)}": f"{steps[max(steps)]:.2%}",
                "above 97 % at step": str(min(passed, default="never")),
            }
        )
    return markdown(rows)


def cnn() -> str:
    """From the runs of examples/train_cnn.py: with, without, and folded away."""
    rows = []
    # The folders are named by data and learning rate.
    for name in itertools.product(("digits", "mnist", "cifar10"), ("0.02", "0.1")):
        folder = "-".join(("cnn", *name))
        last = {row["network"]: row for row in example(folder, "metrics.csv")}
        (folded,) = example(folder, "folded.csv")
        difference = float(folded["difference"]) / float(folded["largest_logit"])
        rows.append(
            {
                "data": folded["data"],
                "training images": f"{int(folded['training_images']):,}",
                "steps": last["bn"]["step"],
                "learning rate": name[1],
                "test accuracy without": f"{float(last['no-bn']['test_accuracy']):.2%}",
                "with": f"{float(last['bn']['test_accuracy']):.2%}",
                "folded": f"{float(folded['folded_accuracy']):.2%}",
                "largest difference / largest logit": f"{difference:.1e}",
                "time unfolded / folded": f"{float(folded['time_ratio']):.2f}",
            }
        )
    return markdown(rows)


def gaps() -> str:
    """examples/train_test_gap.py in one row; remedies are the first of each failure."""
    rows = example("train_test_gap", "gaps.csv")
    first = {(row["scenario"], row["seed"]): row for row in reversed(rows)}.values()
    planted = [row for row in first if row["remedy"]]
    healthy = [row for row in first if not row["remedy"]]
    named = sum(row["first finding"] == row["planted"] for row in planted)
    spoken = sum(row["findings"] != "0" for row in healthy)
    behind = max(
        float(row["training mode after"]) - float(row["evaluation after"]) for row in planted
    )
    shown = {
        "failures": f"{len({row['scenario'] for row in planted})}",
        "cause named first": f"{named} of {len(planted)} networks",
        "healthy networks with a finding": f"{spoken} of {len(healthy)}",
        "evaluation behind training mode after the remedy": f"at most {100 * behind:.1f} points",
    }
    return markdown([shown])


def all_gaps() -> str:
    """All remedies, with both modes after each in one column."""
    rows = example("train_test_gap", "summary.csv")
    for row in rows:
        after = [row.pop(f"{mode} after") for mode in ("training mode", "evaluation")]
        row["after it"] = ", ".join(value for value in after if value)
    return markdown(rows)


def verdicts() -> str:
    """What the notebooks found, and examples/paper_mnist.py."""
    try:
        return markdown(claims.rows(example("paper_mnist", "claims.csv")))
    except claims.ClaimError as error:
        raise TableError(str(error)) from None


def paper() -> str:
    """What examples/paper_mnist.py found."""
    return markdown(
        [
            {
                "claim": f"{row['claim']}. {row['text']}",
                "measured": row["measured"],
                "verdict": claims.with_parts(row),
            }
            for row in example("paper_mnist", "claims.csv")
        ]
    )
