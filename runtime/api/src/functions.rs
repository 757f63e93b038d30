//! Functions that a model may call, for the protocols whose definitions are flat: a name, a description and a
//! schema beside each other. Chat templates read them nested, as OpenAI's chat has them.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use crate::echo::echo;
use crate::error::ApiError;
use crate::json_body::found;
use crate::json_object::ObjectAt;
use crate::tools::MAX_TOOLS;

/// Longest name of a function in bytes: Anthropic's limit, which is above OpenAI's.
const MAX_NAME_BYTES: usize = 128;

/// Functions of one request, in order: at most [`MAX_TOOLS`], as in chat.
#[derive(Debug, Default)]
pub(crate) struct FunctionList {
    tools: Vec<Value>,
    names: HashSet<String>,
}

impl FunctionList {
    /// Adds the function that an object defines by `name`, `description` and, under `schema_key`, the JSON
    /// schema of its arguments.
    ///
    /// # Errors
    /// A missing or malformed name, the name of another function, a schema that is no object, or one function
    /// too many.
    pub(crate) fn add(&mut self, tool: &ObjectAt<'_>, schema_key: &str) -> Result<(), ApiError> {
        if self.tools.len() == MAX_TOOLS {
            return Err(ApiError::field(
                "tools",
                format!("has more than {MAX_TOOLS} functions; offer fewer"),
            ));
        }
        let name = tool.required_text("name")?;
        let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'-';
        if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(is_word) {
            let why =
                format!("expected 1 to {MAX_NAME_BYTES} of a-z, A-Z, 0-9, _ and -, found {:?}", echo(name));
            return Err(tool.error("name", why));
        }
        if !self.names.insert(name.to_owned()) {
            return Err(
                tool.error("name", format!("{name:?} is the name of two functions; give each its own"))
            );
        }
        let mut function = Map::from_iter([("name".to_owned(), json!(name))]);
        if let Some(description) = tool.text("description")? {
            function.insert("description".to_owned(), json!(description));
        }
        function.insert("parameters".to_owned(), schema(tool, schema_key)?.unwrap_or_else(|| json!({})));
        self.tools.push(json!({"type": "function", "function": function}));
        Ok(())
    }

    /// Whether a function has this name.
    pub(crate) fn defines(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// The functions as chat templates read them.
    pub(crate) fn tools(&self) -> &[Value] {
        &self.tools
    }

    /// The same, without copies.
    pub(crate) fn into_tools(self) -> Vec<Value> {
        self.tools
    }

    /// The functions with these names only.
    pub(crate) fn retain(&mut self, names: &HashSet<&str>) {
        let is_named =
            |tool: &Value| tool["function"]["name"].as_str().is_some_and(|name| names.contains(name));
        self.tools.retain(is_named);
        self.names.retain(|name| names.contains(name.as_str()));
    }
}

fn schema(tool: &ObjectAt<'_>, key: &str) -> Result<Option<Value>, ApiError> {
    match tool.get(key) {
        None => Ok(None),
        Some(schema @ Value::Object(_)) => Ok(Some(schema.clone())),
        Some(other) => {
            let why = format!("expected the JSON schema of an object, found {}", found(other));
            Err(tool.error(key, why))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add(list: &mut FunctionList, tool: &Value) -> Result<(), ApiError> {
        list.add(&ObjectAt::new(tool, "tools[0]").unwrap(), "parameters")
    }

    #[test]
    fn definitions_become_what_templates_read() {
        let mut list = FunctionList::default();
        add(&mut list, &json!({"name": "a", "description": "d", "parameters": {"type": "object"}})).unwrap();
        add(&mut list, &json!({"name": "b-2", "description": null})).unwrap();
        assert!(list.defines("b-2") && !list.defines("c"));
        list.retain(&HashSet::from(["a"]));
        assert!(!list.defines("b-2"));
        let function = json!({"name": "a", "description": "d", "parameters": {"type": "object"}});
        assert_eq!(list.into_tools(), [json!({"type": "function", "function": function})]);
    }

    #[test]
    fn one_function_too_many_is_refused() {
        let mut list = FunctionList::default();
        (0..MAX_TOOLS).for_each(|number| add(&mut list, &json!({"name": format!("f{number}")})).unwrap());
        let error = add(&mut list, &json!({"name": "more"})).unwrap_err().to_string();
        assert_eq!(error, "tools: has more than 128 functions; offer fewer");
    }

    #[test]
    fn wrong_definitions_are_refused_by_field() {
        let mut list = FunctionList::default();
        add(&mut list, &json!({"name": "a"})).unwrap();
        for (tool, text) in [
            (json!({}), "tools[0].name: is missing"),
            (json!({"name": "a"}), "tools[0].name: \"a\" is the name of two functions"),
            (json!({"name": ""}), "tools[0].name: expected 1 to 128"),
            (json!({"name": "get weather"}), "tools[0].name: expected 1 to 128"),
            (json!({"name": "x".repeat(129)}), "tools[0].name: expected 1 to 128"),
            (json!({"name": "b", "description": 1}), "tools[0].description: expected a string"),
            (json!({"name": "c", "parameters": []}), "tools[0].parameters: expected the JSON schema"),
        ] {
            let error = add(&mut list, &tool).unwrap_err().to_string();
            assert!(error.starts_with(text), "{error}");
        }
    }
}
