//! Templates against what transformers makes of them, and what goes wrong.

use super::*;
use serde_json::{Map, Value as Json, json};
use std::time::{Duration, UNIX_EPOCH};

/// Tuesday, 3 February 2026, 14:05:06 UTC: the clock of the recipe.
fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_770_127_506)
}

fn special() -> SpecialTokens {
    let token = |text: &str| Some(text.to_owned());
    SpecialTokens {
        bos_token: token("<s>"),
        eos_token: token("</s>"),
        unk_token: token("<unk>"),
        pad_token: token("<pad>"),
    }
}

/// Renders a conversation as the recipe describes it: `messages`, and perhaps `tools` and variables.
fn render(template: &str, conversation: &Json) -> Result<String, ChatError> {
    let list = |key: &str| conversation[key].as_array().cloned().unwrap_or_default();
    let known = ["messages", "tools", "add_generation_prompt"];
    let all = conversation.as_object().unwrap().clone();
    let variables: Map<String, Json> =
        all.into_iter().filter(|(key, _)| !known.contains(&key.as_str())).collect();
    ChatTemplate::new(template, special())?.render(&ChatRequest {
        messages: &list("messages"),
        tools: &list("tools"),
        add_generation_prompt: conversation["add_generation_prompt"].as_bool().unwrap_or(true),
        variables: &variables,
        now: now(),
    })
}

#[test]
fn texts_are_those_of_transformers() {
    let reference: Json = serde_json::from_str(include_str!("reference.json")).unwrap();
    let mut compared = 0;
    for template in reference["templates"].as_array().unwrap() {
        for (name, wanted) in template["texts"].as_object().unwrap() {
            let rendered = render(template["template"].as_str().unwrap(), &reference["conversations"][name]);
            let place = format!("{} with {name}", template["name"]);
            match (rendered, wanted["error"].as_str()) {
                (Ok(text), None) => assert_eq!(text, wanted["text"].as_str().unwrap(), "{place}"),
                (Err(ChatError::Refused(why)), Some("refused")) => assert_eq!(why, wanted["why"], "{place}"),
                (Err(ChatError::Template(_)), Some("template")) => {}
                (Err(ChatError::Failed(_)), Some("failed")) => {}
                (rendered, error) => panic!("{place}: {rendered:?} where {error:?} was wanted"),
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 54);
}

fn one(template: &str) -> Result<String, ChatError> {
    render(template, &json!({"messages": [{"role": "user", "content": "hi"}]}))
}

#[test]
fn work_is_bounded() {
    let endless = "{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}";
    let error = one(endless).unwrap_err();
    assert!(matches!(&error, ChatError::Failed(why) if why.contains("fuel")), "{error}");
    let deep = "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}";
    assert!(matches!(one(deep), Err(ChatError::Failed(_))));
    let large = "{{ 'x' * 100000000 }}{{ 'y' * 100000000 }}";
    assert!(one(large).is_err());
    let long = "x".repeat(MOST_BYTES + 1);
    assert!(matches!(one(&long), Err(ChatError::Template(why)) if why.contains("more than 1048576")));
}

#[test]
fn a_request_cannot_replace_its_messages_and_templates_reach_nothing_else() {
    let variables = json!({"messages": [], "bos_token": "x", "mine": 3});
    let text = ChatTemplate::new("{{ messages | length }}{{ bos_token }}{{ mine }}", special())
        .unwrap()
        .render(&ChatRequest {
            messages: &[json!({"role": "user", "content": "hi"})],
            tools: &[],
            add_generation_prompt: true,
            variables: variables.as_object().unwrap(),
            now: now(),
        });
    assert_eq!(text.unwrap(), "1<s>3");
    assert!(one("{% include 'other' %}").is_err());
    assert!(one("{{ strftime_now('%!') }}").is_err());
    assert!(one("{{ absent | tojson }}").is_err());
}

#[test]
fn marks_of_the_assistants_part_are_spelled_in_many_ways() {
    let text = "a{%- generation -%} b {%generation%}c{% endgeneration %}{%-endgeneration-%} d{% raw";
    let wanted = "a{%- if true -%} b {%if true%}c{% endif %}{%-endif-%} d{% raw";
    assert_eq!(without_marks(text), wanted);
    assert_eq!(without_marks("{{ generation }}"), "{{ generation }}");
}
