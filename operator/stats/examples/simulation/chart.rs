//! The picture of the simulation as SVG: readable on light and dark pages, without scripts.

use std::fmt::Write as _;

/// Days of a test.
pub(super) const DAYS: u32 = 30;
/// Width of a panel.
const WIDTH: f64 = 300.0;
/// Height of a panel.
const HEIGHT: f64 = 200.0;
/// Space around a panel for its words.
const MARGIN: f64 = 60.0;

/// What is drawn.
pub(super) struct Chart {
    /// Runs of each row.
    pub(super) runs: u64,
    /// The seed.
    pub(super) seed: u64,
    /// Null tests that have concluded by the end of each day: sequential and t-test.
    pub(super) by_day: Vec<[f64; 2]>,
    /// Effect in percent, and the shares that find it: sequential and t-test.
    pub(super) power: Vec<[f64; 3]>,
}

/// One panel with its scales.
struct Panel {
    /// Its left edge.
    left: f64,
    title: &'static str,
    x_title: &'static str,
    x_max: f64,
    x_step: usize,
    /// Top of the scale, as a share.
    y_max: f64,
}

impl Panel {
    fn x(&self, value: f64) -> f64 {
        self.left + WIDTH * value / self.x_max
    }

    fn y(&self, share: f64) -> f64 {
        MARGIN + HEIGHT * (1.0 - (share / self.y_max).min(1.0))
    }

    fn frame(&self, svg: &mut String) {
        let (left, bottom) = (self.left, MARGIN + HEIGHT);
        let middle = left + WIDTH / 2.0;
        // Writing to a string cannot fail.
        let _ = writeln!(svg, "<text x=\"{middle:.0}\" y=\"44\" class=\"title\">{}</text>", self.title);
        let below = bottom + 38.0;
        let _ =
            writeln!(svg, "<text x=\"{middle:.0}\" y=\"{below:.0}\" class=\"mid\">{}</text>", self.x_title);
        for quarter in 0..=4 {
            let share = self.y_max * f64::from(quarter) / 4.0;
            let (y, right) = (self.y(share), left + WIDTH);
            let _ = writeln!(
                svg,
                "<path d=\"M{left:.0} {y:.1}H{right:.0}\" class=\"grid\"/><text x=\"{:.0}\" y=\"{:.1}\" \
                 class=\"end\">{:.0} %</text>",
                left - 6.0,
                y + 4.0,
                100.0 * share
            );
        }
        for tick in (0_u32..).step_by(self.x_step).map(f64::from).take_while(|tick| *tick <= self.x_max) {
            let (x, y) = (self.x(tick), bottom + 18.0);
            let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.0}\" class=\"mid\">{tick:.0}</text>");
        }
    }

    fn line(&self, svg: &mut String, class: &str, points: impl Iterator<Item = (f64, f64)>) {
        let points = points.map(|(x, share)| format!("{:.1},{:.1}", self.x(x), self.y(share)));
        let points = points.collect::<Vec<_>>().join(" ");
        let _ = writeln!(svg, "<polyline class=\"{class}\" points=\"{points}\"/>");
    }
}

impl Chart {
    /// The picture.
    pub(super) fn to_svg(&self) -> String {
        let (width, height) = (2.0 * WIDTH + 3.0 * MARGIN, HEIGHT + 2.0 * MARGIN + 30.0);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" role=\"img\" \
             aria-label=\"False verdicts by day, and effects found, of the sequential test and a t-test\">\n\
             <style>text{{font:12px sans-serif;fill:#808080}}.title{{font-weight:bold}}.title,.mid{{\
             text-anchor:middle}}.end{{text-anchor:end}}.grid{{stroke:#80808050;fill:none}}.s{{\
             stroke:#2a78c8;stroke-width:2;fill:none}}.t{{stroke:#d8681d;stroke-width:2;fill:none;\
             stroke-dasharray:6 4}}.a{{stroke:#808080;fill:none;stroke-dasharray:2 3}}</style>\n"
        );
        let null = Panel {
            left: MARGIN,
            title: "No effect: tests that say there is one",
            x_title: "day of the look",
            x_max: f64::from(DAYS),
            x_step: 5,
            y_max: 0.4,
        };
        let power = Panel {
            left: 2.0 * MARGIN + WIDTH,
            title: "Tests that find an effect in 30 days",
            x_title: "true effect in %",
            x_max: 10.0,
            x_step: 2,
            y_max: 1.0,
        };
        null.frame(&mut svg);
        power.frame(&mut svg);
        null.line(&mut svg, "a", [(0.0, 0.05), (f64::from(DAYS), 0.05)].into_iter());
        for (index, class) in ["s", "t"].into_iter().enumerate() {
            let by_day = (0_u32..).zip(&self.by_day);
            null.line(&mut svg, class, by_day.map(|(day, shares)| (f64::from(day), shares[index])));
            power.line(&mut svg, class, self.power.iter().map(|point| (point[0], point[index + 1])));
        }
        let (y, runs, seed) = (height - 14.0, self.runs, self.seed);
        let _ = writeln!(
            svg,
            "<path class=\"s\" d=\"M60 {:.0}h24\"/><text x=\"90\" y=\"{y:.0}\">sequential test</text>\
             <path class=\"t\" d=\"M200 {:.0}h24\"/><text x=\"230\" y=\"{y:.0}\">t-test at every look</text>\
             <path class=\"a\" d=\"M370 {:.0}h24\"/><text x=\"400\" y=\"{y:.0}\">allowed: 5 %</text>\
             <text x=\"500\" y=\"{y:.0}\">{runs} runs a point, seed {seed}</text>\n</svg>",
            y - 4.0,
            y - 4.0,
            y - 4.0
        );
        svg
    }
}
