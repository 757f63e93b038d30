//! The functions of a request, and the types of their parameters.

use std::collections::HashSet;

use serde_json::Value;
use serde_json::value::RawValue;

use super::check::name_of;

/// Schemas that are looked at for the types of one parameter, at some 100 ns each: a millisecond. A parameter
/// with more may have any type, as one without a schema.
const MAX_SCHEMAS: usize = 10_000;

/// The functions that an answer may call.
#[derive(Debug, Default)]
pub(super) struct ToolFunctions {
    all: Vec<ToolFunction>,
}

/// One function.
#[derive(Debug)]
pub(super) struct ToolFunction {
    name: String,
    parameters: Value,
}

/// The types that a schema allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct SchemaTypes {
    pub(super) string: bool,
    pub(super) number: bool,
    pub(super) boolean: bool,
    pub(super) null: bool,
    pub(super) object: bool,
    pub(super) array: bool,
}

impl ToolFunctions {
    /// From tools in OpenAI's shape.
    pub(super) fn new(tools: &[Value]) -> Self {
        let function = |tool: &Value| {
            let parameters = tool["function"]["parameters"].clone();
            Some(ToolFunction { name: name_of(tool)?.to_owned(), parameters })
        };
        Self { all: tools.iter().filter_map(function).collect() }
    }

    /// The function of a name.
    pub(super) fn get(&self, name: &str) -> Option<&ToolFunction> {
        self.all.iter().find(|function| function.name == name)
    }

    /// Whether the name of a function begins like this.
    pub(super) fn may_begin(&self, beginning: &str) -> bool {
        self.all.iter().any(|function| function.name.starts_with(beginning))
    }

    /// Whether a function has this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }
}

impl ToolFunction {
    /// A parameter's value as JSON text, from the text that the model wrote without JSON's marks. What fits
    /// no other type of the parameter is a string, as is every value of a parameter without a type.
    pub(super) fn typed(&self, parameter: &str, text: &str) -> String {
        let schema = self.parameters.get("properties").and_then(|all| all.get(parameter));
        let types = schema.map(|schema| SchemaTypes::of(schema, &self.parameters)).unwrap_or_default();
        types.convert(text).unwrap_or_else(|| Value::from(text).to_string())
    }
}

impl SchemaTypes {
    /// The types that a schema within `root` allows; none where it names none. Each reference is followed
    /// once, wherever it stands, so that schemas which refer to each other take no longer than their text.
    pub(super) fn of(schema: &Value, root: &Value) -> Self {
        let mut types = Self::default();
        let mut followed = HashSet::new();
        let mut waiting = vec![schema];
        let mut looked_at = 0;
        while let Some(schema) = waiting.pop() {
            looked_at += 1;
            if looked_at > MAX_SCHEMAS {
                return Self::default();
            }
            types.add(schema);
            for keyword in ["anyOf", "oneOf", "allOf"] {
                waiting.extend(schema.get(keyword).and_then(Value::as_array).into_iter().flatten());
            }
            let target = schema.get("$ref").and_then(Value::as_str).and_then(|text| text.strip_prefix('#'));
            if let Some(pointer) = target.filter(|pointer| followed.insert(*pointer)) {
                waiting.extend(root.pointer(pointer));
            }
        }
        types
    }

    /// The types that a schema names itself.
    fn add(&mut self, schema: &Value) {
        match schema.get("type") {
            Some(Value::String(name)) => self.add_name(name),
            Some(Value::Array(names)) => {
                names.iter().filter_map(Value::as_str).for_each(|name| self.add_name(name));
            }
            _ => {
                let listed = schema.get("enum").and_then(Value::as_array).into_iter().flatten();
                listed.chain(schema.get("const")).for_each(|value| self.add_value(value));
            }
        }
    }

    /// The words of JSON Schema, and those of Python that callers write in their place.
    fn add_name(&mut self, name: &str) {
        match name {
            "string" | "str" => self.string = true,
            "integer" | "number" | "int" | "float" => self.number = true,
            "boolean" | "bool" => self.boolean = true,
            "null" => self.null = true,
            "object" | "dict" => self.object = true,
            "array" | "list" => self.array = true,
            _ => {}
        }
    }

    fn add_value(&mut self, value: &Value) {
        match value {
            Value::String(_) => self.string = true,
            Value::Number(_) => self.number = true,
            Value::Bool(_) => self.boolean = true,
            Value::Null => self.null = true,
            Value::Object(_) => self.object = true,
            Value::Array(_) => self.array = true,
        }
    }

    /// JSON text of a value in one of these types other than string.
    fn convert(self, text: &str) -> Option<String> {
        let text = text.trim();
        if self.null && matches!(text, "null" | "None") {
            return Some("null".to_owned());
        }
        if self.boolean && (text.eq_ignore_ascii_case("true") || text.eq_ignore_ascii_case("false")) {
            return Some(text.to_ascii_lowercase());
        }
        let fits = match text.chars().next()? {
            '{' => self.object,
            '[' => self.array,
            '-' | '0'..='9' => self.number,
            _ => false,
        };
        (fits && serde_json::from_str::<&RawValue>(text).is_ok()).then(|| text.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn typed(schema: &Value, text: &str) -> String {
        let definitions = json!({"n": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}});
        let parameters = json!({"properties": {"k": schema}, "$defs": definitions});
        let tools = [json!({"type": "function", "function": {"name": "f", "parameters": parameters}})];
        ToolFunctions::new(&tools).get("f").unwrap().typed("k", text)
    }

    #[test]
    fn values_take_the_type_of_their_schema() {
        for (schema, text, expected) in [
            (json!({"type": "string"}), "42", "\"42\""),
            (json!({"type": "string"}), "a \"b\"\n", "\"a \\\"b\\\"\\n\""),
            (json!({"type": "integer"}), " 42\n", "42"),
            (json!({"type": "number"}), "-1.5e3", "-1.5e3"),
            (json!({"type": "integer"}), "many", "\"many\""),
            (json!({"type": "boolean"}), "True", "true"),
            (json!({"type": ["string", "null"]}), "null", "null"),
            (json!({"type": "string"}), "null", "\"null\""),
            (json!({"anyOf": [{"type": "integer"}, {"type": "null"}]}), "7", "7"),
            (json!({"anyOf": [{"type": "string"}, {"type": "integer"}]}), "7", "7"),
            (json!({"type": "object"}), "{\"a\": [1]}", "{\"a\": [1]}"),
            (json!({"type": "array"}), "[1,", "\"[1,\""),
            (json!({"enum": ["1", "2"]}), "1", "\"1\""),
            (json!({"enum": [1, 2]}), "1", "1"),
            (json!({"$ref": "#/$defs/n"}), "3", "3"),
            (json!({"$ref": "#/$defs/loop"}), "3", "\"3\""),
            (json!({}), "3", "\"3\""),
        ] {
            assert_eq!(typed(&schema, text), expected, "{schema} {text}");
        }
    }

    #[test]
    fn schemas_that_refer_to_each_other_take_no_longer_than_their_text() {
        // Each of 200 definitions refers 20 times to itself and to the next: a walk of all paths never ends.
        let mut definitions = serde_json::Map::new();
        for index in 0..200 {
            let mut choices = vec![json!({"$ref": format!("#/$defs/d{index}")}); 20];
            choices.push(json!({"$ref": format!("#/$defs/d{}", index + 1)}));
            definitions.insert(format!("d{index}"), json!({"anyOf": choices}));
        }
        definitions.insert("d200".to_owned(), json!({"type": "integer"}));
        let root = json!({"$defs": definitions});
        let types = SchemaTypes::of(&json!({"$ref": "#/$defs/d0"}), &root);
        assert_eq!(types, SchemaTypes { number: true, ..SchemaTypes::default() });
    }

    #[test]
    fn a_schema_with_too_many_parts_may_have_any_type() {
        let choices = vec![json!({"type": "integer"}); MAX_SCHEMAS + 1];
        assert_eq!(SchemaTypes::of(&json!({"anyOf": choices}), &Value::Null), SchemaTypes::default());
    }

    #[test]
    fn a_parameter_without_a_schema_is_a_string() {
        let tools = [json!({"type": "function", "function": {"name": "f", "parameters": {}}})];
        assert_eq!(ToolFunctions::new(&tools).get("f").unwrap().typed("other", "1"), "\"1\"");
    }
}
