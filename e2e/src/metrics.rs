//! Reads the Prometheus text format, as far as the scenarios look at it: names, labels, values.

/// One sample of a scrape.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The metric's name.
    pub name: String,
    /// The text between the braces, as it was written.
    pub labels: String,
    /// The value.
    pub value: f64,
}

/// The samples of a scrape; lines that are comments or not understood are left out.
#[must_use]
pub fn parse(text: &str) -> Vec<Sample> {
    text.lines().filter_map(sample).collect()
}

/// Sum of the samples of `name`; `None` where there is none.
#[must_use]
pub fn sum(text: &str, name: &str) -> Option<f64> {
    let values: Vec<f64> = parse(text).into_iter().filter(|it| it.name == name).map(|it| it.value).collect();
    if values.is_empty() { None } else { Some(values.iter().sum()) }
}

fn sample(line: &str) -> Option<Sample> {
    if line.starts_with('#') {
        return None;
    }
    let (series, value) = line.trim().rsplit_once(' ')?;
    let (name, labels) = match series.split_once('{') {
        Some((name, rest)) => (name, rest.strip_suffix('}')?),
        None => (series, ""),
    };
    Some(Sample { name: name.to_owned(), labels: labels.to_owned(), value: value.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRAPE: &str = "# HELP x y\n# TYPE a gauge\na{model=\"m n\",to=\"1\"} 2\na{model=\"o\"} 3\nb 1e3\n";

    #[test]
    fn samples_are_found_and_summed() {
        assert_eq!(sum(SCRAPE, "a"), Some(5.0));
        assert_eq!(sum(SCRAPE, "b"), Some(1000.0));
        assert_eq!(sum(SCRAPE, "c"), None);
        assert_eq!(parse(SCRAPE)[0].labels, "model=\"m n\",to=\"1\"");
    }
}
