//! The compiler of formats: the first line of an input is the kind, the rest is a JSON schema, an expression
//! or a grammar. A format that compiles also decides the first tokens of an answer.

use crate::seeds::MODEL;
use crate::{KIB, MIB, fuzz, split_line};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use trustformers_engine::{Engine, EngineConfig, EngineMetrics, GenerateParams, Grammar};
use trustformers_fuzz::Bounds;
use trustformers_model::Model;
use trustformers_plan::oracle::Oracle;

/// The compiler's own limits decide: some MiB for the states of a lexer, and a cache of compiled formats.
const BOUNDS: Bounds = Bounds { input_bytes: 8 * KIB, heap_bytes: 256 * MIB, time: Duration::from_secs(20) };

const WORDS: [&str; 40] = [
    "\"type\":",
    "\"object\"",
    "\"array\"",
    "\"string\"",
    "\"integer\"",
    "\"number\"",
    "\"properties\":",
    "\"items\":",
    "\"prefixItems\":",
    "\"additionalProperties\":",
    "\"required\":",
    "\"enum\":",
    "\"const\":",
    "\"minimum\":",
    "\"exclusiveMaximum\":",
    "\"multipleOf\":",
    "\"pattern\":",
    "\"minLength\":",
    "\"maxLength\":",
    "\"minItems\":",
    "\"maxItems\":",
    "\"anyOf\":",
    "\"oneOf\":",
    "\"allOf\":",
    "\"$ref\":",
    "\"#/$defs/p\"",
    "\"$defs\":",
    "\"format\":",
    "\"uniqueItems\":",
    "\"patternProperties\":",
    "{0,100000}",
    "(a|b)*",
    "\\d",
    "[^\\x00-\\xff]",
    "%json ",
    "start: ",
    "%regex ",
    "-9223372036854775808",
    "json_schema\n",
    "lark\n",
];

/// Tokens of an answer.
const MAX_TOKENS: usize = 4;

#[test]
fn format() {
    let model = Model::from_bytes(Path::new("m.gguf"), Arc::new(MODEL.gguf())).unwrap();
    let metrics = EngineMetrics::unregistered().unwrap();
    let config = EngineConfig::default();
    let engine = Engine::start(Arc::new(model), Box::new(Oracle::new()), &config, &metrics).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    fuzz("format", &WORDS, BOUNDS, |input| {
        let (kind, text) = split_line(input);
        let Ok(text) = std::str::from_utf8(text).map(str::to_owned) else { return "not UTF-8".to_owned() };
        let grammar = match kind {
            "regex" => Grammar::Regex(text),
            "lark" => Grammar::Lark(text),
            _ => Grammar::JsonSchema(text),
        };
        let params = GenerateParams { grammar: Some(grammar), ..GenerateParams::greedy("hi", MAX_TOKENS) };
        match engine.submit(&params) {
            Err(error) => error.to_string(),
            Ok(generation) => runtime.block_on(async {
                use futures::StreamExt;
                let events: Vec<_> = generation.collect().await;
                format!(
                    "{:?}",
                    events.last().map(|event| event.as_ref().map(|_| ()).map_err(ToString::to_string))
                )
            }),
        }
    });
}
