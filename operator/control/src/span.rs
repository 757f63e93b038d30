//! Lengths of time as users write them: `500ms`, `60s`, `1m30s`, `2h`.

use std::time::Duration;

/// Why a length of time cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpanError {
    /// The text is not numbers with units.
    #[error(
        "{0:?} is not a length of time: write whole numbers with a unit, such as 500ms, 60s, 1m30s or 2h"
    )]
    Syntax(String),
    /// The time is longer than a week, which no timeout here means.
    #[error("{0:?} is longer than a week")]
    TooLong(String),
}

const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// Reads a length of time.
///
/// # Errors
/// When the text is no such thing, or longer than a week.
pub fn parse(text: &str) -> Result<Duration, SpanError> {
    let syntax = || SpanError::Syntax(text.to_owned());
    let mut rest = text;
    let mut total_ms: u64 = 0;
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let number: u64 = rest[..digits].parse().map_err(|_| syntax())?;
        rest = &rest[digits..];
        let letters = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_lowercase()).len();
        let unit_ms = match &rest[..letters] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(syntax()),
        };
        rest = &rest[letters..];
        total_ms = number
            .checked_mul(unit_ms)
            .and_then(|part| total_ms.checked_add(part))
            .ok_or_else(|| SpanError::TooLong(text.to_owned()))?;
    }
    match Duration::from_millis(total_ms) {
        _ if text.is_empty() => Err(syntax()),
        span if span > LONGEST => Err(SpanError::TooLong(text.to_owned())),
        span => Ok(span),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_with_units_add_up() {
        assert_eq!(parse("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse("2h"), Ok(Duration::from_secs(7200)));
        assert_eq!(parse("0s"), Ok(Duration::ZERO));
    }

    #[test]
    fn anything_else_is_refused_with_the_text() {
        for text in ["", "5", "s", "5d", "-1s", "1.5s", "5 s"] {
            assert_eq!(parse(text), Err(SpanError::Syntax(text.to_owned())), "{text}");
        }
        for text in ["200h", "99999999999999999999h"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(matches!(parse("200h"), Err(SpanError::TooLong(_))));
    }
}
