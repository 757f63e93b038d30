//! Answers of every family, taken apart in pieces of every length.

mod families;
mod random;

use super::*;
use crate::conversation::ToolChoice;
use serde_json::{Value, json};

/// What an answer holds, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Found {
    Content(String),
    Reasoning(String),
    Call(String, String),
}

fn content(text: &str) -> Found {
    Found::Content(text.to_owned())
}

fn call(name: &str, arguments: &str) -> Found {
    Found::Call(name.to_owned(), arguments.to_owned())
}

fn tools() -> Vec<Value> {
    let text = || json!({"type": "string"});
    let tool = |name: &str, properties: Value| {
        let parameters = json!({"type": "object", "properties": properties});
        json!({"type": "function", "function": {"name": name, "parameters": parameters}})
    };
    let area = json!({"shape": text(), "dimensions": {"type": "object"}, "precision": {"type": "integer"}});
    let optional = json!({"anyOf": [{"type": "integer"}, {"type": "null"}]});
    vec![
        tool("get_weather", json!({"city": text(), "state": text(), "limit": optional})),
        tool("get-time", json!({"timezone": text()})),
        tool("calculate_area", area),
        tool("refresh", json!({})),
    ]
}

fn parser(calls: CallSyntax) -> AnswerParser {
    let syntax = AnswerSyntax { calls: Some(calls), reasoning: None };
    AnswerParser::new(syntax, &tools(), &ToolChoice::Auto)
}

/// The parts of an answer that comes in these pieces, joined.
fn found_by<'a>(parser: &mut AnswerParser, pieces: impl IntoIterator<Item = &'a str>) -> Vec<Found> {
    let mut parts = Vec::new();
    for piece in pieces {
        parts.extend(parser.push(piece));
    }
    parts.extend(parser.finish());
    let mut found: Vec<Found> = Vec::new();
    let mut calls = 0;
    for part in parts {
        match part {
            Part::Content(text) => {
                assert!(!text.is_empty());
                match found.last_mut() {
                    Some(Found::Content(before)) => before.push_str(&text),
                    _ => found.push(Found::Content(text)),
                }
            }
            Part::Reasoning(text) => match found.last_mut() {
                Some(Found::Reasoning(before)) => before.push_str(&text),
                _ => found.push(Found::Reasoning(text)),
            },
            Part::CallBegin { index, name, .. } => {
                assert_eq!(index, calls);
                calls += 1;
                found.push(Found::Call(name, String::new()));
            }
            Part::CallArguments { index, text } => {
                assert_eq!(index + 1, calls);
                let Some(Found::Call(_, before)) = found.last_mut() else { panic!("arguments of no call") };
                before.push_str(&text);
            }
        }
    }
    found
}

/// Pieces of a text of at most `chars` characters.
fn pieces(text: &str, chars: usize) -> Vec<&str> {
    let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).step_by(chars).chain([text.len()]).collect();
    ends.windows(2).map(|ends| &text[ends[0]..ends[1]]).collect()
}

/// Checks one answer in pieces of every length, given as it comes and in whole calls.
fn check(syntax: CallSyntax, text: &str, expected: &[Found]) {
    for chars in 1..=text.chars().count() {
        let found = found_by(&mut parser(syntax), pieces(text, chars));
        assert_eq!(found, expected, "{syntax:?} {text:?} by {chars}");
        let found = found_by(&mut parser(syntax).whole_calls(), pieces(text, chars));
        assert_eq!(found, expected, "{syntax:?} {text:?} in whole calls by {chars}");
    }
    for part in expected {
        if let Found::Call(_, arguments) = part {
            let _object: serde_json::Map<String, Value> = serde_json::from_str(arguments).unwrap();
        }
    }
}

/// One complete call of each family, and how much of its text is needed for it to be complete.
fn one_call_of(syntax: CallSyntax) -> (String, usize) {
    let object = r#"{"name": "get_weather", "arguments": {"city": "Rome"}}"#;
    let (text, needed) = match syntax {
        CallSyntax::Hermes => (format!("<tool_call>\n{object}\n</tool_call>"), "}"),
        CallSyntax::QwenXml => {
            let body = "<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>";
            (format!("<tool_call>\n{body}\n</tool_call>"), "</function>")
        }
        CallSyntax::Llama3 => (object.to_owned(), "}"),
        CallSyntax::Mistral => (format!("[TOOL_CALLS] [{object}]"), "}"),
        CallSyntax::MistralNamed => ("[TOOL_CALLS]get_weather{\"city\": \"Rome\"}".to_owned(), "}"),
        CallSyntax::Phi4 => (format!("functools[{object}]"), "}"),
        CallSyntax::Granite30 => (format!("<|tool_call|>[{object}]"), "}"),
        CallSyntax::Granite31 => (format!("<tool_call>[{object}]"), "}"),
        CallSyntax::FunctionGemma => (
            "<start_function_call>call:get_weather{city:<escape>Rome<escape>}<end_function_call>".to_owned(),
            "}",
        ),
        CallSyntax::Gemma4 => {
            ("<|tool_call>call:get_weather{city:<|\"|>Rome<|\"|>}<tool_call|>".to_owned(), "}")
        }
    };
    let needed = text.find(needed).unwrap() + needed.len();
    (text, needed)
}

#[test]
fn a_call_that_is_cut_is_left_out() {
    for syntax in CallSyntax::ALL {
        let (text, needed) = one_call_of(syntax);
        for end in (0..=text.len()).filter(|end| text.is_char_boundary(*end)) {
            let answer = format!("Hi {}", &text[..end]);
            let found = found_by(&mut parser(syntax).whole_calls(), [answer.as_str()]);
            let mut streaming = parser(syntax);
            let streamed = found_by(&mut streaming, pieces(&answer, 3));
            let started = streamed.iter().any(|found| matches!(found, Found::Call(..)));
            if end >= needed {
                let expected = [content("Hi"), call("get_weather", r#"{"city": "Rome"}"#)];
                assert_eq!(found, expected, "{answer:?}");
                assert_eq!((streamed.as_slice(), streaming.cut_call()), (&expected[..], None), "{answer:?}");
            } else {
                assert!(
                    found.iter().all(|found| matches!(found, Found::Content(_))),
                    "{answer:?}: {found:?}"
                );
                assert_eq!(streaming.cut_call(), started.then_some(0), "{answer:?}");
                // What is shown never holds a whole tag.
                let shown = found.iter().map(|found| match found {
                    Found::Content(text) => text.as_str(),
                    Found::Reasoning(_) | Found::Call(..) => "",
                });
                let shown: String = shown.collect();
                let mut tags = syntax.tags().iter().filter(|tag| **tag != "functools");
                assert!(tags.all(|tag| !shown.contains(tag)), "{answer:?}: {shown:?}");
            }
        }
    }
}

#[test]
fn a_call_of_an_undefined_function_is_content() {
    for syntax in CallSyntax::ALL {
        let text = one_call_of(syntax).0.replace("get_weather", "get_weather2");
        let answer = format!("a \n {text} \n b ");
        check(syntax, &answer, &[content(&answer)]);
    }
}

#[test]
fn nothing_is_a_call_without_tools_or_where_none_is_allowed() {
    for syntax in CallSyntax::ALL {
        let (text, _) = one_call_of(syntax);
        let answer = AnswerSyntax { calls: Some(syntax), reasoning: None };
        for mut parser in [
            AnswerParser::new(answer, &[], &ToolChoice::Auto),
            AnswerParser::new(answer, &tools(), &ToolChoice::None),
            AnswerParser::new(AnswerSyntax::default(), &tools(), &ToolChoice::Auto),
        ] {
            assert_eq!(found_by(&mut parser, pieces(&text, 5)), [content(&text)]);
        }
    }
}

#[test]
fn arguments_come_as_soon_as_they_belong_to_a_call() {
    let mut parser = parser(CallSyntax::Hermes);
    assert_eq!(parser.push("<tool_call>\n{\"name\": \"get_weather\", \"arguments\": "), []);
    let parts = parser.push("{\"ci");
    assert!(matches!(&parts[..], [Part::CallBegin { index: 0, name, .. }, Part::CallArguments { text, .. }]
        if name == "get_weather" && text == "{\"ci"));
    assert_eq!(parser.push("ty"), [Part::CallArguments { index: 0, text: "ty".into() }]);
}

#[test]
fn broken_arguments_are_content_or_named_as_cut() {
    let text = r#"<tool_call>{"name": "get_weather", "arguments": {"city": oops}}</tool_call> b"#;
    let found = found_by(&mut parser(CallSyntax::Hermes).whole_calls(), [text]);
    assert_eq!(found, [content(text)]);
    let mut streaming = parser(CallSyntax::Hermes);
    let found = found_by(&mut streaming, [text]);
    assert_eq!(found, [call("get_weather", r#"{"city": "#), content("oops}}</tool_call> b")]);
    assert_eq!(streaming.cut_call(), Some(0));
}

#[test]
fn further_calls_are_left_out_where_one_is_allowed() {
    for syntax in CallSyntax::ALL {
        let (text, _) = one_call_of(syntax);
        let answer = format!("{text}\n{text}");
        for mut parser in [parser(syntax).one_call(), parser(syntax).one_call().whole_calls()] {
            let found = found_by(&mut parser, pieces(&answer, 4));
            assert_eq!(found, [call("get_weather", r#"{"city": "Rome"}"#)], "{syntax:?}");
        }
    }
}

#[test]
fn ids_have_the_form_that_templates_of_the_family_take() {
    for (syntax, chars) in [(CallSyntax::Hermes, 29), (CallSyntax::Mistral, 9), (CallSyntax::MistralNamed, 9)]
    {
        let parts = parser(syntax).push(&one_call_of(syntax).0);
        assert!(matches!(&parts[0], Part::CallBegin { id, .. } if id.len() == chars), "{parts:?}");
    }
}

#[test]
fn reasoning_comes_before_calls_and_holds_none() {
    let reasoning = ReasoningSyntax { opened_by_template: true };
    let syntax = AnswerSyntax { calls: Some(CallSyntax::Hermes), reasoning: Some(reasoning) };
    let (text, _) = one_call_of(CallSyntax::Hermes);
    let answer = format!("I could call {text}.\n</think>\n\nOk.\n{text}");
    let rome = call("get_weather", r#"{"city": "Rome"}"#);
    let mut parser = AnswerParser::new(syntax, &tools(), &ToolChoice::Auto);
    let thought = Found::Reasoning(format!("I could call {text}."));
    assert_eq!(found_by(&mut parser, pieces(&answer, 3)), [thought, content("Ok."), rome.clone()]);
    // The grammar of a required call leaves no room for reasoning.
    let mut parser = AnswerParser::new(syntax, &tools(), &ToolChoice::Required);
    assert_eq!(found_by(&mut parser, pieces(&text, 3)), [rome]);
}
