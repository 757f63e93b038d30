//! How the goal's effect came to be: its value and interval at each time that the status kept.

use super::chart::{CLOSE, LEFT, RIGHT, Range, WIDTH, label, line, open};
use super::terminal::shown;
use super::{IntervalRow, LookReport, VariantReport};

/// Height of the area.
const HEIGHT: f64 = 260.0;
/// Room below it for times.
const AXIS: f64 = 34.0;
/// Room above and below the outermost interval.
const MARGIN: f64 = 12.0;

/// Where an effect is drawn from top to bottom.
#[derive(Debug, Clone, Copy)]
struct Heights {
    low: f64,
    high: f64,
}

impl Heights {
    /// The heights of all effects and ends of intervals, and of no effect.
    fn of(looks: &[LookReport]) -> Option<Self> {
        let rows = || looks.iter().flat_map(|look| &look.effects);
        let ends = || rows().flat_map(|row| [row.effect, row.low, row.high]).flatten();
        let (low, high) = (ends().fold(0.0, f64::min), ends().fold(0.0, f64::max));
        (low < high).then_some(Self { low, high })
    }

    fn y(self, effect: f64) -> f64 {
        let share = ((effect - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        MARGIN + (1.0 - share) * (HEIGHT - 2.0 * MARGIN)
    }
}

/// One variant at one time.
#[derive(Debug, Clone, Copy)]
struct CoursePoint<'a> {
    x: f64,
    row: &'a IntervalRow,
}

/// The chart; none before there are two times to draw a line between.
#[must_use]
pub fn course(looks: &[LookReport], variants: &[VariantReport], is_relative: bool) -> Option<String> {
    let (first, last) = (looks.first()?, looks.last()?);
    let heights = Heights::of(looks)?;
    let seconds = |look: &LookReport| look.at_seconds as f64;
    if last.at_seconds <= first.at_seconds {
        return None;
    }
    let times = Range { from: seconds(first), to: seconds(last) };
    let mut svg = open("effect of the goal over time, with its interval", HEIGHT + AXIS);
    for effect in (Range { from: heights.low, to: heights.high }).ticks() {
        let y = heights.y(effect);
        svg.push_str(&line(if effect == 0.0 { "zero" } else { "grid" }, [LEFT, y, WIDTH - RIGHT, y]));
        svg.push_str(&label(LEFT - 12.0, y + 5.0, "end", &shown(effect, is_relative)));
    }
    svg.push_str(&label(LEFT, HEIGHT + 20.0, "start", &first.at));
    svg.push_str(&label(WIDTH - RIGHT, HEIGHT + 20.0, "end", &last.at));
    for (series, variant) in variants.iter().enumerate() {
        let of_variant = looks.iter().filter_map(|look| {
            let row = look.effects.iter().find(|row| row.variant == variant.name)?;
            Some(CoursePoint { x: times.x(seconds(look)), row })
        });
        let points: Vec<CoursePoint<'_>> = of_variant.filter(|point| point.row.effect.is_some()).collect();
        if points.len() > 1 {
            svg.push_str(&band(series, &points, heights));
        }
    }
    svg.push_str(CLOSE);
    Some(svg)
}

/// The area between the ends of the intervals, and the line of the effects.
fn band(series: usize, points: &[CoursePoint<'_>], heights: Heights) -> String {
    let at = |x: f64, effect: f64| format!("{x:.1},{:.1}", heights.y(effect));
    // An end that is not known is the end of the chart.
    let upper = points.iter().map(|point| at(point.x, point.row.high.unwrap_or(heights.high)));
    let lower = points.iter().rev().map(|point| at(point.x, point.row.low.unwrap_or(heights.low)));
    let area = upper.chain(lower).collect::<Vec<_>>().join(" ");
    let middle = points.iter().map(|point| at(point.x, point.row.effect.unwrap_or_default()));
    let middle = middle.collect::<Vec<_>>().join(" ");
    format!(
        "<polygon class=\"b{series}\" points=\"{area}\"/>\n<polyline class=\"s{series}\" points=\"{middle}\"/>\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(at_seconds: i64, effect: f64, low: Option<f64>) -> LookReport {
        let row = IntervalRow {
            variant: "b".to_owned(),
            value: None,
            effect: Some(effect),
            low,
            high: Some(effect + 0.1),
            differs: false,
        };
        LookReport { at: format!("t{at_seconds}"), at_seconds, samples: 1, effects: vec![row] }
    }

    fn variants() -> Vec<VariantReport> {
        let named = |name: &str| VariantReport { name: name.to_owned(), ..VariantReport::default() };
        vec![named("a"), named("b")]
    }

    #[test]
    fn a_course_needs_two_times() {
        assert_eq!(course(&[], &variants(), true), None);
        assert_eq!(course(&[look(5, 0.1, None)], &variants(), true), None);
    }

    #[test]
    fn the_interval_is_an_area_from_its_first_to_its_last_time() {
        let svg = course(&[look(0, 0.1, None), look(10, 0.1, Some(0.0))], &variants(), true).unwrap();
        // High ends from left to right, then low ends back; the first low end is that of the chart.
        let (top, bottom) = (MARGIN, HEIGHT - MARGIN);
        let (left, right) = (LEFT, WIDTH - RIGHT);
        let area = format!(
            "points=\"{left:.1},{top:.1} {right:.1},{top:.1} {right:.1},{bottom:.1} {left:.1},{bottom:.1}\""
        );
        assert!(svg.contains(&format!("<polygon class=\"b1\" {area}/>")), "{svg}");
        assert_eq!(svg.matches("<polyline").count(), 1, "the control has no line");
    }
}
