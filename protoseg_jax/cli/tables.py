"""The paper's Tables 1-4 in Markdown, our runs' figures beside the paper's; and their measures.

protoseg tables DIR …

Each DIR is a run's folder. All figures are per cent, on validation unless a column says test.
"""

ARGUMENTS = ("DIR …",)


def main(*folders: str) -> None:
    from protoseg_jax.evaluation import report

    report.print_tables(folders)
