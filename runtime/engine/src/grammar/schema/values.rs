//! Single keywords: their values read, checked and put together.

use super::Refusal;
use crate::grammar::json::{Json, Members};
use crate::grammar::shortened;
use serde_json::{Map, Value};
use std::collections::HashSet;

/// The largest length or count that is handed on. Longer answers do not exist: a context has fewer tokens.
const MAX_COUNT: u64 = 1_000_000_000;

const TYPES: &[&str] = &["null", "boolean", "object", "array", "number", "string", "integer"];

/// Most properties of one object. The compiler's time is their square: these take 2 s.
const MAX_PROPERTIES: usize = 4_000;

/// Most properties of one object that are not required. Each takes 4 of the 2,000 items of a row of the
/// compiler.
const MAX_OPTIONAL_PROPERTIES: usize = 480;

/// Most patterns for the names of one object's properties. Each is compared with each other one, at 0.2 ms.
const MAX_NAME_PATTERNS: usize = 64;

/// Refuses an object with more properties than the compiler handles.
pub(super) fn check_size(out: &Map<String, Value>) -> Result<(), Refusal> {
    let patterns = out.get("patternProperties").and_then(Value::as_object).map_or(0, Map::len);
    if patterns > MAX_NAME_PATTERNS {
        let why = format!("there are {patterns}; at most {MAX_NAME_PATTERNS} are compiled");
        return Err(Refusal::new("patternProperties", why));
    }
    let Some(Value::Object(properties)) = out.get("properties") else { return Ok(()) };
    let required: HashSet<&str> = out
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let optional = properties.keys().filter(|name| !required.contains(name.as_str())).count();
    let why = match (properties.len(), optional) {
        (count, _) if count > MAX_PROPERTIES => {
            format!("there are {count}; at most {MAX_PROPERTIES} are compiled")
        }
        (_, count) if count > MAX_OPTIONAL_PROPERTIES => {
            format!(
                "{count} are not required; at most {MAX_OPTIONAL_PROPERTIES} are compiled, so require some"
            )
        }
        _ => return Ok(()),
    };
    Err(Refusal::new("properties", why))
}

/// Adds a keyword that may have a value already: then both hold.
pub(super) fn combine(out: &mut Map<String, Value>, keyword: &str, value: Value) {
    match out.get_mut(keyword) {
        None => {
            out.insert(keyword.to_owned(), value);
        }
        Some(Value::Array(list)) if keyword == "allOf" => {
            if let Value::Array(more) = value {
                list.extend(more);
            }
        }
        Some(_) => {
            let mut other = Map::new();
            other.insert(keyword.to_owned(), value);
            combine(out, "allOf", Value::Array(vec![Value::Object(other)]));
        }
    }
}

/// Keywords that the compiler applies one by one; all others it has to see together, since it combines what
/// stands on both sides of one of these without regard to patterns.
const APPLICATORS: &[&str] = &["$ref", "allOf", "anyOf", "const", "enum", "oneOf"];

/// The keywords with all but the applicators side by side, where the first of them stands: the order of
/// properties stays.
pub(super) fn grouped(schema: Map<String, Value>) -> Map<String, Value> {
    let applies = |keyword: &String| APPLICATORS.contains(&keyword.as_str());
    let first = schema.keys().position(|keyword| keyword == "properties");
    let first = first.or_else(|| schema.keys().position(|keyword| !applies(keyword) && keyword != "type"));
    let mut groups = [Map::new(), Map::new(), Map::new()];
    for (index, (keyword, value)) in schema.into_iter().enumerate() {
        let group = match first {
            _ if !applies(&keyword) => 1,
            Some(first) if index < first => 0,
            _ => 2,
        };
        groups[group].insert(keyword, value);
    }
    groups.into_iter().flatten().collect()
}

pub(super) fn expected(keyword: &str, what: &str) -> Refusal {
    Refusal::new(keyword, format!("{what} is expected"))
}

/// Whether a document has the type `integer` anywhere.
pub(super) fn names_integer(json: &Json) -> bool {
    match json {
        Json::String(text) => text == "integer",
        Json::Array(list) => list.iter().any(names_integer),
        Json::Object(members) => members.iter().any(|(_, value)| names_integer(value)),
        _ => false,
    }
}

/// Characters that JSON writes as `\u00XX` only.
pub(super) fn has_control(text: &str) -> bool {
    text.bytes().any(|b| (b < 0x20 && !b"\x08\x09\x0A\x0C\x0D".contains(&b)) || b == 0x7F)
}

pub(super) fn only_strings(schema: &Members) -> bool {
    schema.iter().all(|(keyword, value)| keyword == "type" && value.as_str() == Some("string"))
}

pub(super) fn is_zero(value: Option<&Json>) -> bool {
    matches!(value, Some(Json::Number(number)) if number.is_zero())
}

pub(super) fn at_most_one_item(schema: &Members) -> bool {
    matches!(schema.get("maxItems"), Some(Json::Number(number)) if number.floor() <= 1)
}

pub(super) fn types(value: &Json) -> Result<Value, Refusal> {
    let name = |value: &Json| match value.as_str() {
        Some(name) if TYPES.contains(&name) => Ok(Value::String(name.to_owned())),
        Some(name) => {
            let why = format!("there is no type {:?}; give one of {}", shortened(name, 40), TYPES.join(", "));
            Err(Refusal::new("type", why))
        }
        None => Err(expected("type", "a name or a list of names")),
    };
    match value {
        Json::Array(list) if list.is_empty() => Err(expected("type", "at least one name")),
        Json::Array(list) => {
            let mut names = Vec::new();
            for value in list {
                let value = name(value)?;
                if !names.contains(&value) {
                    names.push(value);
                }
            }
            Ok(Value::Array(names))
        }
        value => name(value),
    }
}

pub(super) fn count(keyword: &str, value: &Json) -> Result<u64, Refusal> {
    match value {
        Json::Number(number) if number.is_whole() && !number.is_negative() => {
            Ok(u64::try_from(number.floor()).unwrap_or(MAX_COUNT).min(MAX_COUNT))
        }
        _ => Err(expected(keyword, "a whole number from 0")),
    }
}

pub(super) fn required(value: &Json, out: &mut Map<String, Value>) -> Result<(), Refusal> {
    let list = value.as_array().ok_or_else(|| expected("required", "a list of names"))?;
    for name in list {
        let name = name.as_str().ok_or_else(|| expected("required", "a list of names"))?;
        require(out, name);
    }
    Ok(())
}

pub(super) fn require(out: &mut Map<String, Value>, name: &str) {
    let names = out.entry("required").or_insert_with(|| Value::Array(Vec::new()));
    if let Value::Array(names) = names
        && !names.iter().any(|other| other == name)
    {
        names.push(Value::String(name.to_owned()));
    }
}

/// What a property that is always there requires is always required.
pub(super) fn dependent_required(schema: &Members, out: &mut Map<String, Value>) -> Result<(), Refusal> {
    let Some(value) = schema.get("dependentRequired") else { return Ok(()) };
    let wrong = || expected("dependentRequired", "an object of lists of names");
    let mut missing: Vec<_> = value.as_object().ok_or_else(wrong)?.iter().collect();
    while !missing.is_empty() {
        let (present, absent): (Vec<_>, Vec<_>) = missing
            .into_iter()
            .partition(|(name, names)| is_required(out, name) || names.as_array() == Some(&[]));
        if present.is_empty() {
            let why = format!("it is supported only for properties that are required, which {:?} is not", {
                shortened(absent.first().map_or("", |(name, _)| name), 40)
            });
            return Err(Refusal::new("dependentRequired", why));
        }
        for (_, names) in present {
            for name in names.as_array().ok_or_else(wrong)? {
                require(out, name.as_str().ok_or_else(wrong)?);
            }
        }
        missing = absent;
    }
    Ok(())
}

pub(super) fn is_required(out: &Map<String, Value>, name: &str) -> bool {
    out.get("required").and_then(Value::as_array).is_some_and(|names| names.iter().any(|other| other == name))
}

/// The compiler counts members, but among names that are not fixed it may repeat one, and JSON keeps one of
/// them.
pub(super) fn check_names(out: &Map<String, Value>) -> Result<(), Refusal> {
    let least = out.get("minProperties").and_then(Value::as_u64).unwrap_or(0);
    let required = out.get("required").and_then(Value::as_array).map_or(0, Vec::len) as u64;
    let closed = out.get("additionalProperties") == Some(&Value::Bool(false))
        && !out.contains_key("patternProperties");
    if least > required + 1 && !closed {
        let why = format!(
            "{least} properties of names that are not fixed could repeat one; name them in \"required\", or set \
             \"additionalProperties\" to false"
        );
        return Err(Refusal::new("minProperties", why));
    }
    Ok(())
}
