"""One self-contained HTML page for any set of runs."""

from finetune.report.page import report
