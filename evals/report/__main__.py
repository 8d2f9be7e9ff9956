"""Build the report: `python -m evals.report`."""

from evals.report.build import main

main()
