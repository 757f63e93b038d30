//! Numbers of a schema, handed on only where the compiler keeps their value.
//!
//! llguidance reads every number as a 64-bit float, prints floats by their shortest digits, turns the bounds
//! of an integer into an `i64`, and recurses for ever on `i64::MIN`. Here a number either survives all of
//! that unchanged or is refused. A bound at the very ends of the 64-bit integers is narrowed by less than
//! 1024, so that the whole range of `int64` and `uint64` can be written.

use super::Refusal;
use crate::grammar::decimal::Decimal;
use crate::grammar::json::{Json, Members};
use serde_json::{Map, Number, Value};
use std::collections::{BTreeMap, BTreeSet};

/// The lowest whole number that the compiler handles: the next float after -2^63.
pub(super) const LOWEST: i128 = -(1 << 63) + 1024;

/// The highest whole number that it handles: 2^63 as a float saturates to it.
pub(super) const HIGHEST: i128 = (1 << 63) - 1;

/// Bounds of a number (not only of an integer) from here on do not fit the compiler's range of ten-fold
/// steps.
const FLOAT_BOUND_LIMIT: &str = "1e18";

/// What takes the place of a wider bound.
const FLOAT_BOUND: i64 = 100_000_000_000_000_000;

/// What the whole document's numbers have to be compared with, since schemas can be combined.
#[derive(Default)]
pub(super) struct NumberFacts {
    /// Whether the document has the type `integer`: then a number may be combined with it.
    integer_types: bool,
    /// Excluded whole numbers.
    exclusive: BTreeMap<i128, Decimal>,
    /// Limits that are not whole, by their whole digits.
    limits: BTreeMap<i128, Decimal>,
    /// Coefficient and decimal places of each `multipleOf`.
    multiples: BTreeSet<(u64, u32)>,
}

impl NumberFacts {
    pub(super) fn new(integer_types: bool) -> Self {
        Self { integer_types, ..Self::default() }
    }

    /// Refuses what could go wrong where schemas with these numbers are combined with each other.
    pub(super) fn check_combined(&self) -> Result<(), Refusal> {
        for (whole, exclusive) in &self.exclusive {
            if let Some(limit) = self.limits.get(whole) {
                return Err(open_interval("exclusiveMinimum", exclusive, limit));
            }
        }
        let mut places = 0;
        let mut combined = 1u64;
        for (coefficient, own_places) in &self.multiples {
            let scaled = |value: u64, by: u32| value.saturating_mul(10u64.saturating_pow(by));
            let (left, other) = (
                scaled(combined, own_places.saturating_sub(places)),
                scaled(*coefficient, places.saturating_sub(*own_places)),
            );
            places = places.max(*own_places);
            // The compiler multiplies the two in 32 bits.
            if left.saturating_mul(other) > u64::from(u32::MAX) {
                return Err(Refusal::new(
                    "multipleOf",
                    "the common multiples of its values are too large".to_owned(),
                ));
            }
            combined = left * other / greatest_divisor(left, other);
            check_multiple(combined, places)?;
        }
        Ok(())
    }
}

/// A number of a constant.
pub(super) fn constant(keyword: &str, number: &Decimal, facts: &NumberFacts) -> Result<Number, Refusal> {
    let refused = || {
        let why = format!(
            "{} has more digits than are kept exactly; write it as a string",
            shortened_number(number)
        );
        Err(Refusal::new(keyword, why))
    };
    if number.is_whole() {
        let value = number.floor();
        if exact_integer(value)
            && let Ok(value) = i64::try_from(value)
        {
            return Ok(value.into());
        }
        if facts.integer_types {
            return refused();
        }
    }
    match Number::from_f64(number.to_f64()) {
        Some(float) if prints_exactly(number) => Ok(float),
        _ => refused(),
    }
}

/// Whether the compiler's `i64` for this number is the number.
fn exact_integer(value: i128) -> bool {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        reason = "does what the compiler does"
    )]
    let back = i128::from((value as f64) as i64);
    (LOWEST..=HIGHEST).contains(&value) && back == value
}

/// Whether the shortest digits of the number's float are its own digits.
fn prints_exactly(number: &Decimal) -> bool {
    let float = number.to_f64();
    float.is_finite() && Decimal::parse(&format!("{float}")) == *number
}

/// Reads the five keywords of numbers from `schema` and writes those that the compiler gets.
pub(super) fn bounds(
    schema: &Members,
    out: &mut Map<String, Value>,
    facts: &mut NumberFacts,
) -> Result<(), Refusal> {
    let types: Vec<&str> = match schema.get("type") {
        Some(Json::String(name)) => vec![name],
        Some(Json::Array(names)) => names.iter().filter_map(Json::as_str).collect(),
        _ => Vec::new(),
    };
    if let Some(value) = schema.get("multipleOf") {
        out.insert("multipleOf".to_owned(), Value::Number(multiple(value, facts)?));
    }
    let low = Bound::read(schema, "minimum", "exclusiveMinimum")?;
    let high = Bound::read(schema, "maximum", "exclusiveMaximum")?;
    if types.contains(&"integer") && !types.contains(&"number") {
        integer_bounds(&low, &high, out)
    } else {
        float_bounds(&low, &high, out, facts)
    }
}

/// The bounds of one side.
struct Bound<'a> {
    inclusive: Option<&'a Decimal>,
    exclusive: Option<&'a Decimal>,
}

impl<'a> Bound<'a> {
    fn read(schema: &'a Members, inclusive: &str, exclusive: &str) -> Result<Self, Refusal> {
        let number = |keyword: &str| match schema.get(keyword) {
            None => Ok(None),
            Some(Json::Number(number)) => Ok(Some(number)),
            Some(_) => Err(Refusal::new(keyword, "a number is expected".to_owned())),
        };
        let low = number(inclusive)?;
        // Draft 4 marks the inclusive bound as exclusive.
        match schema.get(exclusive) {
            Some(Json::Bool(true)) => Ok(Self { inclusive: None, exclusive: low }),
            Some(Json::Bool(false)) => Ok(Self { inclusive: low, exclusive: None }),
            _ => Ok(Self { inclusive: low, exclusive: number(exclusive)? }),
        }
    }

    fn is_none(&self) -> bool {
        self.inclusive.is_none() && self.exclusive.is_none()
    }

    /// The keyword that a refusal names.
    fn keyword(&self, inclusive: &'static str, exclusive: &'static str) -> &'static str {
        if self.exclusive.is_some() { exclusive } else { inclusive }
    }
}

fn integer_bounds(low: &Bound<'_>, high: &Bound<'_>, out: &mut Map<String, Value>) -> Result<(), Refusal> {
    let inexact = |keyword, value: i128| {
        let why = format!("{value} is beyond 2^53 and is not kept exactly; take a rounder bound");
        Err(Refusal::new(keyword, why))
    };
    let (low_keyword, high_keyword) =
        (low.keyword("minimum", "exclusiveMinimum"), high.keyword("maximum", "exclusiveMaximum"));
    let beyond = |keyword, value: i128| {
        Err(Refusal::new(keyword, format!("no 64-bit integer satisfies the bound {value}")))
    };
    let asked_low = low.inclusive.map(Decimal::ceil).max(low.exclusive.map(|value| value.floor() + 1));
    let asked_high = [high.inclusive.map(Decimal::floor), high.exclusive.map(|value| value.ceil() - 1)];
    let asked_high = asked_high.into_iter().flatten().min();
    let (mut least, mut most) = (asked_low, asked_high);
    if let Some(value) = least {
        match value.max(LOWEST) {
            value if value > HIGHEST => return beyond(low_keyword, value),
            value if !exact_integer(value) => return inexact(low_keyword, value),
            value => least = Some(value),
        }
    }
    if let Some(value) = most {
        match value.min(HIGHEST) {
            value if value < LOWEST => return beyond(high_keyword, value),
            value if !exact_integer(value) => return inexact(high_keyword, value),
            value => most = Some(value),
        }
    }
    // The compiler has no open interval from 19 digits on.
    const OPEN_LIMIT: i128 = 1_000_000_000_000_000_000;
    if most.is_none() && least.is_some_and(|value| value >= OPEN_LIMIT) {
        most = Some(HIGHEST);
    }
    if least.is_none() && most.is_some_and(|value| value <= -OPEN_LIMIT) {
        least = Some(LOWEST);
    }
    for (keyword, value) in [("minimum", least), ("maximum", most)] {
        if let Some(value) = value.and_then(|value| i64::try_from(value).ok()) {
            out.insert(keyword.to_owned(), value.into());
        }
    }
    Ok(())
}

fn float_bounds(
    low: &Bound<'_>,
    high: &Bound<'_>,
    out: &mut Map<String, Value>,
    facts: &mut NumberFacts,
) -> Result<(), Refusal> {
    let limit = Decimal::parse(FLOAT_BOUND_LIMIT);
    for (keyword, value) in [("minimum", low.inclusive), ("exclusiveMinimum", low.exclusive)] {
        let Some(value) = value else { continue };
        if *value >= limit {
            return Err(too_large(keyword, value));
        }
        let number =
            if *value <= limit.negated() { (-FLOAT_BOUND).into() } else { float_bound(keyword, value)? };
        out.insert(keyword.to_owned(), Value::Number(number));
    }
    for (keyword, value) in [("maximum", high.inclusive), ("exclusiveMaximum", high.exclusive)] {
        let Some(value) = value else { continue };
        if *value <= limit.negated() {
            return Err(too_large(keyword, value));
        }
        let number = if *value >= limit { FLOAT_BOUND.into() } else { float_bound(keyword, value)? };
        out.insert(keyword.to_owned(), Value::Number(number));
    }
    if low.is_none() && high.is_none() {
        return Ok(());
    }
    let upper: Vec<Decimal> = [high.inclusive, high.exclusive].into_iter().flatten().cloned().collect();
    let lower: Vec<Decimal> =
        [low.inclusive, low.exclusive].into_iter().flatten().map(Decimal::negated).collect();
    for (keyword, exclusive, limits) in [
        ("exclusiveMinimum", low.exclusive.cloned(), &upper),
        ("exclusiveMaximum", high.exclusive.map(Decimal::negated), &lower),
    ] {
        let Some(exclusive) = exclusive else { continue };
        if let Some(limit) = limits.iter().find(|limit| shares_whole_digits(&exclusive, limit)) {
            return Err(open_interval(keyword, &exclusive, limit));
        }
        if exclusive.is_whole() && !exclusive.is_negative() {
            facts.exclusive.insert(exclusive.floor(), exclusive);
        }
    }
    let limits = upper.into_iter().chain(lower).filter(|limit| !limit.is_whole() && !limit.is_negative());
    facts.limits.extend(limits.map(|limit| (limit.floor(), limit)));
    Ok(())
}

fn float_bound(keyword: &str, value: &Decimal) -> Result<Number, Refusal> {
    let whole = value.is_whole();
    if whole && exact_integer(value.floor()) && prints_exactly(value) {
        // -0.0 becomes 0.
        return Ok(i64::try_from(value.floor()).unwrap_or_default().into());
    }
    match Number::from_f64(value.to_f64()) {
        Some(float) if !whole && prints_exactly(value) => Ok(float),
        _ => {
            let why = format!("{} has more digits than are kept exactly; round it", shortened_number(value));
            Err(Refusal::new(keyword, why))
        }
    }
}

fn too_large(keyword: &str, value: &Decimal) -> Refusal {
    Refusal::new(keyword, format!("{} is too large a bound for numbers", shortened_number(value)))
}

/// Whether an upper limit has the whole digits of a whole number that is itself excluded below it: the
/// compiler then also takes the excluded number.
fn shares_whole_digits(exclusive: &Decimal, limit: &Decimal) -> bool {
    exclusive.is_whole()
        && !exclusive.is_negative()
        && !limit.is_whole()
        && !limit.is_negative()
        && limit.floor() == exclusive.floor()
}

fn open_interval(keyword: &str, exclusive: &Decimal, limit: &Decimal) -> Refusal {
    let why = format!(
        "the interval between {} and {} cannot be open at its whole number; give that end inclusively or a little \
         further in",
        shortened_number(exclusive),
        shortened_number(limit)
    );
    Refusal::new(keyword, why)
}

/// A `multipleOf`, as the compiler's own conversion from a float would read it.
fn multiple(value: &Json, facts: &mut NumberFacts) -> Result<Number, Refusal> {
    let refused = |why: String| Err(Refusal::new("multipleOf", why));
    let Json::Number(number) = value else { return refused("a number is expected".to_owned()) };
    if number.is_zero() || number.is_negative() {
        return refused("a number above 0 is expected".to_owned());
    }
    let float = number.to_f64();
    let (mut scaled, mut places) = (float, 0u32);
    while scaled.fract() != 0.0 && places <= 20 {
        scaled *= 10.0;
        places += 1;
    }
    if !scaled.is_finite() || scaled > f64::from(u32::MAX) || scaled.fract() != 0.0 {
        return refused(format!("{} has too many digits", shortened_number(number)));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "between 0 and 2^32 as checked above"
    )]
    let mut coefficient = scaled as u64;
    while places > 0 && coefficient.is_multiple_of(10) {
        coefficient /= 10;
        places -= 1;
    }
    if Decimal::parse(&format!("{coefficient}e-{places}")) != *number {
        return refused(format!("{} has too many digits", shortened_number(number)));
    }
    check_multiple(coefficient, places)?;
    facts.multiples.insert((coefficient, places));
    Number::from_f64(float).map_or_else(|| refused("a finite number is expected".to_owned()), Ok)
}

/// The compiler keeps `remainder × 10 + digit × 10^places` in 32 bits, where a remainder reaches the
/// coefficient.
fn check_multiple(coefficient: u64, places: u32) -> Result<(), Refusal> {
    let most = coefficient.saturating_mul(10).saturating_add(10u64.saturating_pow(places).saturating_mul(9));
    if coefficient == 0 || most > u64::from(u32::MAX) {
        return Err(Refusal::new(
            "multipleOf",
            "it, or a common multiple of several, has too many digits".to_owned(),
        ));
    }
    Ok(())
}

fn greatest_divisor(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { greatest_divisor(b, a % b) }
}

/// The number, or the beginning of one that is long.
fn shortened_number(number: &Decimal) -> String {
    crate::grammar::shortened(number.text(), 40)
}
