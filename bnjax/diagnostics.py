"""What batch normalization does to a network: reports, their causes, recordings, plots."""

from bnjax._diagnostics.causes import Finding
from bnjax._diagnostics.curves import distributions
from bnjax._diagnostics.monitor import Monitor, MonitorLog, Observation
from bnjax._diagnostics.plots import heat_map
from bnjax._diagnostics.records import Record
from bnjax._diagnostics.report import Report, report
from bnjax._diagnostics.tables import table
from bnjax._diagnostics.untrained import untrained

__all__ = [
    "Finding",
    "Monitor",
    "MonitorLog",
    "Observation",
    "Record",
    "Report",
    "distributions",
    "heat_map",
    "report",
    "table",
    "untrained",
]
