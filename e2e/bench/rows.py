"""Rows of the table: an objective is `name ours peer R.RR× need N.NN× ok|MISS`; a row that is only
information has no `×`.
"""

import dataclasses
import statistics


@dataclasses.dataclass
class Row:
    """What was measured for one line, turn after turn."""

    name: str
    unit: str
    # The ratio to the peer that is required; None: for information.
    need: float | None = None
    # Times: the ratio is then the peer's divided by ours, so that larger is better in every row.
    smaller_is_better: bool = False
    ours: list[float] = dataclasses.field(default_factory=list)
    peer: list[float] = dataclasses.field(default_factory=list)
    # Why there is nothing: a feature that this version does not have.
    not_built: str | None = None
    # Why it is not measured here: what the processor lacks.
    not_run: str | None = None
    note: str = ""

    def ratio(self):
        ours, peer = statistics.median(self.ours), statistics.median(self.peer)
        return peer / ours if self.smaller_is_better else ours / peer

    def line(self):
        name = f"{self.name:<34}"
        if self.not_built is not None:
            return f"{name} not built"
        if self.not_run is not None:
            return f"{name} not run: {self.not_run}"
        if not self.ours or None in self.ours or None in self.peer:
            return f"{name} no figure: in some turn nothing was answered"
        ours = statistics.median(self.ours)
        if self.need is None:
            beside = f"beside {statistics.median(self.peer):.1f} " if self.peer else ""
            return f"{name} {ours:>10.1f} {beside}{self.unit} {self.note}".rstrip()
        # Judged as it is printed, so that no line contradicts itself.
        ratio = round(self.ratio(), 2)
        verdict = "ok" if ratio >= self.need else "MISS"
        peer = statistics.median(self.peer)
        compared = f"{ours:>10.1f} {peer:>10.1f} {ratio:>6.2f}× need {self.need:.2f}× {verdict:<4}"
        return f"{name} {compared} {self.unit} {self.note}".rstrip()

    def json(self):
        return dataclasses.asdict(self)
