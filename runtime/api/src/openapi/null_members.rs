//! Null is the same as leaving a member out, wherever the document says that a member of a request may be
//! left out: clients that build requests from classes write every member.

use axum::http::Request;
use serde_json::{Map, Value, json};

use super::operation;
use crate::fake::{Fake, Script};
use crate::surfaces::SURFACES;
use crate::test_client::{self, Reply};

/// Objects within objects that are followed.
const MAX_DEPTH: usize = 8;

/// A body in two forms that must be answered alike.
struct Pair {
    with_nulls: Value,
    without: Value,
    /// The members that are null.
    members: String,
}

/// A schema of the document.
#[derive(Clone, Copy)]
struct Node<'a> {
    document: &'a Value,
    schema: &'a Value,
    depth: usize,
}

impl<'a> Node<'a> {
    fn below(&self, schema: &'a Value) -> Self {
        let at = schema.get("$ref").and_then(Value::as_str);
        let schema = at.map_or(schema, |at| self.document.pointer(&at[1..]).unwrap());
        Self { document: self.document, schema, depth: self.depth + 1 }
    }

    fn is(&self, kind: &str) -> bool {
        match &self.schema["type"] {
            Value::String(word) => word == kind,
            Value::Array(words) => words.iter().any(|word| word == kind),
            _ => false,
        }
    }

    fn alternatives(&self) -> impl Iterator<Item = Self> {
        let list = ["anyOf", "oneOf"].into_iter().filter_map(move |key| self.schema.get(key)?.as_array());
        list.flatten().map(move |schema| self.below(schema))
    }

    fn properties(&self) -> impl Iterator<Item = (&'a str, Self)> {
        let members = self.schema.get("properties").and_then(Value::as_object).into_iter().flatten();
        members.map(move |(name, schema)| (name.as_str(), self.below(schema)))
    }

    fn requires(&self, name: &str) -> bool {
        self.schema["required"].as_array().is_some_and(|names| names.iter().any(|other| other == name))
    }

    fn takes_null(&self) -> bool {
        self.is("null") || self.alternatives().any(|one| one.takes_null())
    }

    /// A small value that the schema describes.
    fn example(&self) -> Value {
        if let Some(value) = self.schema.get("const").or_else(|| self.schema.get("enum")?.get(0)) {
            return value.clone();
        }
        if let Some(first) = self.alternatives().next() {
            return first.example();
        }
        if self.is("object") {
            self.object()
        } else if self.is("array") {
            Value::Array(self.items().map(|items| items.example()).into_iter().collect())
        } else if self.is("integer") || self.is("number") {
            self.schema.get("minimum").cloned().unwrap_or_else(|| json!(1))
        } else if self.is("boolean") {
            json!(false)
        } else {
            json!("a")
        }
    }

    fn items(&self) -> Option<Self> {
        self.schema.get("items").map(|items| self.below(items))
    }

    /// The members that must be given.
    fn object(&self) -> Value {
        let required = self.properties().filter(|(name, _)| self.requires(name));
        required.map(|(name, schema)| (name.to_owned(), schema.example())).collect::<Map<_, _>>().into()
    }

    /// For each object below, a value in which all members of that object which may be left out are null, and
    /// the same value without them.
    fn pairs(&self) -> Vec<Pair> {
        if self.depth > MAX_DEPTH {
            return Vec::new();
        }
        let mut pairs: Vec<Pair> = self.alternatives().flat_map(|one| one.pairs()).collect();
        if let Some(items) = self.items() {
            pairs.extend(items.pairs().into_iter().map(|pair| pair.map(|value| json!([value]))));
        }
        let optional = self.properties().filter(|(name, _)| !self.requires(name));
        let optional: Vec<&str> =
            optional.filter(|(_, schema)| schema.takes_null()).map(|(name, _)| name).collect();
        if !optional.is_empty() {
            let without = self.object();
            let mut with_nulls = without.clone();
            let nulls = optional.iter().map(|name| ((*name).to_owned(), Value::Null));
            with_nulls.as_object_mut().unwrap().extend(nulls);
            pairs.push(Pair { with_nulls, without, members: optional.join(", ") });
        }
        for (name, schema) in self.properties() {
            let around = |value: Value| {
                let mut object = self.object();
                object[name] = value;
                object
            };
            pairs.extend(schema.pairs().into_iter().map(|pair| pair.map(around)));
        }
        pairs
    }
}

impl Pair {
    fn map(self, around: impl Fn(Value) -> Value) -> Self {
        Self { with_nulls: around(self.with_nulls), without: around(self.without), ..self }
    }
}

/// What a caller sees of an answer that two equal requests have in common.
fn essence(reply: &Reply) -> Value {
    let mut body: Value = serde_json::from_str(&reply.text).unwrap_or_default();
    let message = body.pointer("/error/message").cloned().or_else(|| body.get("error").cloned());
    let settings =
        ["instructions", "tools", "text", "reasoning"].map(|key| body.get_mut(key).map(Value::take));
    json!({"status": reply.status.as_u16(), "message": message, "settings": settings})
}

#[tokio::test]
async fn null_members_of_requests_are_left_out() {
    let document = super::document();
    let (mut accepted, mut compared) = (0, 0);
    for surface in SURFACES.iter().filter(|surface| !surface.is_alias()) {
        let (Some(path), Some(method)) = (surface.http_path(), operation::method(surface)) else { continue };
        let body = &document["paths"][path][method]["requestBody"]["content"][operation::JSON]["schema"];
        if body.is_null() {
            continue;
        }
        let node = Node { document: &document, schema: &Value::Null, depth: 0 }.below(body);
        let path = path.replace("{model}", "fake").replace("{version}", "r1");
        for Pair { with_nulls, without, members } in node.pairs() {
            let fake = Fake::with(Script::tokens(&["a"]));
            let ask = async |body: &Value| {
                essence(&test_client::send(&fake, Request::post(path.as_str()), body.to_string()).await)
            };
            let (wanted, found) = (ask(&without).await, ask(&with_nulls).await);
            assert_eq!(found, wanted, "{path}: null for {members} in {with_nulls}");
            compared += 1;
            accepted += usize::from(wanted["status"] == 200);
        }
    }
    assert!(compared > 50 && accepted > 30, "{compared} bodies, {accepted} of them good");
}
