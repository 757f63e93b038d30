//! The fields `tools` and `tool_choice` of a request, in OpenAI's shape.

use serde_json::{Map, Value, json};

use crate::conversation::ToolChoice;
use crate::echo::echo;
use crate::error::ApiError;
use crate::json_body::found;

/// Most functions of one request, as at OpenAI. The parser compares a name with each of them, and a grammar
/// of 128 functions at 4 definitions each is a quarter of what the engine compiles.
pub const MAX_TOOLS: usize = 128;

/// Longest name of a function in characters, as at OpenAI.
pub const MAX_NAME_CHARS: usize = 64;

/// Checks a list of tools and gives each as `{"type": "function", "function": {"name", "description"?,
/// "parameters"}}`. Missing parameters become `{}`. `strict` is accepted and left out: the arguments of a
/// call that is required always follow their schema.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the item and its field.
pub fn check_tools(tools: &Value) -> Result<Vec<Value>, ApiError> {
    let list = match tools {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) => list,
        other => {
            let why = format!("expected a list of functions, found {}", found(other));
            return Err(ApiError::field("tools", why));
        }
    };
    if list.len() > MAX_TOOLS {
        let why = format!("{} functions are given; at most {MAX_TOOLS} are taken", list.len());
        return Err(ApiError::field("tools", why));
    }
    let mut checked: Vec<Value> = Vec::with_capacity(list.len());
    for (index, tool) in list.iter().enumerate() {
        let tool = check_tool(index, tool)?;
        let name = name_of(&tool);
        if checked.iter().any(|other| name_of(other) == name) {
            let why =
                format!("{:?} is the name of two functions; give each its own", name.unwrap_or_default());
            return Err(ApiError::field(&format!("tools[{index}].function.name"), why));
        }
        checked.push(tool);
    }
    Ok(checked)
}

fn check_tool(index: usize, tool: &Value) -> Result<Value, ApiError> {
    let field = |name: &str| format!("tools[{index}]{name}");
    let Value::Object(members) = tool else {
        let why = format!("expected {{\"type\": \"function\", \"function\": {{…}}}}, found {}", found(tool));
        return Err(ApiError::field(&field(""), why));
    };
    match members.get("type") {
        Some(Value::String(kind)) if kind == "function" => {}
        None => return Err(ApiError::field(&field(".type"), "is missing; write \"function\"")),
        Some(other) => {
            let why = format!("only \"function\" is supported, found {}", found(other));
            return Err(ApiError::field(&field(".type"), why));
        }
    }
    refuse_others(&field(""), members, &["type", "function"])?;
    let Some(Value::Object(function)) = members.get("function") else {
        let why = "an object with \"name\" and \"parameters\" is expected";
        return Err(ApiError::field(&field(".function"), why));
    };
    refuse_others(&field(".function"), function, &["name", "description", "parameters", "strict"])?;
    let name = check_name(&field(".function.name"), function.get("name"))?;
    let mut out = Map::new();
    out.insert("name".to_owned(), json!(name));
    match function.get("description") {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) => {
            out.insert("description".to_owned(), json!(text));
        }
        Some(other) => {
            let why = format!("expected a string, found {}", found(other));
            return Err(ApiError::field(&field(".function.description"), why));
        }
    }
    let parameters = match function.get("parameters") {
        None | Some(Value::Null) => json!({}),
        Some(object @ Value::Object(_)) => object.clone(),
        Some(other) => {
            let why = format!("expected a JSON schema of an object, found {}", found(other));
            return Err(ApiError::field(&field(".function.parameters"), why));
        }
    };
    out.insert("parameters".to_owned(), parameters);
    if let Some(other) = function.get("strict").filter(|value| !value.is_boolean() && !value.is_null()) {
        let why = format!("expected true or false, found {}", found(other));
        return Err(ApiError::field(&field(".function.strict"), why));
    }
    Ok(json!({"type": "function", "function": out}))
}

fn refuse_others(at: &str, members: &Map<String, Value>, known: &[&str]) -> Result<(), ApiError> {
    match members.keys().find(|key| !known.contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => {
            let why = format!("there is no such field; known are {}", known.join(", "));
            Err(ApiError::field(&format!("{at}.{}", echo(key)), why))
        }
    }
}

fn check_name<'a>(field: &str, name: Option<&'a Value>) -> Result<&'a str, ApiError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    match name {
        Some(Value::String(name))
            if !name.is_empty() && name.len() <= MAX_NAME_CHARS && name.chars().all(allowed) =>
        {
            Ok(name)
        }
        Some(other) => {
            let why =
                format!("expected 1 to {MAX_NAME_CHARS} of a-z, A-Z, 0-9, _ and -, found {}", found(other));
            Err(ApiError::field(field, why))
        }
        None => Err(ApiError::field(field, "is missing; name the function")),
    }
}

/// The name of a tool in OpenAI's shape.
pub(crate) fn name_of(tool: &Value) -> Option<&str> {
    tool.get("function")?.get("name")?.as_str()
}

/// Checks a choice against tools that [`check_tools`] gave. Left out or null it is `auto`.
///
/// # Errors
/// [`ApiError::InvalidRequest`] for `tool_choice`: a word that is none of the three, a function that is not
/// among the tools, or a call that is required without tools.
pub fn check_choice(choice: Option<&Value>, tools: &[Value]) -> Result<ToolChoice, ApiError> {
    let wrong = |why: String| ApiError::field("tool_choice", why);
    let choice = match choice {
        None | Some(Value::Null) => return Ok(ToolChoice::Auto),
        Some(choice) => choice,
    };
    let expected =
        "expected \"none\", \"auto\", \"required\" or {\"type\": \"function\", \"function\": {\"name\": …}}";
    let checked = match choice {
        Value::String(word) => match word.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "required" => ToolChoice::Required,
            _ => return Err(wrong(format!("{expected}, found {}", found(choice)))),
        },
        Value::Object(members) => {
            let is_function = members.get("type").and_then(Value::as_str) == Some("function");
            let name = name_of(choice).filter(|_| is_function);
            let name = name.ok_or_else(|| wrong(format!("{expected}, found {}", found(choice))))?;
            ToolChoice::Named(name.to_owned())
        }
        other => return Err(wrong(format!("{expected}, found {}", found(other)))),
    };
    match &checked {
        ToolChoice::Required | ToolChoice::Named(_) if tools.is_empty() => {
            Err(wrong("a call is required, but \"tools\" gives no function".to_owned()))
        }
        ToolChoice::Named(name) if !tools.iter().any(|tool| name_of(tool) == Some(name)) => {
            Err(wrong(format!("{:?} is not the name of a function in \"tools\"", echo(name))))
        }
        _ => Ok(checked),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tool(name: &str) -> Value {
        json!({"type": "function", "function": {"name": name}})
    }

    fn wrong(result: Result<impl std::fmt::Debug, ApiError>) -> (String, String) {
        match result.unwrap_err() {
            ApiError::InvalidRequest { field: Some(field), message } => (field, message),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn tools_take_one_shape() {
        let given = json!([
            {"type": "function", "function": {"name": "f", "strict": true, "parameters": null}},
            {"type": "function", "function": {"name": "g-1_X", "description": "d", "parameters": {"type": "object"}}},
        ]);
        let checked = check_tools(&given).unwrap();
        assert_eq!(checked[0], json!({"type": "function", "function": {"name": "f", "parameters": {}}}));
        assert_eq!(checked[1], given[1]);
        assert_eq!(check_tools(&Value::Null).unwrap(), Vec::<Value>::new());
        assert_eq!(check_tools(&json!([])).unwrap(), Vec::<Value>::new());
    }

    #[test]
    fn wrong_tools_are_refused_with_their_place() {
        let function = |function: Value| json!([tool("a"), {"type": "function", "function": function}]);
        for (tools, field, words) in [
            (json!({}), "tools", "a list"),
            (json!(["f"]), "tools[0]", "\"f\""),
            (json!([{"type": "web_search"}]), "tools[0].type", "web_search"),
            (json!([{"function": {"name": "f"}}]), "tools[0].type", "missing"),
            (json!([{"type": "function", "name": "f"}]), "tools[0].name", "no such field"),
            (json!([{"type": "function"}]), "tools[0].function", "\"name\""),
            (function(json!({})), "tools[1].function.name", "missing"),
            (function(json!({"name": ""})), "tools[1].function.name", "1 to 64"),
            (function(json!({"name": "f g"})), "tools[1].function.name", "f g"),
            (function(json!({"name": "f".repeat(65)})), "tools[1].function.name", "64"),
            (function(json!({"name": "a"})), "tools[1].function.name", "two functions"),
            (function(json!({"name": "f", "description": 1})), "tools[1].function.description", "a string"),
            (function(json!({"name": "f", "parameters": []})), "tools[1].function.parameters", "object"),
            (function(json!({"name": "f", "strict": 1})), "tools[1].function.strict", "true or false"),
            (function(json!({"name": "f", "extra": 1})), "tools[1].function.extra", "no such field"),
        ] {
            let (found, message) = wrong(check_tools(&tools));
            assert_eq!(found, field, "{tools}");
            assert!(message.contains(words), "{message}");
        }
        let many: Vec<Value> = (0..=MAX_TOOLS).map(|number| tool(&format!("f{number}"))).collect();
        assert_eq!(wrong(check_tools(&json!(many))).0, "tools");
        assert_eq!(check_tools(&json!(many[..MAX_TOOLS])).unwrap().len(), MAX_TOOLS);
    }

    #[test]
    fn a_choice_names_what_is_there() {
        let tools = [tool("f")];
        let named = json!({"type": "function", "function": {"name": "f"}});
        for (choice, expected) in [
            (None, ToolChoice::Auto),
            (Some(json!(null)), ToolChoice::Auto),
            (Some(json!("auto")), ToolChoice::Auto),
            (Some(json!("none")), ToolChoice::None),
            (Some(json!("required")), ToolChoice::Required),
            (Some(named.clone()), ToolChoice::Named("f".to_owned())),
        ] {
            assert_eq!(check_choice(choice.as_ref(), &tools).unwrap(), expected);
        }
        assert_eq!(check_choice(Some(&json!("auto")), &[]).unwrap(), ToolChoice::Auto);
        let undefined = json!({"type": "function", "function": {"name": "g"}});
        let untyped = json!({"function": {"name": "f"}});
        for (choice, count, words) in [
            (json!({}), 1, "expected"),
            (json!("any"), 1, "\"any\""),
            (json!(1), 1, "expected"),
            (json!({"type": "function"}), 1, "expected"),
            (untyped, 1, "expected"),
            (undefined, 1, "\"g\""),
            (named, 0, "no function"),
            (json!("required"), 0, "no function"),
        ] {
            let (field, message) = wrong(check_choice(Some(&choice), &tools[..count]));
            assert!(field == "tool_choice" && message.contains(words), "{choice}: {message}");
        }
    }
}
