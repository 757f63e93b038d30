//! A chat template, compiled and rendered with a conversation.

use crate::{KIB, MIB, fuzz};
use serde_json::{Map, json};
use std::time::{Duration, UNIX_EPOCH};
use trustformers_fuzz::Bounds;
use trustformers_model::chat::{ChatRequest, ChatTemplate, SpecialTokens};

/// 500,000 steps of 64 bytes of text are 31 MiB, which exist twice while a text grows; lists take 32 bytes a
/// step.
const BOUNDS: Bounds = Bounds { input_bytes: 16 * KIB, heap_bytes: 192 * MIB, time: Duration::from_secs(20) };

const WORDS: [&str; 30] = [
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "{% set ns = namespace() %}",
    "{% set ns.x = [ns.x] %}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{% macro f(x) %}",
    "{% endmacro %}",
    "{% if ",
    "{% endif %}",
    "{% set x %}",
    "{% endset %}",
    "[x]",
    "|tojson",
    "|map('upper')",
    "|sort",
    "|join",
    "|batch(2)",
    "{{ f(x) }}",
    "range(99999)",
    "recursive",
    "loop(",
    "~",
    "{% generation %}",
    "strftime_now('%Y')",
    "raise_exception(",
];

#[test]
fn chat() {
    let messages = [
        json!({"role": "system", "content": "s"}),
        json!({"role": "user", "content": "hi", "tool_calls": [{"a": [1.5, null]}]}),
    ];
    let variables = Map::new();
    fuzz("chat", &WORDS, BOUNDS, |input| {
        let source = String::from_utf8_lossy(input);
        let template = match ChatTemplate::new(&source, SpecialTokens::default()) {
            Ok(template) => template,
            Err(error) => return error.to_string(),
        };
        let rendered = template.render(&ChatRequest {
            messages: &messages,
            tools: &[],
            add_generation_prompt: true,
            variables: &variables,
            now: UNIX_EPOCH + Duration::from_secs(1_770_127_506),
        });
        rendered.map_or_else(|error| error.to_string(), |_| "rendered".to_owned())
    });
}
