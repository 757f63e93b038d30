//! Building blocks of JSON schemas (draft 2020-12, as OpenAPI 3.1 has it).

use serde_json::{Map, Value, json};

/// A whole number of 32 bits, such as a token id.
pub(super) const MAX_U32: u64 = u32::MAX as u64;

/// A value of a JSON type, with what it is.
fn typed(kind: &str, description: &str) -> Value {
    json!({"type": kind, "description": description})
}

/// A text.
pub(super) fn text(description: &str) -> Value {
    typed("string", description)
}

/// A text whose length in characters is within bounds, both included.
pub(super) fn text_within(least: usize, most: usize) -> Value {
    json!({"type": "string", "minLength": least, "maxLength": most})
}

/// A sha256 in hexadecimal digits.
pub(super) fn sha256() -> Value {
    json!({"type": "string", "pattern": "^[0-9a-f]{64}$"})
}

/// True or false.
pub(super) fn flag(description: &str) -> Value {
    typed("boolean", description)
}

/// A number without bounds.
pub(super) fn number(description: &str) -> Value {
    typed("number", description)
}

/// A number within bounds, both included.
pub(super) fn number_within(least: f64, most: f64, description: &str) -> Value {
    json!({"type": "number", "minimum": least, "maximum": most, "description": description})
}

/// A number above 0 and at most `most`.
pub(super) fn number_above_0(most: f64, description: &str) -> Value {
    json!({"type": "number", "exclusiveMinimum": 0, "maximum": most, "description": description})
}

/// A whole number within bounds, both included.
pub(super) fn whole(least: u64, most: u64, description: &str) -> Value {
    json!({"type": "integer", "minimum": least, "maximum": most, "description": description})
}

/// A whole number that is not negative, of an answer.
pub(super) fn count(description: &str) -> Value {
    json!({"type": "integer", "minimum": 0, "description": description})
}

/// One of these words.
pub(super) fn word(words: &[&str], description: &str) -> Value {
    json!({"type": "string", "enum": words, "description": description})
}

/// This word.
pub(super) fn constant(word: &str) -> Value {
    json!({"type": "string", "const": word})
}

/// A list of values of one schema.
pub(super) fn list(items: Value) -> Value {
    let mut schema = json!({"type": "array"});
    schema["items"] = items;
    schema
}

/// A list with bounds of its length, both included.
pub(super) fn list_of(least: usize, most: usize, items: Value) -> Value {
    let mut schema = list(items);
    schema["minItems"] = json!(least);
    schema["maxItems"] = json!(most);
    schema
}

/// A list of at least one value.
pub(super) fn list_not_empty(items: Value) -> Value {
    let mut schema = list(items);
    schema["minItems"] = json!(1);
    schema
}

/// Any of these.
pub(super) fn any_of(schemas: impl IntoIterator<Item = Value>) -> Value {
    json!({"anyOf": schemas.into_iter().collect::<Vec<_>>()})
}

/// The same with a description.
pub(super) fn described(mut schema: Value, description: &str) -> Value {
    schema["description"] = json!(description);
    schema
}

/// An object of any members.
pub(super) fn any_object(description: &str) -> Value {
    typed("object", description)
}

/// A schema of `components/schemas`.
pub(super) fn reference(name: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{name}")})
}

/// The same or null, which in a request is the same as leaving it out.
pub(super) fn nullable(mut schema: Value) -> Value {
    match schema.get("type").and_then(Value::as_str).map(str::to_owned) {
        Some(kind) if schema.get("const").is_none() => {
            schema["type"] = json!([kind, "null"]);
            if let Some(words) = schema.get_mut("enum").and_then(Value::as_array_mut) {
                words.push(Value::Null);
            }
            schema
        }
        _ => any_of([schema, json!({"type": "null"})]),
    }
}

/// An object with named members.
pub(super) struct ObjectSchema {
    properties: Map<String, Value>,
    required: Vec<&'static str>,
    open: bool,
}

/// An object that has no members but those that follow.
pub(super) fn object() -> ObjectSchema {
    ObjectSchema { properties: Map::new(), required: Vec::new(), open: false }
}

/// An object that may have further members: of an answer, to which fields may be added.
pub(super) fn open_object() -> ObjectSchema {
    ObjectSchema { open: true, ..object() }
}

impl ObjectSchema {
    /// A member that is always there.
    pub(super) fn required(mut self, name: &'static str, schema: Value) -> Self {
        self.required.push(name);
        self.properties.insert(name.to_owned(), schema);
        self
    }

    /// A member of a request that may be left out or null.
    pub(super) fn optional(mut self, name: &'static str, schema: Value) -> Self {
        self.properties.insert(name.to_owned(), nullable(schema));
        self
    }

    /// A member of an answer that is there where it has a value.
    pub(super) fn sometimes(mut self, name: &'static str, schema: Value) -> Self {
        self.properties.insert(name.to_owned(), schema);
        self
    }

    /// The schema.
    pub(super) fn build(self) -> Value {
        let mut schema = json!({"type": "object", "properties": self.properties});
        if !self.required.is_empty() {
            schema["required"] = json!(self.required);
        }
        if !self.open {
            schema["additionalProperties"] = json!(false);
        }
        schema
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nullable_schema_takes_null_whatever_form_it_has() {
        assert_eq!(nullable(flag("f")), json!({"type": ["boolean", "null"], "description": "f"}));
        assert_eq!(nullable(word(&["a"], "w"))["enum"], json!(["a", null]));
        assert_eq!(nullable(constant("a"))["anyOf"][1], json!({"type": "null"}));
        assert_eq!(nullable(reference("A"))["anyOf"][0], json!({"$ref": "#/components/schemas/A"}));
    }

    #[test]
    fn an_object_of_a_request_is_closed_and_one_of_an_answer_is_not() {
        let closed = object().required("a", text("a")).optional("b", flag("b")).build();
        assert_eq!((&closed["required"], &closed["additionalProperties"]), (&json!(["a"]), &json!(false)));
        let open = open_object().sometimes("a", text("a")).build();
        assert!(open.get("required").is_none() && open.get("additionalProperties").is_none());
    }
}
