//! Decimal numbers with all the digits that a caller wrote.

use std::cmp::Ordering;

/// Exponents beyond this count as infinite: no number that the compiler keeps exactly comes near it.
const MAX_EXPONENT: i64 = 1 << 40;

/// A number of a JSON text, exact: `digits × 10^exponent`.
#[derive(Debug, Clone)]
pub(super) struct Decimal {
    text: String,
    negative: bool,
    /// Without leading and trailing zeros; empty for zero.
    digits: String,
    exponent: i64,
}

impl Decimal {
    /// Reads a number that already follows the grammar of JSON.
    pub(super) fn parse(text: &str) -> Self {
        let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        let limit = if exponent.starts_with('-') { -MAX_EXPONENT } else { MAX_EXPONENT };
        let exponent = exponent.parse::<i64>().unwrap_or(limit).clamp(-MAX_EXPONENT, MAX_EXPONENT);
        let (negative, magnitude) = match mantissa.strip_prefix('-') {
            Some(magnitude) => (true, magnitude),
            None => (false, mantissa),
        };
        let (whole, fraction) = magnitude.split_once('.').unwrap_or((magnitude, ""));
        let all = format!("{whole}{fraction}");
        let leading = all.trim_start_matches('0');
        let digits = leading.trim_end_matches('0');
        if digits.is_empty() {
            return Self { text: "0".to_owned(), negative: false, digits: String::new(), exponent: 0 };
        }
        let exponent = exponent - length(fraction) + length(leading) - length(digits);
        Self { text: text.to_owned(), negative, digits: digits.to_owned(), exponent }
    }

    /// As the caller wrote it.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    pub(super) fn is_zero(&self) -> bool {
        self.digits.is_empty()
    }

    pub(super) fn is_negative(&self) -> bool {
        self.negative
    }

    pub(super) fn is_whole(&self) -> bool {
        self.exponent >= 0
    }

    /// The nearest 64-bit float; infinite beyond their range.
    pub(super) fn to_f64(&self) -> f64 {
        self.text.parse().unwrap_or(f64::NAN)
    }

    /// The largest whole number that is not above it, saturating at ±2^100.
    pub(super) fn floor(&self) -> i128 {
        let truncated = self.truncated();
        if self.negative && !self.is_whole() { truncated - 1 } else { truncated }
    }

    /// The smallest whole number that is not below it, saturating at ±2^100.
    pub(super) fn ceil(&self) -> i128 {
        let truncated = self.truncated();
        if !self.negative && !self.is_whole() { truncated + 1 } else { truncated }
    }

    fn truncated(&self) -> i128 {
        let places = length(&self.digits) + self.exponent;
        let magnitude = match usize::try_from(places) {
            Err(_) | Ok(0) => 0,
            // 10^30 is below 2^100.
            Ok(places) if places > 30 => 1 << 100,
            Ok(places) => {
                let whole: String = self.digits.chars().chain(std::iter::repeat('0')).take(places).collect();
                whole.parse().unwrap_or(1 << 100)
            }
        };
        if self.negative { -magnitude } else { magnitude }
    }

    /// Compares the magnitudes.
    fn cmp_magnitude(&self, other: &Self) -> Ordering {
        match (self.is_zero(), other.is_zero()) {
            (true, true) => return Ordering::Equal,
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (false, false) => {}
        }
        let places = |number: &Self| length(&number.digits) + number.exponent;
        // Without trailing zeros the longer of two numbers with a common beginning is the larger one.
        places(self).cmp(&places(other)).then_with(|| self.digits.cmp(&other.digits))
    }

    /// The same number with the other sign.
    pub(super) fn negated(&self) -> Self {
        if self.is_zero() {
            return self.clone();
        }
        let text = match self.text.strip_prefix('-') {
            Some(text) => text.to_owned(),
            None => format!("-{}", self.text),
        };
        Self { text, negative: !self.negative, ..self.clone() }
    }
}

impl PartialEq for Decimal {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Decimal {}

impl PartialOrd for Decimal {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Decimal {
    fn cmp(&self, other: &Self) -> Ordering {
        match (self.negative, other.negative) {
            (false, false) => self.cmp_magnitude(other),
            (true, true) => other.cmp_magnitude(self),
            (true, false) => Ordering::Less,
            (false, true) => Ordering::Greater,
        }
    }
}

fn length(text: &str) -> i64 {
    i64::try_from(text.len()).unwrap_or(MAX_EXPONENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spellings_of_one_number_are_equal() {
        for (one, other) in
            [("1e3", "1000.0"), ("-0.0", "0"), ("0.10", "1E-1"), ("12e-1", "1.2"), ("0e9", "0")]
        {
            assert_eq!(Decimal::parse(one), Decimal::parse(other));
        }
        assert_ne!(Decimal::parse("9007199254740993"), Decimal::parse("9007199254740992"));
    }

    #[test]
    fn numbers_are_ordered_by_value() {
        let sorted =
            ["-1e400", "-9223372036854775809", "-9223372036854775808", "-0.5", "0", "1e-400", "0.5", "1e400"];
        for pair in sorted.windows(2) {
            assert!(Decimal::parse(pair[0]) < Decimal::parse(pair[1]), "{pair:?}");
        }
    }

    #[test]
    fn rounding_goes_to_the_next_whole_number() {
        for (text, floor, ceil) in
            [("2.5", 2, 3), ("-2.5", -3, -2), ("7", 7, 7), ("1e-400", 0, 1), ("-1e-400", -1, 0)]
        {
            let number = Decimal::parse(text);
            assert_eq!((number.floor(), number.ceil()), (floor, ceil), "{text}");
        }
        assert_eq!(Decimal::parse("1e999999999999999999999").floor(), 1 << 100);
        assert_eq!(Decimal::parse("-9223372036854775808").floor(), i128::from(i64::MIN));
    }
}
