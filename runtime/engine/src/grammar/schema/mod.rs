//! A caller's JSON schema, rewritten to the dialect that the compiler honours exactly, or refused.
//!
//! llguidance drops what it does not support in some drafts, takes numbers as floats and resolves only plain
//! pointers. So every keyword passes here first: it is rewritten to something that has the same meaning
//! there, refused with its name and its path, or, as an annotation, left out. What comes out has one draft,
//! references only to `#/$defs/rN`, and numbers that survive.

mod alternatives;
mod formats;
mod keywords;
mod numbers;
mod references;
mod values;
mod weight;

use super::json::{Json, Members};
use super::{pattern, shortened};
use numbers::NumberFacts;
use references::{References, Target, base_of};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use values::{
    at_most_one_item, check_names, check_size, combine, count, dependent_required, expected, grouped,
    has_control, is_zero, names_integer, only_strings, required, types,
};

/// Most schemas (objects and booleans) in one document, each counted at every place from which it is referred
/// to once. The compiler's own limit is 50,000 steps.
const MAX_SCHEMAS: usize = 20_000;

/// Most schemas that references lead to. The compiler recurses from one to the next, at up to 20 KiB of stack
/// each.
const MAX_TARGETS: usize = 2_000;

/// Most schemas that are combined with others (`allOf`, references with siblings) in one document: patterns
/// that are combined nest as deep as this.
const MAX_COMBINED: usize = 1_000;

/// Most bytes of all patterns after they were rewritten: a class such as `\p{L}` becomes 5 KiB.
const MAX_PATTERN_BYTES: usize = 4 * 1024 * 1024;

/// Why a schema is not honoured, in the words of its author.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    keyword: String,
    path: String,
    why: String,
}

impl Refusal {
    fn new(keyword: &str, why: String) -> Self {
        Self { keyword: shortened(keyword, 40), path: String::new(), why }
    }

    fn at(mut self, path: &str) -> Self {
        if self.path.is_empty() {
            self.path = if path.is_empty() { "/".to_owned() } else { shortened(path, 80) };
        }
        self
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} at {:?}: {}", self.keyword, self.path, self.why)
    }
}

/// A schema in the compiler's dialect.
#[derive(Debug)]
pub(super) struct Rewritten {
    pub(super) schema: Value,
    /// The caller's own path of each `#/$defs/rN`.
    pub(super) paths: Vec<String>,
}

/// Rewrites a schema. `layout` is the compiler's key for white space and escapes.
pub(super) fn rewrite(document: &Json, layout: &str) -> Result<Rewritten, Refusal> {
    let mut rewriter = Rewriter::new(document);
    let root = rewriter.references.root();
    let mut schema = match rewriter.schema(&Location { path: String::new(), base: root.base }, document)? {
        Value::Bool(true) => json!({}),
        Value::Bool(false) => {
            return Err(Refusal::new("false", "no answer satisfies the schema".to_owned()).at(""));
        }
        schema => schema,
    };
    let mut definitions = Map::new();
    while let Some(Pending { name, location, target }) = rewriter.pending.pop() {
        definitions.insert(name, rewriter.schema(&location, target)?);
    }
    if rewriter.combined > 0 {
        rewriter.numbers.check_combined().map_err(|refusal| refusal.at(""))?;
    }
    alternatives::make_exclusive(&mut schema, &mut definitions);
    weight::check(&schema, &definitions).map_err(|refusal| refusal.at(""))?;
    let paths = rewriter.paths;
    if let Some(members) = schema.as_object_mut() {
        if !definitions.is_empty() {
            members.insert("$defs".to_owned(), Value::Object(definitions));
        }
        let escapes = if rewriter.control_characters { "nrbtf\\\"u" } else { "nrbtf\\\"" };
        let layout = json!({ "whitespace_pattern": layout, "json_allowed_escapes": escapes });
        members.insert("x-guidance".to_owned(), layout);
    }
    Ok(Rewritten { schema, paths })
}

/// Where a schema stands.
#[derive(Clone)]
struct Location {
    path: String,
    base: String,
}

impl Location {
    fn child(&self, keyword: &str, name: &str) -> Self {
        let name = name.replace('~', "~0").replace('/', "~1");
        let slash = if name.is_empty() { "" } else { "/" };
        Self { path: format!("{}/{keyword}{slash}{name}", self.path), base: self.base.clone() }
    }
}

struct Pending<'a> {
    name: String,
    location: Location,
    target: &'a Json,
}

struct Rewriter<'a> {
    references: References<'a>,
    /// Names of the schemas that references lead to, by their address in the document.
    names: HashMap<*const Json, String>,
    pending: Vec<Pending<'a>>,
    paths: Vec<String>,
    numbers: NumberFacts,
    schemas: usize,
    combined: usize,
    pattern_bytes: usize,
    /// Whether a constant or a name holds a character that JSON can only write as `\u00XX`.
    control_characters: bool,
}

impl<'a> Rewriter<'a> {
    fn new(document: &'a Json) -> Self {
        let numbers = NumberFacts::new(names_integer(document));
        Self {
            references: References::new(document),
            names: HashMap::new(),
            pending: Vec::new(),
            paths: Vec::new(),
            numbers,
            schemas: 0,
            combined: 0,
            pattern_bytes: 0,
            control_characters: false,
        }
    }

    fn schema(&mut self, location: &Location, schema: &'a Json) -> Result<Value, Refusal> {
        self.schemas += 1;
        if self.schemas > MAX_SCHEMAS {
            return Err(
                Refusal::new("$schema", format!("there are more than {MAX_SCHEMAS} schemas in it")).at("")
            );
        }
        match schema {
            Json::Bool(value) => Ok(Value::Bool(*value)),
            Json::Object(members) => {
                let base = base_of(schema, &location.base);
                if base != location.base && members.contains("$ref") && !location.path.is_empty() {
                    // Draft 7 ignores it there, later drafts resolve the reference by it.
                    let why =
                        "beside $ref it means different things in different drafts; leave it out".to_owned();
                    return Err(Refusal::new("$id", why).at(&location.path));
                }
                let location = Location { base, ..location.clone() };
                self.members(&location, members)
                    .map(Value::Object)
                    .map_err(|refusal| refusal.at(&location.path))
            }
            _ => {
                let (parent, keyword) = location.path.rsplit_once('/').unwrap_or(("", ""));
                Err(Refusal::new(keyword, "a schema is an object, true or false".to_owned()).at(parent))
            }
        }
    }

    fn members(&mut self, location: &Location, schema: &'a Members) -> Result<Map<String, Value>, Refusal> {
        let mut out = Map::new();
        for (keyword, value) in schema.iter() {
            match keyword {
                "$ref" => {
                    self.combined += usize::from(schema.iter().count() > 1);
                    let name = self.reference(location, value)?;
                    combine(&mut out, "$ref", Value::String(name));
                }
                "allOf" | "anyOf" | "oneOf" => {
                    let list = self.list(location, keyword, value)?;
                    self.combined += if keyword == "allOf" { list.len() } else { 1 };
                    combine(&mut out, keyword, Value::Array(list));
                }
                "const" | "enum" => {
                    let value = self.constants(keyword, value)?;
                    combine(&mut out, keyword, value);
                }
                "type" => {
                    out.insert(keyword.to_owned(), types(value)?);
                }
                "properties" | "patternProperties" => {
                    let map = self.map(location, keyword, value)?;
                    out.insert(keyword.to_owned(), Value::Object(map));
                }
                "additionalProperties" => {
                    let value = self.schema(&location.child(keyword, ""), value)?;
                    out.insert(keyword.to_owned(), value);
                }
                "items" | "prefixItems" | "additionalItems" => {}
                "minItems" | "maxItems" | "minLength" | "maxLength" | "minProperties" | "maxProperties" => {
                    out.insert(keyword.to_owned(), count(keyword, value)?.into());
                }
                "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" | "multipleOf" => {}
                "required" => required(value, &mut out)?,
                "pattern" => {
                    let text = value.as_str().ok_or_else(|| expected(keyword, "a string"))?;
                    let pattern = self.pattern(keyword, text)?;
                    combine(&mut out, keyword, Value::String(pattern));
                }
                "format" => {
                    for (keyword, value) in formats::rewrite(schema, value)? {
                        combine(&mut out, keyword, value);
                    }
                }
                _ => self.limited(location, keyword, schema, &mut out)?,
            }
            if self.combined > MAX_COMBINED {
                let why = format!("more than {MAX_COMBINED} schemas are combined with each other");
                return Err(Refusal::new(keyword, why));
            }
        }
        self.items(location, schema, &mut out)?;
        numbers::bounds(schema, &mut out, &mut self.numbers)?;
        dependent_required(schema, &mut out)?;
        check_names(&out)?;
        check_size(&out)?;
        Ok(grouped(out))
    }

    fn list(&mut self, location: &Location, keyword: &str, value: &'a Json) -> Result<Vec<Value>, Refusal> {
        let list = value.as_array().filter(|list| !list.is_empty());
        let list = list.ok_or_else(|| expected(keyword, "a list of at least one schema"))?;
        let item = |(index, item): (usize, &'a Json)| {
            self.schema(&location.child(keyword, &index.to_string()), item)
        };
        list.iter().enumerate().map(item).collect()
    }

    fn map(
        &mut self,
        location: &Location,
        keyword: &str,
        value: &'a Json,
    ) -> Result<Map<String, Value>, Refusal> {
        let members = value.as_object().ok_or_else(|| expected(keyword, "an object of schemas"))?;
        let mut out = Map::new();
        for (name, value) in members.iter() {
            let schema = self.schema(&location.child(keyword, name), value)?;
            let name =
                if keyword == "patternProperties" { self.pattern(keyword, name)? } else { name.to_owned() };
            self.control_characters |= has_control(&name);
            if out.insert(name, schema).is_some() {
                return Err(Refusal::new(keyword, "two of its patterns are the same".to_owned()));
            }
        }
        Ok(out)
    }

    fn pattern(&mut self, keyword: &str, text: &str) -> Result<String, Refusal> {
        let refused = |why: String| Refusal::new(keyword, format!("{:?}: {why}", shortened(text, 60)));
        let pattern = pattern::search(text).map_err(refused)?;
        self.pattern_bytes += pattern.len();
        let escapes = ["\\0", "\\c", "\\u00", "\\v", "\\x"];
        self.control_characters |= has_control(text) || escapes.iter().any(|escape| text.contains(escape));
        if self.pattern_bytes > MAX_PATTERN_BYTES {
            return Err(refused("the patterns of the schema are too large together".to_owned()));
        }
        Ok(pattern)
    }

    /// The name, in the result, of the schema that a reference leads to.
    fn reference(&mut self, location: &Location, value: &Json) -> Result<String, Refusal> {
        let reference = value.as_str().ok_or_else(|| expected("$ref", "a string"))?;
        let Some(Target { schema, base }) = self.references.resolve(reference, &location.base) else {
            let why = format!(
                "{:?} leads to no schema of this document, and no other document is fetched",
                shortened(reference, 60)
            );
            return Err(Refusal::new("$ref", why));
        };
        if let Some(name) = self.names.get(&std::ptr::from_ref(schema)) {
            return Ok(format!("#/$defs/{name}"));
        }
        if self.paths.len() >= MAX_TARGETS {
            return Err(Refusal::new("$ref", format!("references lead to more than {MAX_TARGETS} schemas")));
        }
        let name = format!("r{}", self.paths.len());
        self.names.insert(std::ptr::from_ref(schema), name.clone());
        self.paths.push(shortened(reference, 60));
        let location = Location { path: shortened(reference.trim_start_matches('#'), 200), base };
        self.pending.push(Pending { name: name.clone(), location, target: schema });
        Ok(format!("#/$defs/{name}"))
    }

    fn constants(&mut self, keyword: &str, value: &Json) -> Result<Value, Refusal> {
        if keyword == "enum" && value.as_array().is_none_or(<[Json]>::is_empty) {
            return Err(expected(keyword, "a list of at least one value"));
        }
        self.constant(keyword, value)
    }

    fn constant(&mut self, keyword: &str, value: &Json) -> Result<Value, Refusal> {
        Ok(match value {
            Json::Null => Value::Null,
            Json::Bool(value) => Value::Bool(*value),
            Json::Number(number) => Value::Number(numbers::constant(keyword, number, &self.numbers)?),
            Json::String(text) => {
                self.control_characters |= has_control(text);
                Value::String(text.clone())
            }
            Json::Array(list) => {
                let list: Result<_, _> = list.iter().map(|value| self.constant(keyword, value)).collect();
                Value::Array(list?)
            }
            Json::Object(members) => {
                let mut out = Map::new();
                for (name, value) in members.iter() {
                    self.control_characters |= has_control(name);
                    out.insert(name.to_owned(), self.constant(keyword, value)?);
                }
                Value::Object(out)
            }
        })
    }

    /// The items of a list in the words of the latest draft, whichever was used.
    fn items(
        &mut self,
        location: &Location,
        schema: &'a Members,
        out: &mut Map<String, Value>,
    ) -> Result<(), Refusal> {
        let (first, rest) = match schema.get("items") {
            Some(Json::Array(_)) => ("items", "additionalItems"),
            _ => ("prefixItems", "items"),
        };
        if let Some(value) = schema.get(first) {
            let list = value.as_array().ok_or_else(|| expected(first, "a list of schemas"))?;
            let list = if list.is_empty() { Vec::new() } else { self.list(location, first, value)? };
            out.insert("prefixItems".to_owned(), Value::Array(list));
        }
        if let Some(value) = schema.get(rest) {
            let value = self.schema(&location.child(rest, ""), value)?;
            out.insert("items".to_owned(), value);
        }
        Ok(())
    }

    /// Keywords that are honoured only where they change nothing, and all that are no constraints.
    fn limited(
        &mut self,
        location: &Location,
        keyword: &str,
        schema: &'a Members,
        out: &mut Map<String, Value>,
    ) -> Result<(), Refusal> {
        let value = schema.get(keyword);
        let is = |wanted: bool| value == Some(&Json::Bool(wanted));
        let is_empty = value.and_then(Json::as_object).is_some_and(Members::is_empty);
        let changes_nothing = match keyword {
            "uniqueItems" => is(false) || (is(true) && at_most_one_item(schema)),
            "contains" => is_zero(schema.get("minContains")) && !schema.contains("maxContains"),
            "minContains" | "maxContains" => true,
            "not" => is(false),
            "if" => !schema.contains("then") && !schema.contains("else"),
            "then" | "else" => true,
            "dependencies" | "dependentSchemas" => is_empty,
            "propertyNames" => {
                is(true) || is_empty || value.and_then(Json::as_object).is_some_and(only_strings)
            }
            "unevaluatedItems" | "unevaluatedProperties" => {
                return self.unevaluated(location, keyword, schema, out);
            }
            "dependentRequired" => true,
            keyword if keywords::REFUSED.contains(&keyword) => false,
            keyword => match keywords::misspelt(keyword) {
                Some(meant) => {
                    let why = format!("there is no such keyword; did you mean {meant:?}?");
                    return Err(Refusal::new(keyword, why));
                }
                None => true,
            },
        };
        if changes_nothing {
            return Ok(());
        }
        let why = if keyword == "x-guidance" {
            "it sets the compiler, which callers cannot; leave it out"
        } else {
            "it is not supported; leave it out, and check the answer for it yourself"
        };
        Err(Refusal::new(keyword, why.to_owned()))
    }

    /// Without applicators beside it, the keyword means the same as the plain one.
    fn unevaluated(
        &mut self,
        location: &Location,
        keyword: &str,
        schema: &'a Members,
        out: &mut Map<String, Value>,
    ) -> Result<(), Refusal> {
        let plain = if keyword == "unevaluatedItems" { "items" } else { "additionalProperties" };
        let Some(value) = schema.get(keyword) else { return Ok(()) };
        if *value == Json::Bool(true) || schema.contains(plain) {
            return Ok(());
        }
        const OTHERS: &[&str] =
            &["$ref", "allOf", "anyOf", "oneOf", "if", "not", "dependentSchemas", "contains"];
        if OTHERS.iter().any(|other| schema.contains(other)) {
            let why = format!("it is not supported beside other schemas; use {plain:?}");
            return Err(Refusal::new(keyword, why));
        }
        let value = self.schema(&location.child(keyword, ""), value)?;
        out.insert(plain.to_owned(), value);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
