//! The grammar of an answer that must be a call, in Lark's syntax as the engine reads it.
//!
//! | syntax | a call |
//! |---|---|
//! | JSON | its name and its arguments, which follow the JSON schema of its parameters in full |
//! | XML, Gemma | its name, and its declared parameters in their order; strings hold any text |

mod values;

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::check::name_of;
use super::syntax::CallSyntax;
use crate::conversation::{Conversation, ToolChoice};
use crate::echo::echo;
use crate::error::ApiError;
use values::ValueRules;

/// Grammar, in Lark's syntax, that makes an answer a call: of one function that the choice names, or of any
/// where a call is required, several where the request allows them. None where the model decides, or may not
/// call.
///
/// # Errors
/// [`ApiError::InvalidRequest`] that names the parameters that no call of this family can be held to.
pub fn call_grammar(syntax: CallSyntax, conversation: &Conversation) -> Result<Option<String>, ApiError> {
    let named = match &conversation.tool_choice {
        ToolChoice::Auto | ToolChoice::None => return Ok(None),
        ToolChoice::Required => None,
        ToolChoice::Named(name) => Some(name.as_str()),
    };
    let several = named.is_none() && conversation.parallel_tool_calls;
    let form = CallForm::of(syntax);
    let mut rules = LarkRules::default();
    let mut calls = Vec::new();
    for (index, tool) in conversation.tools.iter().enumerate() {
        let name = name_of(tool).unwrap_or_default();
        if named.is_some_and(|named| named != name) {
            continue;
        }
        let field = format!("tools[{index}].function.parameters");
        let function = DeclaredFunction { index, name, parameters: parameters(&field, tool)?, field };
        let call = form.call(&function, &mut rules)?;
        rules.add(&format!("call_{index}"), &call);
        if rules.is_full() {
            return Err(ApiError::field(&function.field, too_large(name)));
        }
        calls.push(format!("call_{index}"));
    }
    if calls.is_empty() {
        return Err(ApiError::field("tool_choice", "a call is required, but \"tools\" has no such function"));
    }
    rules.add("call", &calls.join(" | "));
    let separator =
        if several { format!("call ({} call)*", literal(form.between)) } else { "call".to_owned() };
    let start = format!("{} {separator} {}", literal(form.before), literal(form.after));
    if matches!(form.arguments, ArgumentsForm::Json { .. } | ArgumentsForm::Named) {
        rules.text.push_str(LIMIT_DIGITS);
    }
    Ok(Some(format!("start: {start}\n{}", rules.text)))
}

/// The engine's option that lets numbers end, as in answers that are JSON: small models fill them with
/// digits. It needs quotation marks as JSON has them, which texts in XML need not have.
const LIMIT_DIGITS: &str = "%llguidance {\"limit_digits\": true}\n";

/// A function as its grammar needs it.
struct DeclaredFunction<'a> {
    /// Its place in the tools, which makes the names of its rules unique.
    index: usize,
    name: &'a str,
    /// A schema of an object.
    parameters: Value,
    /// Where they stand in the request.
    field: String,
}

/// The schema of the arguments: that of the parameters, and an object.
fn parameters(field: &str, tool: &Value) -> Result<Value, ApiError> {
    let mut schema = tool["function"]["parameters"].clone();
    let Some(members) = schema.as_object_mut() else { return Ok(json!({"type": "object"})) };
    let is_object = match members.get("type") {
        None | Some(Value::Null) => true,
        Some(Value::String(name)) => name == "object",
        Some(Value::Array(names)) => names.iter().any(|name| name == "object"),
        Some(_) => false,
    };
    if !is_object {
        let why = "the arguments of a call are an object, so its \"type\" must be \"object\"";
        return Err(ApiError::field(field, why));
    }
    members.insert("type".to_owned(), json!("object"));
    Ok(schema)
}

/// How a family writes calls.
#[derive(Debug, Clone, Copy)]
struct CallForm {
    /// Before the first call.
    before: &'static str,
    /// Between two calls.
    between: &'static str,
    /// After the last call.
    after: &'static str,
    arguments: ArgumentsForm,
}

#[derive(Debug, Clone, Copy)]
enum ArgumentsForm {
    /// An object with the name and, under this key, the arguments, between two tags.
    Json { key: &'static str, open: &'static str, close: &'static str },
    /// The tag, the name and the arguments as JSON.
    Named,
    /// Tags for function and parameters.
    Xml,
    /// Gemma's own notation, with tags around a call and a mark around strings.
    Gemma { open: &'static str, close: &'static str, mark: &'static str },
}

impl CallForm {
    fn of(syntax: CallSyntax) -> Self {
        let json = |key, open, close| ArgumentsForm::Json { key, open, close };
        let list = |before| Self { before, between: ", ", after: "]", arguments: json("arguments", "", "") };
        let single = |between, arguments| Self { before: "", between, after: "", arguments };
        match syntax {
            CallSyntax::Hermes => single("\n", json("arguments", "<tool_call>\n", "\n</tool_call>")),
            CallSyntax::Llama3 => single("; ", json("parameters", "", "")),
            CallSyntax::Mistral => list("[TOOL_CALLS] ["),
            // The form that has no special token, which a grammar could not reach.
            CallSyntax::Phi4 => list("functools["),
            CallSyntax::Granite30 => list("<|tool_call|>["),
            CallSyntax::Granite31 => list("<tool_call>["),
            CallSyntax::MistralNamed => single("", ArgumentsForm::Named),
            CallSyntax::QwenXml => single("\n", ArgumentsForm::Xml),
            CallSyntax::FunctionGemma => single(
                "",
                ArgumentsForm::Gemma {
                    open: "<start_function_call>",
                    close: "<end_function_call>",
                    mark: "<escape>",
                },
            ),
            CallSyntax::Gemma4 => single(
                "",
                ArgumentsForm::Gemma { open: "<|tool_call>", close: "<tool_call|>", mark: "<|\"|>" },
            ),
        }
    }

    /// The body of the rule of one call.
    fn call(&self, function: &DeclaredFunction<'_>, rules: &mut LarkRules) -> Result<String, ApiError> {
        let DeclaredFunction { index, name, parameters, .. } = function;
        match self.arguments {
            ArgumentsForm::Json { key, open, close } => {
                let begin = format!("{open}{{\"name\": {}, \"{key}\": ", Value::from(*name));
                let arguments = rules.json(&format!("args_{index}"), parameters);
                Ok(format!("{} {arguments} {}", literal(&begin), literal(&format!("}}{close}"))))
            }
            ArgumentsForm::Named => {
                let arguments = rules.json(&format!("args_{index}"), parameters);
                let begin = literal(&format!("[TOOL_CALLS]{name}"));
                Ok(format!("{begin} {}? {arguments}", literal("[ARGS]")))
            }
            ArgumentsForm::Xml => {
                let arguments = ValueRules { rules, mark: None }.xml(function)?;
                let begin = literal(&format!("<tool_call>\n<function={name}>\n"));
                Ok(format!("{begin} {arguments} {}", literal("</function>\n</tool_call>")))
            }
            ArgumentsForm::Gemma { open, close, mark } => {
                let arguments = ValueRules { rules, mark: Some(mark) }.gemma(function)?;
                let begin = literal(&format!("{open}call:{name}{{"));
                Ok(format!("{begin} {arguments} {}", literal(&format!("}}{close}"))))
            }
        }
    }
}

/// Most bytes of the rules of all calls: what the engine takes as a grammar. Rules are only added while they
/// have fewer, and the schemas of a request are at most as long as its body, so that writing them takes no
/// more than one body more.
const MAX_RULE_BYTES: usize = 256 * 1024;

fn too_large(name: &str) -> String {
    format!(
        "the grammar of a required call, with {:?} in it, has more than {MAX_RULE_BYTES} bytes; shorten the schema, \
         offer fewer tools, or let the model decide (\"tool_choice\": \"auto\")",
        echo(name)
    )
}

/// Rules of a grammar, one a line.
#[derive(Debug, Default)]
struct LarkRules {
    text: String,
    /// Rules that several parameters share.
    shared: BTreeSet<String>,
}

impl LarkRules {
    /// Whether there are more rules than a grammar may have; none is added then.
    fn is_full(&self) -> bool {
        self.text.len() > MAX_RULE_BYTES
    }

    fn add(&mut self, name: &str, body: &str) {
        if !self.is_full() {
            self.text.push_str(&format!("{name}: {body}\n"));
        }
    }

    /// Adds a rule that is given whole, once.
    fn add_once(&mut self, rule: &str) {
        if !self.is_full() && self.shared.insert(rule.to_owned()) {
            self.text.push_str(rule);
            self.text.push('\n');
        }
    }

    /// A rule for JSON that a schema describes; its name.
    fn json(&mut self, name: &str, schema: &Value) -> String {
        if !self.is_full() {
            self.add(name, &format!("%json {schema}"));
        }
        name.to_owned()
    }
}

/// A text as a literal of Lark, which has JSON's escapes and takes no control character as it is.
fn literal(text: &str) -> String {
    Value::from(text).to_string().replace('\u{7f}', "\\u007f")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conversation(parameters: &[Value], choice: ToolChoice, parallel_tool_calls: bool) -> Conversation {
        let tool = |(index, parameters): (usize, &Value)| {
            let function = json!({"name": format!("f{index}"), "parameters": parameters});
            json!({"type": "function", "function": function})
        };
        let tools = parameters.iter().enumerate().map(tool).collect();
        Conversation { tools, tool_choice: choice, parallel_tool_calls, ..Conversation::default() }
    }

    /// The grammar of one call of one function.
    fn grammar(syntax: CallSyntax, parameters: Value) -> String {
        let conversation = conversation(&[parameters], ToolChoice::Required, false);
        call_grammar(syntax, &conversation).unwrap().unwrap()
    }

    #[test]
    fn a_model_that_decides_has_no_grammar() {
        for choice in [ToolChoice::Auto, ToolChoice::None] {
            let conversation = conversation(&[json!({})], choice, true);
            assert_eq!(call_grammar(CallSyntax::Hermes, &conversation), Ok(None));
        }
    }

    #[test]
    fn a_required_call_is_of_any_function_and_a_named_one_of_its_own() {
        let required = conversation(&[json!({}), json!({"properties": {}})], ToolChoice::Required, true);
        let text = call_grammar(CallSyntax::Hermes, &required).unwrap().unwrap();
        let expected = [
            r#"start: "" call ("\n" call)* """#,
            r#"args_0: %json {"type":"object"}"#,
            r#"call_0: "<tool_call>\n{\"name\": \"f0\", \"arguments\": " args_0 "}\n</tool_call>""#,
            r#"args_1: %json {"properties":{},"type":"object"}"#,
            r#"call_1: "<tool_call>\n{\"name\": \"f1\", \"arguments\": " args_1 "}\n</tool_call>""#,
            "call: call_0 | call_1",
            r#"%llguidance {"limit_digits": true}"#,
            "",
        ];
        assert_eq!(text, expected.join("\n"));
        let named = conversation(&[json!({}), json!({})], ToolChoice::Named("f1".into()), true);
        let text = call_grammar(CallSyntax::Hermes, &named).unwrap().unwrap();
        assert!(text.starts_with("start: \"\" call \"\"\n") && text.contains("\ncall: call_1\n"), "{text}");
        let undefined = conversation(&[json!({})], ToolChoice::Named("g".into()), true);
        assert!(call_grammar(CallSyntax::Hermes, &undefined).is_err());
    }

    #[test]
    fn lists_and_names_have_their_tags() {
        let text = grammar(CallSyntax::Mistral, json!({}));
        assert!(text.starts_with("start: \"[TOOL_CALLS] [\" call \"]\"\n"), "{text}");
        assert!(text.contains(r#"call_0: "{\"name\": \"f0\", \"arguments\": " args_0 "}""#), "{text}");
        let text = grammar(CallSyntax::MistralNamed, json!({}));
        assert!(text.contains("call_0: \"[TOOL_CALLS]f0\" \"[ARGS]\"? args_0\n"), "{text}");
        let text = grammar(CallSyntax::Llama3, json!({}));
        assert!(text.contains(r#"\"parameters\": "#), "{text}");
    }

    #[test]
    fn parameters_in_xml_have_the_order_and_types_of_their_schema() {
        let schema = json!({
            "properties": {
                "text": {"type": "string"},
                "count": {"$ref": "#/$defs/count"},
                "unit": {"enum": ["a", "\"b\""]},
            },
            "required": ["text"],
            "$defs": {"count": {"type": "integer"}},
        });
        let text = grammar(CallSyntax::QwenXml, schema);
        for line in [
            r#"text[suffix="\n</parameter>\n"]: /(.|\n)*/"#,
            r#"args_0_0: "<parameter=text>\n" text"#,
            r##"args_0_1_json: %json {"$ref":"#/$defs/count","$defs":{"count":{"type":"integer"}}}"##,
            r#"args_0_1: "<parameter=count>\n" args_0_1_json "\n</parameter>\n""#,
            r#"args_0_2: "<parameter=unit>\n" ("a" | "\"b\"") "\n</parameter>\n""#,
            r#"call_0: "<tool_call>\n<function=f0>\n" args_0_0 args_0_1? args_0_2? "</function>\n</tool_call>""#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn optional_parameters_of_gemma_leave_no_comma_behind() {
        let schema = json!({
            "properties": {"a": {"type": "string"}, "b": {"type": "boolean"}, "c": {"enum": ["x"]}},
            "required": ["b"],
        });
        let text = grammar(CallSyntax::FunctionGemma, schema);
        for line in [
            r#"string: "<escape>" text"#,
            r#"args_0_0: "a:" string"#,
            r#"args_0_first_0: args_0_0 args_0_more_1 | args_0_first_1"#,
            r#"args_0_first_1: args_0_1 args_0_more_2"#,
            r#"args_0_more_1: "," args_0_1 args_0_more_2"#,
            r#"args_0_2: "c:" "<escape>" ("x") "<escape>""#,
            r#"args_0_more_2: "," args_0_2 "" | """#,
            r#"call_0: "<start_function_call>call:f0{" args_0_first_0 "}<end_function_call>""#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn rules_beyond_the_bound_are_refused_by_name_before_they_are_written() {
        let description = "x".repeat(100_000);
        let mut properties = serde_json::Map::new();
        for index in 0..2_000 {
            properties.insert(format!("p{index}"), json!({"$ref": "#/$defs/large"}));
        }
        let definitions = json!({"large": {"type": "integer", "description": description}});
        let parameters = json!({"properties": properties, "$defs": definitions});
        for syntax in [CallSyntax::QwenXml, CallSyntax::Gemma4] {
            let mut rules = LarkRules::default();
            let field = "tools[0].function.parameters".to_owned();
            let function = DeclaredFunction { index: 0, name: "f", parameters: parameters.clone(), field };
            CallForm::of(syntax).call(&function, &mut rules).unwrap();
            assert!(rules.is_full() && rules.text.len() < MAX_RULE_BYTES + 200_000, "{}", rules.text.len());
            let conversation = conversation(std::slice::from_ref(&parameters), ToolChoice::Required, false);
            let error = call_grammar(syntax, &conversation).unwrap_err();
            let ApiError::InvalidRequest { field: Some(field), message } = error else { panic!("{error:?}") };
            assert_eq!(field, "tools[0].function.parameters");
            assert!(message.contains("262144 bytes"), "{message}");
        }
    }

    #[test]
    fn parameters_that_no_call_can_follow_are_refused_by_name() {
        for (syntax, parameters, words) in [
            (CallSyntax::Hermes, json!({"type": "string"}), "\"object\""),
            (CallSyntax::Hermes, json!({"type": ["array", "null"]}), "\"object\""),
            (CallSyntax::QwenXml, json!({"anyOf": [{}]}), "\"anyOf\""),
            (CallSyntax::Gemma4, json!({"$ref": "#/$defs/a"}), "\"$ref\""),
            (CallSyntax::QwenXml, json!({"properties": {"a>b": {}}}), "a>b"),
        ] {
            let conversation = conversation(&[json!({}), parameters], ToolChoice::Required, false);
            let error = call_grammar(syntax, &conversation).unwrap_err();
            let ApiError::InvalidRequest { field: Some(field), message } = error else { panic!("{error:?}") };
            assert!(
                field.starts_with("tools[1].function.parameters") && message.contains(words),
                "{message}"
            );
        }
    }
}
