//! What a schema grows to when the compiler combines its alternatives, worked out before it does.

use super::Refusal;
use serde_json::{Map, Value};

/// Most bytes of schema text after everything that stands at one place was combined: in the compiler some ten
/// times as much memory.
const MAX_COMBINED_BYTES: u64 = 8 * 1024 * 1024;

/// Most patterns and formats that one string has to match. The compiler's states are all their combinations:
/// 60 patterns took minutes and gigabytes.
const MAX_PATTERNS: u64 = 8;

/// How deep references are followed; deeper ones count as this much further text.
const MAX_FOLLOWED: usize = 32;

/// Alternatives at one place and the text of all of them.
#[derive(Clone, Copy)]
struct Weight {
    options: u64,
    bytes: u64,
    /// Patterns that one string has to match.
    patterns: u64,
}

impl Weight {
    const NONE: Self = Self { options: 1, bytes: 0, patterns: 0 };

    /// Both hold: each alternative of one with each of the other.
    fn combined(self, other: Self) -> Self {
        Self {
            options: self.options.saturating_mul(other.options),
            bytes: other
                .options
                .saturating_mul(self.bytes)
                .saturating_add(self.options.saturating_mul(other.bytes)),
            patterns: self.patterns.saturating_add(other.patterns),
        }
    }
}

/// Refuses a schema whose alternatives multiply beyond the limit.
pub(super) fn check(schema: &Value, definitions: &Map<String, Value>) -> Result<(), Refusal> {
    let mut total = 0u64;
    let mut work = Work { definitions, steps: 0, most_patterns: 0 };
    for value in std::iter::once(schema).chain(definitions.values()) {
        total = total.saturating_add(work.weigh(value, Scope { followed: 0, combining: false }).bytes);
    }
    if total > MAX_COMBINED_BYTES {
        let why = "the alternatives that are combined with each other (allOf, anyOf, oneOf, enum, $ref beside other \
                   keywords) multiply beyond what is compiled; combine fewer"
            .to_owned();
        return Err(Refusal::new("allOf", why));
    }
    if work.most_patterns > MAX_PATTERNS {
        let why = format!("more than {MAX_PATTERNS} patterns hold for one string; combine them in one");
        return Err(Refusal::new("pattern", why));
    }
    Ok(())
}

/// What surrounds a schema.
#[derive(Clone, Copy)]
struct Scope {
    followed: usize,
    /// Whether it is combined with another one, so that the compiler copies what its references lead to.
    combining: bool,
}

struct Work<'a> {
    definitions: &'a Map<String, Value>,
    steps: usize,
    most_patterns: u64,
}

impl Work<'_> {
    fn weigh(&mut self, value: &Value, scope: Scope) -> Weight {
        self.steps += 1;
        // 20,000 schemas have fewer parts; only references that meet again and again have more.
        if self.steps > 1_000_000 {
            return Weight { bytes: MAX_COMBINED_BYTES, ..Weight::NONE };
        }
        let Value::Object(members) = value else {
            return Weight { bytes: leaf_bytes(value), ..Weight::NONE };
        };
        let mut own = Weight { bytes: 16, ..Weight::NONE };
        let several = members.get("allOf").and_then(Value::as_array).is_some_and(|list| list.len() > 1);
        let scope = Scope { combining: scope.combining || several || members.len() > 1, ..scope };
        let apart = Scope { combining: false, ..scope };
        for (keyword, value) in members {
            let weight = match (keyword.as_str(), value) {
                ("allOf", Value::Array(list)) => {
                    list.iter().fold(Weight::NONE, |all, value| all.combined(self.weigh(value, scope)))
                }
                ("anyOf" | "oneOf", Value::Array(list)) => self.sum(list, scope),
                ("enum", Value::Array(list)) => {
                    let bytes = list.iter().map(leaf_bytes).sum();
                    Weight { options: list.len() as u64, bytes, patterns: 0 }
                }
                ("$ref", Value::String(name)) if scope.combining => self.follow(name, scope),
                ("properties" | "patternProperties", Value::Object(map)) => {
                    let bytes =
                        map.iter().map(|(name, value)| name.len() as u64 + self.weigh(value, apart).bytes);
                    Weight { bytes: bytes.fold(0, u64::saturating_add), ..Weight::NONE }
                }
                ("prefixItems", Value::Array(list)) => {
                    Weight { bytes: self.sum(list, apart).bytes, ..Weight::NONE }
                }
                ("items" | "additionalProperties", value) => {
                    Weight { bytes: self.weigh(value, apart).bytes, ..Weight::NONE }
                }
                ("pattern" | "format", value) => {
                    Weight { bytes: leaf_bytes(value), patterns: 1, ..Weight::NONE }
                }
                (_, value) => Weight { bytes: leaf_bytes(value), ..Weight::NONE },
            };
            own = own.combined(weight);
        }
        self.most_patterns = self.most_patterns.max(own.patterns);
        own
    }

    fn sum(&mut self, list: &[Value], scope: Scope) -> Weight {
        list.iter().fold(Weight { options: 0, ..Weight::NONE }, |sum, value| {
            let one = self.weigh(value, scope);
            Weight {
                options: sum.options.saturating_add(one.options),
                bytes: sum.bytes.saturating_add(one.bytes),
                patterns: sum.patterns.max(one.patterns),
            }
        })
    }

    fn follow(&mut self, name: &str, scope: Scope) -> Weight {
        let target = name.strip_prefix("#/$defs/").and_then(|name| self.definitions.get(name));
        match target {
            Some(target) if scope.followed < MAX_FOLLOWED => {
                self.weigh(target, Scope { followed: scope.followed + 1, ..scope })
            }
            _ => Weight { bytes: 16, ..Weight::NONE },
        }
    }
}

fn leaf_bytes(value: &Value) -> u64 {
    match value {
        Value::String(text) => text.len() as u64 + 2,
        Value::Array(list) => list.iter().map(leaf_bytes).sum::<u64>() + 2,
        Value::Object(members) => {
            members.iter().map(|(name, value)| name.len() as u64 + leaf_bytes(value)).sum::<u64>() + 2
        }
        _ => 8,
    }
}
