//! The formats of strings: which are exact by the compiler, which are written out here, which are refused.

use super::Refusal;
use super::values::expected;
use crate::grammar::json::{Json, Members};
use crate::grammar::shortened;
use serde_json::Value;

/// Formats of the compiler that take nothing which their standard forbids.
const EXACT: &[&str] = &["duration", "email", "ipv4", "ipv6", "uri", "uuid"];

/// Days that exist, also in leap years, of the years 0001 to 9999.
const DATE: &str = concat!(
    "(?:(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})-(?:",
    "(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|",
    "(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|",
    "02-(?:0[1-9]|1[0-9]|2[0-8]))|",
    "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)-02-29)",
);

/// Without leap seconds, which only some days have.
const TIME: &str = concat!(
    "(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\\.[0-9]{1,9})?",
    "(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])",
);

/// One label of a host name, of 1 to 63 characters. Hyphens in the third and fourth position mark an encoded
/// name, whose rules no expression has.
const LABEL: &str = "[a-zA-Z0-9](?:[a-zA-Z0-9]|[a-zA-Z0-9-][a-zA-Z0-9](?:[a-zA-Z0-9-]{0,59}[a-zA-Z0-9])?|\
                     [a-zA-Z0-9-]-[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,58}[a-zA-Z0-9])?)?";

/// Longest host name and longest address of mail, in characters (RFC 1123, RFC 5321).
const HOSTNAME_MAX_CHARS: u64 = 253;
const EMAIL_MAX_CHARS: u64 = 254;

/// The keywords that stand for a format.
pub(super) fn rewrite(schema: &Members, value: &Json) -> Result<Vec<(&'static str, Value)>, Refusal> {
    let name = value.as_str().ok_or_else(|| expected("format", "a string"))?;
    let strings = match schema.get("type") {
        Some(Json::String(name)) => name == "string",
        Some(Json::Array(names)) => names.iter().any(|name| name.as_str() == Some("string")),
        _ => true,
    };
    let pattern = |text: String| vec![("pattern", Value::String(format!("^(?:{text})$")))];
    Ok(match name {
        // A format says nothing about other types.
        _ if !strings => Vec::new(),
        "date" => pattern(DATE.to_owned()),
        "time" => pattern(TIME.to_owned()),
        "date-time" => pattern(format!("{DATE}[tT]{TIME}")),
        "hostname" => {
            let mut keywords = pattern(format!("{LABEL}(?:\\.{LABEL})*"));
            keywords.push(("allOf", limit(HOSTNAME_MAX_CHARS)));
            keywords
        }
        "email" => vec![("format", value_of(name)), ("allOf", limit(EMAIL_MAX_CHARS))],
        name if EXACT.contains(&name) => vec![("format", value_of(name))],
        name => {
            let why = format!(
                "there is no format {:?} here; give one of date, time, date-time, hostname, {}, or a pattern",
                shortened(name, 40),
                EXACT.join(", ")
            );
            return Err(Refusal::new("format", why));
        }
    })
}

fn value_of(name: &str) -> Value {
    Value::String(name.to_owned())
}

fn limit(chars: u64) -> Value {
    serde_json::json!([{ "maxLength": chars }])
}
