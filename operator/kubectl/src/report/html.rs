//! The report as one page: its style and charts are in it, it has no script, and its policy forbids the
//! browser every request. Light or dark follow the reader's settings.

use super::chart;
use super::course;
use super::terminal::shown;
use super::{MetricReport, TestReport, VariantReport};

/// Colours of series that differ in brightness as well, for readers who do not see all colours.
const STYLE: &str = "\
:root{color-scheme:light dark;--back:#fff;--text:#1f2328;--faint:#d0d7de;--quiet:#59636e;--warn:#9a6700;\
--c0:#0b5cad;--c1:#c2410c;--c2:#0f766e;--c3:#7c3aed}
@media (prefers-color-scheme:dark){:root{--back:#0d1117;--text:#e6edf3;--faint:#30363d;--quiet:#9198a1;\
--warn:#d29922;--c0:#6cb6ff;--c1:#ff9e64;--c2:#4fd1c5;--c3:#c4a5ff}}
body{background:var(--back);color:var(--text);font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:0}h2{font-size:1.15rem;margin-top:2rem}
.summary{font-size:1.2rem;margin:.5rem 0}.quiet{color:var(--quiet)}.warn{color:var(--warn)}
.table{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.3rem .4rem;border-bottom:1px solid var(--faint);white-space:nowrap}
th{white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
.chart{overflow-x:auto;padding-right:.5rem}svg{width:100%;min-width:38rem;height:auto;margin:.5rem 0;overflow:visible}svg text{fill:var(--text);font:13px system-ui,sans-serif}
.b0{fill:var(--c0)}.b1{fill:var(--c1)}.b2{fill:var(--c2)}.b3{fill:var(--c3)}polygon{opacity:.18}
.grid{stroke:var(--faint)}.zero{stroke:var(--text)}.configured{stroke:var(--text);stroke-width:3}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}
line.s0,line.s1,line.s2,line.s3,path,polyline{stroke-width:2.5;fill:none}
circle.s0,rect.s0{fill:var(--c0)}circle.s1,rect.s1{fill:var(--c1)}circle.s2,rect.s2{fill:var(--c2)}circle.s3,rect.s3{fill:var(--c3)}
.key{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:2px}
.k0{background:var(--c0)}.k1{background:var(--c1)}.k2{background:var(--c2)}.k3{background:var(--c3)}
";

/// A text within an element or an attribute.
#[must_use]
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for one in text.chars() {
        match one {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            _ => escaped.push(one),
        }
    }
    escaped
}

/// The page.
#[must_use]
pub fn page(report: &TestReport) -> String {
    let title = escaped(&format!("A/B test {}/{}", report.namespace, report.name));
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    );
    page.push_str(&heading(report));
    page.push_str("<h2>Variants</h2>\n");
    page.push_str(&variants(report));
    if let Some(svg) = chart::shares(&report.variants) {
        page.push_str(
            "<p class=\"quiet\">Share of users: the bar is what came, the line what is configured.</p>\n",
        );
        page.push_str(&svg);
    }
    for summary in report.variants.iter().filter_map(VariantReport::shadow_summary) {
        page.push_str(&format!("<p>{}.</p>\n", escaped(&summary)));
    }
    for metric in &report.metrics {
        page.push_str(&metric_section(metric));
        if metric.is_goal {
            let chart = course::course(&report.history, &report.variants, metric.is_relative);
            if let Some(svg) = chart {
                page.push_str("<p class=\"quiet\">Effect over time, with its interval.</p>\n");
                page.push_str(&svg);
            }
        }
    }
    if let Some(svg) = chart::latencies(&report.latencies, &report.variants) {
        page.push_str("<h2>Latency</h2>\n<p class=\"quiet\">Share of answers within a latency, since the weights changed last.</p>\n");
        page.push_str(&svg);
        page.push_str(&quantiles(report));
    }
    page.push_str(&format!("<p class=\"quiet\">Made {}.</p>\n</body>\n</html>\n", escaped(&report.made)));
    page
}

fn heading(report: &TestReport) -> String {
    let mut facts = vec![format!("route {}", report.route)];
    let phase = if report.phase.is_empty() { "not looked at yet" } else { report.phase.as_str() };
    facts.push(phase.to_owned());
    facts.extend(report.verdict.iter().map(|verdict| format!("verdict {verdict}")));
    facts.extend(report.started.iter().map(|started| format!("samples since {started}")));
    facts.extend(report.concluded.iter().map(|concluded| format!("ended {concluded}")));
    if let Some(srm) = report.srm.as_deref().filter(|srm| *srm != "-") {
        let p_value = report.srm_p_value.map(|value| format!(" (p at most {value:.3})")).unwrap_or_default();
        facts.push(format!("division of users {srm}{p_value}"));
    }
    if let Some(effect) = report.detectable_effect {
        let is_relative = report.metrics.first().is_some_and(|goal| goal.is_relative);
        facts.push(format!("finds an effect of {} now", shown(effect, is_relative)));
    }
    facts.extend(
        report.days_left.map(|days| format!("about {days:.1} days to the smallest effect that matters")),
    );
    let mut html = format!(
        "<p class=\"quiet\">{}</p>\n<p class=\"summary\">{}</p>\n",
        escaped(&facts.join(" · ")),
        escaped(&report.summary())
    );
    for warning in &report.warnings {
        html.push_str(&format!("<p class=\"warn\">⚠ {}</p>\n", escaped(warning)));
    }
    html
}

fn table(head: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let cells = |tag: &str, cells: &[String]| {
        cells.iter().map(|cell| format!("<{tag}>{cell}</{tag}>")).collect::<String>()
    };
    let head: Vec<String> = head.iter().map(|cell| (*cell).to_owned()).collect();
    let mut html = format!("<div class=\"table\"><table>\n<tr>{}</tr>\n", cells("th", &head));
    for row in rows {
        html.push_str(&format!("<tr>{}</tr>\n", cells("td", &row)));
    }
    html.push_str("</table></div>\n");
    html
}

/// A variant's name with the colour of its series.
fn key(series: usize, name: &str) -> String {
    format!("<span class=\"key k{series}\"></span>{}", escaped(name))
}

fn variants(report: &TestReport) -> String {
    let head = [
        "variant",
        "model",
        "revision",
        "weight",
        "users",
        "requests",
        "errors",
        "fallbacks",
        "scores",
        "pods",
        "requests/s and pod",
    ];
    let rows = report.variants.iter().enumerate().map(|(series, one)| {
        vec![
            key(series, &one.name),
            escaped(&one.model),
            escaped(&one.revision),
            format!("{} %", one.weight),
            one.users.to_string(),
            one.requests.to_string(),
            one.errors.to_string(),
            one.fallbacks.to_string(),
            one.scores.to_string(),
            one.replicas.to_string(),
            one.load_per_replica.map(|load| format!("{load:.1}")).unwrap_or_default(),
        ]
    });
    table(&head, rows)
}

fn metric_section(metric: &MetricReport) -> String {
    let role = if metric.is_goal { "goal" } else { "compared besides" };
    let mut html = format!(
        "<h2>{} <span class=\"quiet\">{role}, {} is better</span></h2>\n",
        escaped(&metric.metric),
        escaped(&metric.better)
    );
    html.push_str(&chart::intervals(metric).unwrap_or_default());
    let effect = |value: Option<f64>| value.map(|value| shown(value, metric.is_relative));
    let rows = metric.rows.iter().enumerate().map(|(series, row)| {
        vec![
            key(series, &row.variant),
            row.value.map(|value| format!("{value:.4}")).unwrap_or_default(),
            effect(row.effect).unwrap_or_default(),
            effect(row.low).unwrap_or_default(),
            effect(row.high).unwrap_or_default(),
            if row.differs { "differs".to_owned() } else { String::new() },
        ]
    });
    html.push_str(&table(&["variant", "value", "effect", "low", "high", ""], rows));
    html
}

fn quantiles(report: &TestReport) -> String {
    let ms = |value: Option<f64>| value.map(|value| format!("{value:.1}")).unwrap_or_default();
    let rows = report.variants.iter().enumerate().map(|(series, one)| {
        let curve = report.latencies.iter().find(|curve| curve.variant == one.name);
        let answers = curve.map(|curve| curve.answers.to_string()).unwrap_or_default();
        vec![key(series, &one.name), answers, ms(one.latency_p50_ms), ms(one.latency_p95_ms)]
    });
    table(&["variant", "answers", "p50 ms", "p95 ms"], rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_become_elements() {
        assert_eq!(escaped("<a href='x'>&\""), "&lt;a href=&#39;x&#39;&gt;&amp;&quot;");
    }
}
