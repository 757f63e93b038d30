//! The fields about tools of a request: which functions the model may call, and whether it must.

use std::collections::HashSet;

use serde_json::{Value, json};

use super::join_objects;
use crate::conversation::ToolChoice;
use crate::echo::echo;
use crate::error::ApiError;
use crate::functions::FunctionList;
use crate::json_object::ObjectAt;
use crate::tools::check_choice;

/// What a function is defined by. `strict` changes nothing: a call that is required always follows its
/// schema, and the schema of one that the model decides on is the model's to follow.
const FUNCTION_FIELDS: &[&str] = &[
    "type",
    "name",
    "description",
    "parameters",
    "strict",
    // Who may call a function and what it returns: every call here is the model's own, and its result is read
    // as text.
    "allowed_callers",
    "output_schema",
    "defer_loading",
];

/// What a request says about tools.
#[derive(Debug)]
pub(super) struct ResponseTools {
    /// The functions as chat templates read them.
    pub(super) tools: Vec<Value>,
    /// The functions as the answer repeats them, the text of a list.
    pub(super) listed: String,
    /// Whether the answer is a call.
    pub(super) choice: ToolChoice,
    /// The choice as the answer repeats it.
    pub(super) choice_listed: Value,
}

/// Reads `tools` and `tool_choice`.
///
/// Tools of other types than functions (`web_search`, `local_shell`, `custom`, `mcp` and others) run on
/// OpenAI's servers or in one client; clients such as Codex send them with every request. They are left out,
/// and the answer's `tools` shows what is offered to the model. To require one of them is refused.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the tool and its field.
pub(super) fn read(body: &ObjectAt<'_>) -> Result<ResponseTools, ApiError> {
    let mut functions = FunctionList::default();
    let mut listed = Vec::new();
    for (index, tool) in body.list("tools")?.unwrap_or_default().iter().enumerate() {
        let tool = ObjectAt::new(tool, format!("tools[{index}]"))?;
        if tool.required_text("type")? != "function" {
            continue;
        }
        if tool.get("function").is_some() {
            let why = "is the form of chat completions: give name, description and parameters beside type";
            return Err(tool.error("function", why));
        }
        tool.only(FUNCTION_FIELDS)?;
        let strict = tool.flag("strict")?;
        if tool.flag("defer_loading")? == Some(true) {
            let why = "is not supported: there is no search for tools here; leave it out";
            return Err(tool.error("defer_loading", why));
        }
        functions.add(&tool, "parameters")?;
        let head = json!({
            "type": "function",
            "name": tool.get("name"),
            "description": tool.get("description"),
            "strict": strict,
        });
        // Parameters are written as they stand: as values they take many times their length.
        let parameters = tool.get("parameters").unwrap_or(&Value::Null);
        listed.push(join_objects(&head.to_string(), &format!("{{\"parameters\":{parameters}}}")));
    }
    let choice = choice(body, &mut functions)?;
    let choice_listed = body.get("tool_choice").cloned().unwrap_or_else(|| json!("auto"));
    // A model that must not call is not shown what it could call.
    let tools = if choice == ToolChoice::None { Vec::new() } else { functions.into_tools() };
    Ok(ResponseTools { tools, listed: format!("[{}]", listed.join(",")), choice, choice_listed })
}

/// The choice; one among allowed tools leaves only these.
fn choice(body: &ObjectAt<'_>, functions: &mut FunctionList) -> Result<ToolChoice, ApiError> {
    const KEY: &str = "tool_choice";
    let choice = match body.get(KEY) {
        Some(choice @ Value::Object(_)) => choice,
        words => return checked(words, functions),
    };
    let choice = ObjectAt::new(choice, body.field(KEY))?;
    match choice.required_text("type")? {
        "function" => {
            let name = choice.required_text("name")?;
            checked(Some(&json!({"type": "function", "function": {"name": name}})), functions)
        }
        "allowed_tools" => {
            let mode = choice.word("mode", &["auto", "required"])?.unwrap_or("auto");
            let mut names = HashSet::new();
            for (index, tool) in choice.list("tools")?.unwrap_or_default().iter().enumerate() {
                let tool = ObjectAt::new(tool, format!("{}[{index}]", choice.field("tools")))?;
                let name = tool.required_text("name")?;
                if !functions.defines(name) {
                    let why = format!("{:?} is not the name of a function in \"tools\"", echo(name));
                    return Err(tool.error("name", why));
                }
                names.insert(name);
            }
            functions.retain(&names);
            checked(Some(&json!(mode)), functions)
        }
        other => {
            let why = format!("{:?} is not supported: give function or allowed_tools", echo(other));
            Err(choice.error("type", why))
        }
    }
}

fn checked(choice: Option<&Value>, functions: &FunctionList) -> Result<ToolChoice, ApiError> {
    check_choice(choice, functions.tools())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_body(body: &Value) -> Result<ResponseTools, ApiError> {
        read(&ObjectAt::body(body.as_object().unwrap()))
    }

    fn function(name: &str) -> Value {
        json!({"type": "function", "name": name, "parameters": {"type": "object"}, "strict": true})
    }

    #[test]
    fn functions_are_offered_and_repeated_and_other_tools_are_left_out() {
        let body = json!({"tools": [{"type": "web_search"}, function("f"), {"type": "custom", "name": "p"}]});
        let read = read_body(&body).unwrap();
        let offered =
            json!({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}});
        assert_eq!(read.tools, [offered]);
        let listed = json!({"type": "function", "name": "f", "description": null,
            "parameters": {"type": "object"}, "strict": true});
        assert_eq!(serde_json::from_str::<Value>(&read.listed).unwrap(), json!([listed]));
        assert_eq!((read.choice, read.choice_listed), (ToolChoice::Auto, json!("auto")));
    }

    #[test]
    fn every_choice_is_read() {
        let tools = json!([function("f"), function("g")]);
        let names = |tools: &[Value]| -> Vec<String> {
            tools.iter().map(|tool| tool["function"]["name"].as_str().unwrap().to_owned()).collect()
        };
        let allowed = |mode: &str| {
            let tools = json!([{"type": "function", "name": "g"}]);
            json!({"type": "allowed_tools", "mode": mode, "tools": tools})
        };
        let named = json!({"type": "function", "name": "g"});
        for (choice, expected, offered) in [
            (json!(null), ToolChoice::Auto, vec!["f", "g"]),
            (json!("auto"), ToolChoice::Auto, vec!["f", "g"]),
            (json!("none"), ToolChoice::None, vec![]),
            (json!("required"), ToolChoice::Required, vec!["f", "g"]),
            (named, ToolChoice::Named("g".into()), vec!["f", "g"]),
            (allowed("auto"), ToolChoice::Auto, vec!["g"]),
            (allowed("required"), ToolChoice::Required, vec!["g"]),
        ] {
            let read = read_body(&json!({"tools": tools, "tool_choice": choice})).unwrap();
            assert_eq!(
                (read.choice, names(&read.tools)),
                (expected, offered.into_iter().map(Into::into).collect())
            );
            assert_eq!(serde_json::from_str::<Vec<Value>>(&read.listed).unwrap().len(), 2);
        }
    }

    #[test]
    fn wrong_tools_and_choices_are_refused_by_name() {
        let f = || json!([function("f")]);
        let nested = json!([{"type": "function", "function": {"name": "f"}}]);
        let deferred = json!([{"type": "function", "name": "f", "defer_loading": true}]);
        let allowed = json!({"type": "allowed_tools", "tools": [{"type": "function", "name": "g"}]});
        for (body, text) in [
            (json!({"tools": {}}), "tools: expected a list"),
            (json!({"tools": [7]}), "tools[0]: expected an object"),
            (json!({"tools": [{}]}), "tools[0].type: is missing"),
            (json!({"tools": [{"type": "function"}]}), "tools[0].name: is missing"),
            (json!({"tools": nested}), "tools[0].function: is the form of chat completions"),
            (json!({"tools": deferred}), "tools[0].defer_loading: is not supported"),
            (
                json!({"tools": [{"type": "function", "name": "f", "schema": {}}]}),
                "tools[0].schema: there is no",
            ),
            (json!({"tool_choice": "required"}), "tool_choice: "),
            (json!({"tools": [{"type": "web_search"}], "tool_choice": "required"}), "tool_choice: "),
            (json!({"tools": f(), "tool_choice": "any"}), "tool_choice: "),
            (json!({"tools": f(), "tool_choice": {}}), "tool_choice.type: is missing"),
            (json!({"tools": f(), "tool_choice": {"type": "function", "name": "g"}}), "tool_choice: "),
            (
                json!({"tools": f(), "tool_choice": {"type": "web_search"}}),
                "tool_choice.type: \"web_search\"",
            ),
            (json!({"tools": f(), "tool_choice": allowed}), "tool_choice.tools[0].name: \"g\" is not"),
        ] {
            let error = read_body(&body).unwrap_err().to_string();
            assert!(error.starts_with(text), "{body}: {error}");
        }
    }
}
