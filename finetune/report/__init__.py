"""One self-contained HTML page for any set of runs."""

from configs.face import callable_module, lazy

__getattr__, __dir__ = lazy(__name__, {"report": "page:report"})
callable_module(__name__)
