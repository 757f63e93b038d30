//! Durations as users write them: `500ms`, `60s`, `1m30s`, `2h`.

use std::time::Duration;

use k8s_openapi::jiff::SignedDuration;

/// Why a duration cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DurationError {
    /// The text is not a duration.
    #[error("{0:?} is not a duration: write whole numbers with a unit, such as 500ms, 60s, 1m30s or 2h")]
    Syntax(String),
    /// The duration is longer than a week, which no timeout here needs.
    #[error("{0:?} is longer than a week (168h)")]
    TooLong(String),
}

const LONGEST: Duration = Duration::from_secs(7 * 24 * 3600);

/// Reads a duration.
///
/// # Errors
/// When the text is not a duration, or longer than a week.
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    let syntax = || DurationError::Syntax(text.to_owned());
    // The schema allows this alphabet; the library also reads ISO 8601, words and fractions.
    if text.is_empty() || !text.chars().all(|c| c.is_ascii_digit() || matches!(c, 'h' | 'm' | 's')) {
        return Err(syntax());
    }
    let signed: SignedDuration = text.parse().map_err(|_| syntax())?;
    let duration = Duration::try_from(signed).map_err(|_| syntax())?;
    if duration > LONGEST { Err(DurationError::TooLong(text.to_owned())) } else { Ok(duration) }
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
    fn other_text_is_refused_by_name() {
        for text in ["", "5", "s", "5d", "-1s", "1.5s", "5 s", "PT5S", "99999999999999999999h"] {
            assert_eq!(parse(text), Err(DurationError::Syntax(text.to_owned())), "{text}");
        }
        assert!(matches!(parse("200h"), Err(DurationError::TooLong(_))));
    }
}
