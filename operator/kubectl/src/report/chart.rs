//! Charts as SVG elements of a page: intervals, distributions of latencies, shares of users. Their colours
//! are classes, which the page's style sheet defines for light and dark. Each has a title for screen readers,
//! and the page has each figure in a table, too.

use super::html::escaped;
use super::sums::LatencyCurve;
use super::terminal::shown;
use super::{MetricReport, VariantReport};

/// Width of each chart, in units of its view box.
pub(super) const WIDTH: f64 = 720.0;
/// Columns left of a chart for names of variants, which have at most 32 characters of 6.5 units.
pub(super) const LEFT: f64 = 220.0;
/// Room right of a chart for the last label.
pub(super) const RIGHT: f64 = 20.0;
/// Height of a row of bars or intervals.
const ROW: f64 = 34.0;
/// Height of the axis with its labels.
const AXIS: f64 = 34.0;
/// Height of the area of a distribution.
const CURVE: f64 = 240.0;
/// Labels of an axis, about.
const TICKS: f64 = 5.0;

/// Where values of a range are drawn.
#[derive(Debug, Clone, Copy)]
pub(super) struct Range {
    pub(super) from: f64,
    pub(super) to: f64,
}

impl Range {
    /// The position of a value from left to right.
    pub(super) fn x(self, value: f64) -> f64 {
        let share = ((value - self.from) / (self.to - self.from)).clamp(0.0, 1.0);
        LEFT + share * (WIDTH - LEFT - RIGHT)
    }

    /// Round values within the range, in steps of 1, 2 or 5 times a power of ten.
    pub(super) fn ticks(self) -> Vec<f64> {
        let raw = (self.to - self.from) / TICKS;
        let magnitude = 10_f64.powf(raw.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|one| one * magnitude).find(|step| *step >= raw);
        let step = step.unwrap_or(raw);
        let mut ticks = Vec::new();
        let mut index = (self.from / step).ceil();
        while index * step <= self.to + step * 1e-9 {
            // Adding 0.0 makes -0.0 a zero without a sign.
            ticks.push(index * step + 0.0);
            index += 1.0;
        }
        ticks
    }
}

/// The end of a chart.
pub(super) const CLOSE: &str = "</svg></div>\n";

/// The begin of a chart. On a narrow screen it is as wide as its labels need, and is scrolled.
pub(super) fn open(title: &str, height: f64) -> String {
    let title = escaped(title);
    format!(
        "<div class=\"chart\"><svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\"><title>{title}</title>\n"
    )
}

pub(super) fn label(x: f64, y: f64, anchor: &str, text: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>\n", escaped(text))
}

pub(super) fn line(class: &str, [x1, y1, x2, y2]: [f64; 4]) -> String {
    format!("<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>\n")
}

/// Vertical lines with labels below, and the line of no effect.
fn axis(range: Range, height: f64, written: impl Fn(f64) -> String) -> String {
    let bottom = height - AXIS;
    let mut axis = String::new();
    for tick in range.ticks() {
        let x = range.x(tick);
        axis.push_str(&line(if tick == 0.0 { "zero" } else { "grid" }, [x, 0.0, x, bottom]));
        axis.push_str(&label(x, bottom + 20.0, "middle", &written(tick)));
    }
    axis
}

/// The effects of the variants behind the control with their intervals; none before there is one.
#[must_use]
pub fn intervals(metric: &MetricReport) -> Option<String> {
    let rows: Vec<_> = metric.rows.iter().enumerate().filter(|(_, row)| row.effect.is_some()).collect();
    let ends = || rows.iter().flat_map(|(_, row)| [row.effect, row.low, row.high]).flatten();
    let (low, high) = (ends().fold(0.0, f64::min), ends().fold(0.0, f64::max));
    if low >= high {
        return None;
    }
    let margin = (high - low) * 0.05;
    let range = Range { from: low - margin, to: high + margin };
    let height = rows.len() as f64 * ROW + AXIS;
    let mut svg = open(&format!("{}: effect beside the control", metric.metric), height);
    svg.push_str(&axis(range, height, |tick| shown(tick, metric.is_relative)));
    for (place, (series, row)) in rows.iter().enumerate() {
        let y = (place as f64 + 0.5) * ROW;
        let class = format!("s{series}");
        svg.push_str(&label(LEFT - 12.0, y + 5.0, "end", &row.variant));
        // An end that is not known is the end of the chart, without a cap.
        let ends = [row.low, row.high];
        let [from, to] =
            [(ends[0], range.from), (ends[1], range.to)].map(|(end, edge)| range.x(end.unwrap_or(edge)));
        svg.push_str(&line(&class, [from, y, to, y]));
        for (end, x) in ends.into_iter().zip([from, to]) {
            if end.is_some() {
                svg.push_str(&line(&class, [x, y - 7.0, x, y + 7.0]));
            }
        }
        let x = range.x(row.effect.unwrap_or_default());
        svg.push_str(&format!("<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"5\"/>\n"));
    }
    svg.push_str(CLOSE);
    Some(svg)
}

/// The share of each variant: what the spec says, and what came. None before anything came.
#[must_use]
pub fn shares(variants: &[VariantReport]) -> Option<String> {
    let total: i64 = variants.iter().map(|one| one.users).sum();
    if total <= 0 {
        return None;
    }
    let range = Range { from: 0.0, to: 100.0 };
    let height = variants.len() as f64 * ROW + AXIS;
    let mut svg = open("share of users: bar as seen, line as configured", height);
    svg.push_str(&axis(range, height, |tick| format!("{tick:.0} %")));
    for (series, one) in variants.iter().enumerate() {
        let top = series as f64 * ROW + 6.0;
        let percent = one.users as f64 / total as f64 * 100.0;
        let width = range.x(percent) - LEFT;
        svg.push_str(&label(LEFT - 12.0, top + 16.0, "end", &one.name));
        svg.push_str(&format!(
            "<rect class=\"s{series}\" x=\"{LEFT:.1}\" y=\"{top:.1}\" width=\"{width:.1}\" height=\"22\"/>\n"
        ));
        let x = range.x(f64::from(one.weight));
        svg.push_str(&line("configured", [x, top - 3.0, x, top + 25.0]));
    }
    svg.push_str(CLOSE);
    Some(svg)
}

/// The share of answers within each latency, on a logarithmic axis. None before there is an answer.
#[must_use]
pub fn latencies(curves: &[LatencyCurve], variants: &[VariantReport]) -> Option<String> {
    let all = || curves.iter().flat_map(|curve| &curve.points).map(|point| point.latency_ms.log10());
    let low = all().fold(f64::INFINITY, f64::min).floor();
    let high = all().fold(f64::NEG_INFINITY, f64::max).ceil();
    if !(low.is_finite() && high.is_finite()) {
        return None;
    }
    let range = Range { from: low, to: high.max(low + 1.0) };
    let height = CURVE + AXIS;
    let mut svg = open("share of answers within a latency", height);
    let mut power = range.from;
    while power <= range.to {
        let x = range.x(power);
        svg.push_str(&line("grid", [x, 0.0, x, CURVE]));
        svg.push_str(&label(x, CURVE + 20.0, "middle", &latency(power)));
        power += 1.0;
    }
    // The lines of 95 and 100 % are 11 units apart, and their labels, which are 13 high, 18.
    for (share, baseline) in [(0.0, 5.0), (0.5, 5.0), (0.95, 10.0), (1.0, 3.0)] {
        let y = y_of(share);
        svg.push_str(&line("grid", [LEFT, y, WIDTH - RIGHT, y]));
        svg.push_str(&label(LEFT - 12.0, y + baseline, "end", &format!("{:.0} %", share * 100.0)));
    }
    for curve in curves {
        let series = variants.iter().position(|one| one.name == curve.variant).unwrap_or(0);
        // A step function: it rises where a bucket ends.
        let mut path = format!("M{:.1} {:.1}", LEFT, y_of(0.0));
        for point in &curve.points {
            path.push_str(&format!("H{:.1}V{:.1}", range.x(point.latency_ms.log10()), y_of(point.share)));
        }
        path.push_str(&format!("H{:.1}", WIDTH - RIGHT));
        svg.push_str(&format!("<path class=\"s{series}\" d=\"{path}\"/>\n"));
    }
    svg.push_str(CLOSE);
    Some(svg)
}

/// A power of ten of milliseconds.
fn latency(power: f64) -> String {
    if power < 3.0 { format!("{} ms", 10_f64.powf(power)) } else { format!("{} s", 10_f64.powf(power - 3.0)) }
}

/// The position of a share from top to bottom.
fn y_of(share: f64) -> f64 {
    10.0 + (1.0 - share.clamp(0.0, 1.0)) * (CURVE - 20.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within_the_range() {
        assert_eq!(Range { from: 0.0, to: 100.0 }.ticks(), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        let ticks = Range { from: -0.021, to: 0.032 }.ticks();
        let shown: Vec<String> = ticks.iter().map(|tick| format!("{tick:.2}")).collect();
        assert_eq!(shown, ["-0.02", "0.00", "0.02"]);
    }

    #[test]
    fn a_chart_without_figures_is_left_out() {
        assert_eq!(shares(&[]), None);
        assert_eq!(latencies(&[], &[]), None);
        let metric = MetricReport {
            metric: "errorRate".to_owned(),
            is_goal: true,
            better: "lower".to_owned(),
            is_relative: true,
            rows: Vec::new(),
        };
        assert_eq!(intervals(&metric), None);
    }
}
