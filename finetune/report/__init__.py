"""One self-contained HTML page for any set of runs."""

from configs.face import callable_module
from finetune.report.page import report

callable_module(__name__)
