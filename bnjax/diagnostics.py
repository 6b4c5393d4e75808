"""What batch normalization does to a network: reports, their causes, recordings, plots."""

from bnjax._diagnostics.causes import Finding
from bnjax._diagnostics.records import Record
from bnjax._diagnostics.report import Report, report
from bnjax._diagnostics.untrained import untrained

__all__ = ["Finding", "Record", "Report", "report", "untrained"]
