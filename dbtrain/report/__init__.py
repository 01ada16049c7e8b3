"""`dbtrain report`: a folder of static pages about a run, made from what the run left on disk; see docs/report.md."""

from dbtrain.report.building import Built, build, rebuild

__all__ = ["Built", "build", "rebuild"]
