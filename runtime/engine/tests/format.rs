//! Structured output through the whole engine: every answer has its format, greedy and sampled, alone and in
//! a batch, from a model with random weights and from a real one.

#![expect(clippy::unwrap_used, reason = "a test ends by panicking")]

use futures::StreamExt;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use trustformers_cpu::{CpuBackend, CpuConfig};
use trustformers_engine::{
    Engine, EngineConfig, EngineMetrics, FinishReason, GenerateParams, GenerationEvent, Grammar, StopCause,
};
use trustformers_model::Model;
use trustformers_model::seeded::SeededModel;
use trustformers_plan::Backend;
use trustformers_plan::oracle::Oracle;

const FILE: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// A schema, and whether a value satisfies it.
struct SchemaCase {
    schema: &'static str,
    holds: fn(&Value) -> bool,
}

const CASES: &[SchemaCase] = &[
    SchemaCase {
        schema: r#"{"type": "object", "additionalProperties": false, "required": ["name", "age", "tags"],
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 12},
                "age": {"type": "integer", "minimum": 0, "maximum": 120},
                "tags": {"type": "array", "maxItems": 3, "items": {"enum": ["red", "green", "blue"]}}}}"#,
        holds: |value| {
            let object = value.as_object().unwrap();
            let letters = value["name"].as_str().unwrap().chars().count();
            let tags = value["tags"].as_array().unwrap();
            object.len() == 3
                && (1..=12).contains(&letters)
                && value["age"].as_u64().unwrap() <= 120
                && tags.len() <= 3
                && tags.iter().all(|tag| ["red", "green", "blue"].contains(&tag.as_str().unwrap()))
        },
    },
    SchemaCase {
        schema: r##"{"$defs": {"point": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}],
            "minItems": 2, "items": false}}, "type": "array", "minItems": 1, "maxItems": 2,
            "items": {"$ref": "#/$defs/point"}}"##,
        holds: |value| {
            let points = value.as_array().unwrap();
            let is_point = |point: &Value| point[0].is_boolean() && point[1].is_null();
            (1..=2).contains(&points.len())
                && points.iter().all(|point| point.as_array().unwrap().len() == 2 && is_point(point))
        },
    },
    SchemaCase {
        schema: r#"{"anyOf": [{"const": {"kind": "none"}}, {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            {"type": "integer", "multipleOf": 5, "minimum": 5, "maximum": 95}]}"#,
        holds: |value| match value {
            Value::Object(_) => value["kind"] == "none",
            Value::String(text) => {
                text.len() == 6
                    && text[..2].bytes().all(|b| b.is_ascii_uppercase())
                    && text[3..].bytes().all(|b| b.is_ascii_digit())
            }
            _ => value.as_u64().is_some_and(|n| n % 5 == 0 && (5..=95).contains(&n)),
        },
    },
];

fn engine(model: Arc<Model>, backend: Box<dyn Backend>) -> Engine {
    let config = EngineConfig { max_batch_size: 8, token_budget: 64, ..EngineConfig::default() };
    Engine::start(model, backend, &config, &EngineMetrics::unregistered().unwrap()).unwrap()
}

fn seeded() -> Engine {
    let file = SeededModel::default().gguf();
    let model = Model::from_bytes(Path::new("seeded.gguf"), Arc::new(file)).unwrap();
    engine(Arc::new(model), Box::new(Oracle::new()))
}

/// The real model, or `None` with a printed reason where it may be missing.
fn real() -> Option<Engine> {
    let set = |name| std::env::var_os(name).map(PathBuf::from);
    let folder = set("TRUSTFORMERS_MODELS").or_else(|| {
        let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
        Some(cache.join("trustformers").join("models"))
    });
    let path = folder.unwrap_or_default().join(FILE);
    if !path.exists() {
        let reason = format!("{} is missing: get it with `make models`", path.display());
        assert!(std::env::var_os("TRUSTFORMERS_REQUIRE_MODELS").is_none_or(|v| v != "1"), "{reason}");
        println!("skipped: {reason}");
        return None;
    }
    let model = Model::load(&path, &mut |_| {}).unwrap();
    Some(engine(Arc::new(model), Box::new(CpuBackend::new(CpuConfig::default()).unwrap())))
}

#[derive(Debug, PartialEq)]
struct Collected {
    ids: Vec<u32>,
    text: String,
    reason: FinishReason,
    stop: Option<StopCause>,
}

async fn answer(engine: &Engine, params: &GenerateParams) -> Collected {
    let mut generation = engine.submit(params).unwrap();
    let (mut ids, mut all) = (Vec::new(), String::new());
    while let Some(event) = generation.next().await {
        match event.unwrap() {
            GenerationEvent::Token { id, text, .. } => {
                ids.push(id);
                all.push_str(&text);
            }
            GenerationEvent::Finished { reason, stop, .. } => {
                return Collected { ids, text: all, reason, stop };
            }
        }
    }
    panic!("a stream ended without its last event");
}

/// Requests for each case, greedy and sampled with several settings.
fn requests(prompt: &str, max_tokens: usize) -> Vec<(&'static SchemaCase, GenerateParams)> {
    let mut all = Vec::new();
    for case in CASES {
        let base = GenerateParams {
            grammar: Some(Grammar::JsonSchema(case.schema.into())),
            ..GenerateParams::greedy(prompt, max_tokens)
        };
        for seed in 0..3 {
            let sampled = GenerateParams { temperature: 1.0, seed: Some(seed), ..base.clone() };
            all.push((case, GenerateParams { top_p: 0.9, ..sampled.clone() }));
            all.push((case, GenerateParams { top_k: 20, repetition_penalty: 1.2, ..sampled }));
        }
        all.push((case, base));
    }
    all
}

async fn all_satisfy(engine: &Engine, prompt: &str, max_tokens: usize) {
    let requests = requests(prompt, max_tokens);
    let answers = futures::future::join_all(requests.iter().map(|(_, params)| answer(engine, params))).await;
    for ((case, params), answer) in requests.iter().zip(&answers) {
        assert_eq!(answer.reason, FinishReason::Stop, "{params:?}: {answer:?}");
        let value: Value = serde_json::from_str(&answer.text).unwrap();
        assert!((case.holds)(&value), "{}: {}", case.schema, answer.text);
    }
    let different: std::collections::HashSet<&str> = answers.iter().map(|a| a.text.as_str()).collect();
    assert!(different.len() > answers.len() / 3, "the answers hardly differ: {different:?}");
}

#[tokio::test]
async fn random_weights_answer_within_every_schema() {
    all_satisfy(&seeded(), "hello", 240).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_model_answers_within_every_schema() {
    let Some(engine) = real() else { return };
    let prompt = "<|im_start|>user\nDescribe Anna in JSON.<|im_end|>\n<|im_start|>assistant\n";
    all_satisfy(&engine, prompt, 240).await;
}

#[tokio::test]
async fn formats_hold_and_a_batch_changes_no_answer() {
    let engine = seeded();
    let lark = "start: greeting \" \" name \"!\"\ngreeting: \"hello\" | \"bye\"\nname: /[a-z]{2,5}/\n";
    let format = |grammar, seed| GenerateParams {
        grammar: Some(grammar),
        temperature: 1.5,
        seed: Some(seed),
        ..GenerateParams::greedy("hello", 60)
    };
    let requests: Vec<GenerateParams> = (0..4)
        .flat_map(|seed| {
            [
                format(Grammar::Regex("(ab|[0-9]{2}){3}".into()), seed),
                format(Grammar::Lark(lark.into()), seed),
                GenerateParams { grammar: None, ..format(Grammar::JsonObject, seed) },
            ]
        })
        .collect();
    let mut alone = Vec::new();
    for params in &requests {
        alone.push(answer(&engine, params).await);
    }
    let together = futures::future::join_all(requests.iter().map(|params| answer(&engine, params))).await;
    assert_eq!(alone, together);
    for (params, answer) in requests.iter().zip(&alone) {
        match &params.grammar {
            Some(Grammar::Regex(_)) => {
                let pairs: Vec<&[u8]> = answer.text.as_bytes().chunks(2).collect();
                let fits = |pair: &[u8]| pair == b"ab" || pair.iter().all(u8::is_ascii_digit);
                assert!(pairs.len() == 3 && pairs.into_iter().all(fits), "{answer:?}");
            }
            Some(_) => {
                let (greeting, name) = answer.text.strip_suffix('!').unwrap().split_once(' ').unwrap();
                assert!(["hello", "bye"].contains(&greeting) && (2..=5).contains(&name.len()), "{answer:?}");
            }
            None => {}
        }
    }
}

#[tokio::test]
async fn an_answer_ends_with_its_grammar_without_an_end_token() {
    let engine = seeded();
    let params =
        GenerateParams { grammar: Some(Grammar::Regex("hello".into())), ..GenerateParams::greedy("x", 20) };
    let got = answer(&engine, &params).await;
    assert_eq!((got.text.as_str(), got.reason, &got.stop), ("hello", FinishReason::Stop, &None));
    assert_eq!(
        got.ids,
        engine.model().tokenizer().encode("hello").unwrap(),
        "the tokens of the model's own tokenizer"
    );
    let short = answer(&engine, &GenerateParams { max_tokens: 1, ..params }).await;
    assert!("hello".starts_with(&short.text));
}

#[tokio::test]
async fn stop_texts_end_an_answer_inside_a_grammar() {
    let engine = seeded();
    let params = GenerateParams {
        grammar: Some(Grammar::Regex("ab+END.*".into())),
        logit_bias: vec![(engine.model().tokenizer().encode("E").unwrap()[0], 20.0)],
        stop: vec!["END".into()],
        ..GenerateParams::greedy("x", 200)
    };
    let got = answer(&engine, &params).await;
    assert!(got.text.starts_with("ab") && !got.text.contains('E'), "{got:?}");
    assert_eq!((got.reason, got.stop), (FinishReason::Stop, Some(StopCause::Text("END".into()))));
}

#[test]
fn a_refused_format_leaves_no_request_in_flight() {
    let engine = seeded();
    for (grammar, words) in [
        (Grammar::Lark("start: nowhere".into()), "the grammar cannot be compiled: "),
        (
            Grammar::JsonSchema(r#"{"const": -9223372036854775808}"#.into()),
            "\"const\" at \"/\": -9223372036854775808",
        ),
        (Grammar::Regex("a\\".into()), "the regular expression cannot be compiled: "),
    ] {
        let params = GenerateParams { grammar: Some(grammar), ..GenerateParams::greedy("x", 5) };
        let error = engine.submit(&params).unwrap_err().to_string();
        assert!(error.starts_with("response_format: ") && error.contains(words), "{error}");
        assert_eq!(engine.in_flight(), 0);
    }
}
