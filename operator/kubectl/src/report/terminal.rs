//! The report as text, with intervals drawn in columns.

use super::{IntervalRow, MetricReport, TestReport, VariantReport};
use crate::table::{Table, one_line};

/// Columns of a drawn interval.
const COLUMNS: usize = 45;

/// The report as text.
#[must_use]
pub fn text(report: &TestReport) -> String {
    let mut text =
        format!("{}/{}: route {}, {}\n", report.namespace, report.name, report.route, phase(report));
    text.push_str(&format!("{}\n\n", report.summary()));
    text.push_str(&variants(report));
    for metric in &report.metrics {
        text.push('\n');
        text.push_str(&intervals(metric));
    }
    let mut facts = String::new();
    if let Some(srm) = report.srm.as_deref().filter(|srm| *srm != "-") {
        let p_value = report.srm_p_value.map(|value| format!(" (p at most {value:.3})")).unwrap_or_default();
        facts.push_str(&format!("division of users: {srm}{p_value}\n"));
    }
    if let Some(effect) = report.detectable_effect {
        let is_relative = report.metrics.first().is_some_and(|goal| goal.is_relative);
        facts.push_str(&format!("found now with 80 %: an effect of {}\n", shown(effect, is_relative)));
    }
    if let Some(days) = report.days_left {
        facts.push_str(&format!("until the smallest effect that matters is found: {days:.1} days\n"));
    }
    for summary in report.variants.iter().filter_map(VariantReport::shadow_summary) {
        facts.push_str(&format!("{}\n", one_line(&summary)));
    }
    for warning in &report.warnings {
        facts.push_str(&format!("! {}\n", one_line(warning)));
    }
    if !facts.is_empty() {
        text.push('\n');
        text.push_str(&facts);
    }
    text
}

fn phase(report: &TestReport) -> String {
    let phase = if report.phase.is_empty() { "not looked at yet" } else { report.phase.as_str() };
    let verdict = report.verdict.as_ref().map(|verdict| format!(", verdict {verdict}")).unwrap_or_default();
    let since =
        report.started.as_ref().map(|started| format!(", samples since {started}")).unwrap_or_default();
    format!("{phase}{verdict}{since}")
}

fn variants(report: &TestReport) -> String {
    let mut table = Table::new(&[
        "VARIANT", "MODEL", "REVISION", "WEIGHT", "USERS", "REQUESTS", "ERRORS", "P50 MS", "P95 MS",
    ]);
    let ms = |value: Option<f64>| value.map(|value| format!("{value:.1}")).unwrap_or_default();
    for one in &report.variants {
        table.row([
            one.name.clone(),
            one.model.clone(),
            one.revision.clone(),
            format!("{} %", one.weight),
            one.users.to_string(),
            one.requests.to_string(),
            one.errors.to_string(),
            ms(one.latency_p50_ms),
            ms(one.latency_p95_ms),
        ]);
    }
    table.text()
}

fn intervals(metric: &MetricReport) -> String {
    let role = if metric.is_goal { "goal" } else { "compared besides" };
    let mut text = format!("{} ({role}, {} is better)\n", metric.metric, metric.better);
    let scale = Scale::of(&metric.rows);
    let width = metric.rows.iter().map(|row| row.variant.chars().count()).max().unwrap_or(0);
    for row in &metric.rows {
        let value = row.value.map_or_else(|| "-".to_owned(), |value| format!("{value:.4}"));
        let name = format!("{:<width$}", row.variant);
        let Some(effect) = row.effect else {
            text.push_str(&format!("  {name}  {value:>12}\n"));
            continue;
        };
        let end = |end: Option<f64>| end.map_or_else(|| "?".to_owned(), |end| shown(end, metric.is_relative));
        text.push_str(&format!(
            "  {name}  {value:>12}  {}  {} [{}, {}]{}\n",
            scale.as_ref().map(|scale| scale.draw(row, effect)).unwrap_or_default(),
            shown(effect, metric.is_relative),
            end(row.low),
            end(row.high),
            if row.differs { "  differs" } else { "" }
        ));
    }
    text
}

/// An effect as people read it.
#[must_use]
pub fn shown(effect: f64, is_relative: bool) -> String {
    if is_relative { format!("{:+.1} %", effect * 100.0) } else { format!("{effect:+.4}") }
}

/// What the columns stand for. No effect is always within.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Scale {
    from: f64,
    to: f64,
}

impl Scale {
    /// The scale of the effects and the ends of their intervals; none without an effect.
    fn of(rows: &[IntervalRow]) -> Option<Self> {
        let ends = || rows.iter().flat_map(|row| [row.effect, row.low, row.high]).flatten();
        ends().next()?;
        let from = ends().fold(0.0, f64::min);
        let to = ends().fold(0.0, f64::max);
        (from < to).then_some(Self { from, to })
    }

    /// The column of a value.
    fn column(self, value: f64) -> usize {
        let share = ((value - self.from) / (self.to - self.from)).clamp(0.0, 1.0);
        // A share of 0 to 1 times the last column is one of the columns.
        (share * (COLUMNS - 1) as f64).round() as usize
    }

    fn draw(self, row: &IntervalRow, effect: f64) -> String {
        let mut columns = vec![' '; COLUMNS];
        let (low, high) = (row.low.map(|low| self.column(low)), row.high.map(|high| self.column(high)));
        let within = low.unwrap_or(0)..=high.unwrap_or(COLUMNS - 1);
        let marks = [
            (Some(self.column(0.0)), '│'),
            (Some(low.unwrap_or(0)), if low.is_some() { '├' } else { '◂' }),
            (Some(high.unwrap_or(COLUMNS - 1)), if high.is_some() { '┤' } else { '▸' }),
            (Some(self.column(effect)), '●'),
        ];
        for (at, column) in columns.iter_mut().enumerate() {
            if within.contains(&at) {
                *column = '─';
            }
            // The last mark of a column is the one that matters most.
            let mark = marks.iter().rev().find(|(place, _)| *place == Some(at));
            if let Some((_, mark)) = mark {
                *column = *mark;
            }
        }
        columns.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(effect: f64, low: Option<f64>, high: Option<f64>) -> IntervalRow {
        IntervalRow {
            variant: "b".to_owned(),
            value: Some(1.0),
            effect: Some(effect),
            low,
            high,
            differs: false,
        }
    }

    #[test]
    fn an_interval_is_drawn_with_no_effect_and_its_ends() {
        let rows = [row(0.1, Some(-0.2), Some(0.24))];
        let drawn = Scale::of(&rows).unwrap().draw(&rows[0], 0.1);
        assert_eq!(drawn.chars().count(), COLUMNS);
        let at = |mark: char| drawn.chars().position(|one| one == mark);
        assert_eq!((at('├'), at('│'), at('●'), at('┤')), (Some(0), Some(20), Some(30), Some(44)));
    }

    #[test]
    fn an_end_that_is_not_known_is_open() {
        let rows = [row(0.1, None, Some(0.2))];
        let drawn = Scale::of(&rows).unwrap().draw(&rows[0], 0.1);
        assert!(drawn.starts_with('◂') && drawn.ends_with('┤'), "{drawn}");
        assert_eq!(Scale::of(&[]), None);
        assert_eq!(Scale::of(&[row(0.0, Some(0.0), Some(0.0))]), None);
    }

    #[test]
    fn effects_are_percentages_where_they_are_relative() {
        assert_eq!(shown(0.0234, true), "+2.3 %");
        assert_eq!(shown(-0.0234, false), "-0.0234");
    }
}
