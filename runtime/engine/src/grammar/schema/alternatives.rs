//! `oneOf` whose schemas no value satisfies twice is `anyOf`, which the compiler has.
//!
//! Two schemas are told apart by types, constants, ranges of numbers, lengths, the items of lists or required
//! properties. Where that proves nothing `oneOf` stays, and the compiler decides by what it can prove.

use crate::grammar::decimal::Decimal;
use serde_json::{Map, Value};
use std::cell::Cell;

/// How deep two schemas are compared.
const MAX_DEPTH: usize = 12;

/// Most comparisons for one document, at some 200 ns each.
const MAX_STEPS: usize = 500_000;

const KINDS: &[Kind] = &[Kind::Null, Kind::Boolean, Kind::Number, Kind::String, Kind::Array, Kind::Object];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Null,
    Boolean,
    Number,
    String,
    Array,
    Object,
}

impl Kind {
    fn of(value: &Value) -> Self {
        match value {
            Value::Null => Self::Null,
            Value::Bool(_) => Self::Boolean,
            Value::Number(_) => Self::Number,
            Value::String(_) => Self::String,
            Value::Array(_) => Self::Array,
            Value::Object(_) => Self::Object,
        }
    }

    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "null" => Self::Null,
            "boolean" => Self::Boolean,
            "number" | "integer" => Self::Number,
            "string" => Self::String,
            "array" => Self::Array,
            "object" => Self::Object,
            _ => return None,
        })
    }
}

/// Replaces every `oneOf` whose alternatives exclude each other.
pub(super) fn make_exclusive(schema: &mut Value, definitions: &mut Map<String, Value>) {
    let original = definitions.clone();
    let prover = Prover { definitions: &original, steps: Cell::new(MAX_STEPS) };
    replace(schema, &prover);
    definitions.values_mut().for_each(|schema| replace(schema, &prover));
}

/// Goes through all schemas; constants are none.
fn replace(schema: &mut Value, prover: &Prover<'_>) {
    let Value::Object(members) = schema else { return };
    for (keyword, value) in members.iter_mut() {
        match (keyword.as_str(), value) {
            ("const" | "enum", _) => {}
            ("properties" | "patternProperties", Value::Object(map)) => {
                map.values_mut().for_each(|schema| replace(schema, prover));
            }
            (_, Value::Array(list)) => list.iter_mut().for_each(|schema| replace(schema, prover)),
            (_, value) => replace(value, prover),
        }
    }
    let exclusive =
        members.get("oneOf").and_then(Value::as_array).is_some_and(|list| prover.all_disjoint(list));
    if exclusive {
        let out = std::mem::take(members);
        for (keyword, value) in out {
            let keyword = if keyword == "oneOf" { "anyOf".to_owned() } else { keyword };
            super::values::combine(members, &keyword, value);
        }
    }
}

struct Prover<'a> {
    definitions: &'a Map<String, Value>,
    steps: Cell<usize>,
}

impl<'a> Prover<'a> {
    fn all_disjoint(&self, list: &'a [Value]) -> bool {
        list.iter()
            .enumerate()
            .all(|(index, one)| list[index + 1..].iter().all(|other| self.disjoint(one, other, 0)))
    }

    /// Whether surely no value satisfies both.
    fn disjoint(&self, one: &'a Value, other: &'a Value, depth: usize) -> bool {
        if self.steps.get() == 0 || depth > MAX_DEPTH {
            return false;
        }
        self.steps.set(self.steps.get() - 1);
        if *one == Value::Bool(false) || *other == Value::Bool(false) {
            return true;
        }
        let (ones, others) = (self.conjuncts(one), self.conjuncts(other));
        let pairs =
            ones.iter().any(|one| others.iter().any(|other| self.members_disjoint(one, other, depth)));
        pairs
            || ones.iter().any(|members| self.every_option(members, other, depth))
            || others.iter().any(|members| self.every_option(members, one, depth))
    }

    fn every_option(&self, members: &'a Map<String, Value>, other: &'a Value, depth: usize) -> bool {
        ["anyOf", "oneOf"].iter().any(|keyword| {
            let options = members.get(*keyword).and_then(Value::as_array);
            options
                .is_some_and(|options| options.iter().all(|option| self.disjoint(option, other, depth + 1)))
        })
    }

    /// The schemas that all have to hold.
    fn conjuncts(&self, schema: &'a Value) -> Vec<&'a Map<String, Value>> {
        let mut found: Vec<&'a Map<String, Value>> = Vec::new();
        let mut next = vec![schema];
        while let Some(schema) = next.pop() {
            let Value::Object(members) = schema else { continue };
            if found.len() >= MAX_DEPTH || found.iter().any(|other| std::ptr::eq(*other, members)) {
                continue;
            }
            found.push(members);
            if let Some(Value::String(name)) = members.get("$ref") {
                next.extend(name.strip_prefix("#/$defs/").and_then(|name| self.definitions.get(name)));
            }
            if let Some(Value::Array(list)) = members.get("allOf") {
                next.extend(list);
            }
        }
        found
    }

    fn members_disjoint(
        &self,
        one: &'a Map<String, Value>,
        other: &'a Map<String, Value>,
        depth: usize,
    ) -> bool {
        if let Some(values) = constants(one) {
            return values.iter().all(|value| !self.admits(other, value, depth));
        }
        if let Some(values) = constants(other) {
            return values.iter().all(|value| !self.admits(one, value, depth));
        }
        let common = KINDS.iter().filter(|kind| has_kind(one, **kind) && has_kind(other, **kind));
        common.copied().all(|kind| match kind {
            Kind::Null | Kind::Boolean => false,
            Kind::Number => apart(&Range::of_numbers(one), &Range::of_numbers(other)),
            Kind::String => counts_apart(one, other, "minLength", "maxLength"),
            Kind::Array => {
                counts_apart(one, other, "minItems", "maxItems") || self.items_disjoint(one, other, depth)
            }
            Kind::Object => {
                counts_apart(one, other, "minProperties", "maxProperties")
                    || self.properties_disjoint(one, other, depth)
            }
        })
    }

    /// Whether an item that both lists have to have is never the same.
    fn items_disjoint(
        &self,
        one: &'a Map<String, Value>,
        other: &'a Map<String, Value>,
        depth: usize,
    ) -> bool {
        let least = number_of(one, "minItems").unwrap_or(0).max(number_of(other, "minItems").unwrap_or(0));
        let written = |schema: &Map<String, Value>| {
            schema.get("prefixItems").and_then(Value::as_array).map_or(0, Vec::len)
        };
        let compared = least.min(1 + written(one).max(written(other)) as u64);
        (0..compared).any(|index| match (item(one, index), item(other, index)) {
            (Some(one), Some(other)) => self.disjoint(one, other, depth + 1),
            _ => false,
        })
    }

    /// Whether a property that one of them requires is never the same.
    fn properties_disjoint(
        &self,
        one: &'a Map<String, Value>,
        other: &'a Map<String, Value>,
        depth: usize,
    ) -> bool {
        let required = |schema: &'a Map<String, Value>| {
            schema.get("required").and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str)
        };
        required(one).chain(required(other)).any(|name| match (property(one, name), property(other, name)) {
            (Some(Value::Bool(false)), _) | (_, Some(Value::Bool(false))) => true,
            (Some(one), Some(other)) => self.disjoint(one, other, depth + 1),
            _ => false,
        })
    }

    /// False where surely the value does not satisfy the schema.
    fn admits(&self, schema: &'a Map<String, Value>, value: &'a Value, depth: usize) -> bool {
        if self.steps.get() == 0 || depth > MAX_DEPTH {
            return true;
        }
        self.steps.set(self.steps.get() - 1);
        if !has_kind(schema, Kind::of(value)) {
            return false;
        }
        if let Some(values) = constants(schema) {
            return values.iter().any(|other| equal(other, value));
        }
        match value {
            Value::Null | Value::Bool(_) => true,
            Value::Number(number) => {
                let number = Decimal::parse(&number.to_string());
                (number.is_whole() || !only_integers(schema)) && Range::of_numbers(schema).contains(&number)
            }
            Value::String(text) => within(schema, "minLength", "maxLength", text.chars().count()),
            Value::Array(list) => {
                within(schema, "minItems", "maxItems", list.len())
                    && (0..).zip(list).all(|(index, value)| {
                        item(schema, index).is_none_or(|item| self.schema_admits(item, value, depth + 1))
                    })
            }
            Value::Object(members) => {
                let required = schema.get("required").and_then(Value::as_array);
                let complete = required.into_iter().flatten().filter_map(Value::as_str);
                complete.into_iter().all(|name| members.contains_key(name))
                    && members.iter().all(|(name, value)| {
                        property(schema, name)
                            .is_none_or(|schema| self.schema_admits(schema, value, depth + 1))
                    })
            }
        }
    }

    fn schema_admits(&self, schema: &'a Value, value: &'a Value, depth: usize) -> bool {
        *schema != Value::Bool(false)
            && self.conjuncts(schema).iter().all(|members| self.admits(members, value, depth))
    }
}

/// The values of `const` and `enum`, where there are.
fn constants(schema: &Map<String, Value>) -> Option<&[Value]> {
    match (schema.get("const"), schema.get("enum")) {
        (Some(value), _) => Some(std::slice::from_ref(value)),
        (None, Some(Value::Array(list))) => Some(list),
        _ => None,
    }
}

/// Equality of JSON Schema: 1 and 1.0 are the same number.
fn equal(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => {
            Decimal::parse(&one.to_string()) == Decimal::parse(&other.to_string())
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| equal(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(name, value)| other.get(name).is_some_and(|other| equal(value, other)))
        }
        (one, other) => one == other,
    }
}

fn type_names(schema: &Map<String, Value>) -> Option<Vec<&str>> {
    match schema.get("type")? {
        Value::String(name) => Some(vec![name]),
        Value::Array(names) => Some(names.iter().filter_map(Value::as_str).collect()),
        _ => None,
    }
}

fn has_kind(schema: &Map<String, Value>, kind: Kind) -> bool {
    type_names(schema).is_none_or(|names| names.iter().any(|name| Kind::named(name) == Some(kind)))
}

fn only_integers(schema: &Map<String, Value>) -> bool {
    type_names(schema).is_some_and(|names| names.contains(&"integer") && !names.contains(&"number"))
}

/// An interval of numbers; an end that is excluded has `true`.
struct Range {
    low: Option<(Decimal, bool)>,
    high: Option<(Decimal, bool)>,
}

impl Range {
    fn of_numbers(schema: &Map<String, Value>) -> Self {
        let end = |keyword: &str, excluded: bool| match schema.get(keyword) {
            Some(Value::Number(number)) => Some((Decimal::parse(&number.to_string()), excluded)),
            _ => None,
        };
        let low = [end("minimum", false), end("exclusiveMinimum", true)].into_iter().flatten().max();
        let high = [end("maximum", false), end("exclusiveMaximum", true)].into_iter().flatten();
        // Of two equal ends the excluded one is the stricter.
        let high = high.min_by(|one, other| one.0.cmp(&other.0).then(other.1.cmp(&one.1)));
        Self { low, high }
    }

    fn contains(&self, number: &Decimal) -> bool {
        let above =
            self.low.as_ref().is_none_or(|(low, excluded)| number > low || (!excluded && number == low));
        let below =
            self.high.as_ref().is_none_or(|(high, excluded)| number < high || (!excluded && number == high));
        above && below
    }
}

fn apart(one: &Range, other: &Range) -> bool {
    let before = |high: &Option<(Decimal, bool)>, low: &Option<(Decimal, bool)>| match (high, low) {
        (Some((high, high_excluded)), Some((low, low_excluded))) => {
            high < low || (high == low && (*high_excluded || *low_excluded))
        }
        _ => false,
    };
    before(&one.high, &other.low) || before(&other.high, &one.low)
}

fn number_of(schema: &Map<String, Value>, keyword: &str) -> Option<u64> {
    schema.get(keyword).and_then(Value::as_u64)
}

fn counts_apart(one: &Map<String, Value>, other: &Map<String, Value>, least: &str, most: &str) -> bool {
    let before = |one, other| match (number_of(one, most), number_of(other, least)) {
        (Some(most), Some(least)) => most < least,
        _ => false,
    };
    before(one, other) || before(other, one)
}

fn within(schema: &Map<String, Value>, least: &str, most: &str, count: usize) -> bool {
    let count = count as u64;
    number_of(schema, least).is_none_or(|least| count >= least)
        && number_of(schema, most).is_none_or(|most| count <= most)
}

/// The schema of one item, where the schema says something about it.
fn item(schema: &Map<String, Value>, index: u64) -> Option<&Value> {
    let index = usize::try_from(index).ok()?;
    let first = schema.get("prefixItems").and_then(Value::as_array);
    first.and_then(|items| items.get(index)).or_else(|| schema.get("items"))
}

/// The schema of one property, where the schema surely says it.
fn property<'a>(schema: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    let own = schema.get("properties").and_then(|properties| properties.get(name));
    own.or_else(|| {
        let other = schema.get("additionalProperties")?;
        (!schema.contains_key("patternProperties")).then_some(other)
    })
}
