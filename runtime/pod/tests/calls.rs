//! Required calls through the whole engine: for every family the grammar of a call is compiled, the answer
//! has its form, and the parser finds the call in it. From a model with random weights, and from a real one.

#![expect(clippy::unwrap_used, reason = "a test ends by panicking")]

use futures::StreamExt;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use trustformers_api::tools::{AnswerParser, AnswerSyntax, CallSyntax, Part, call_grammar};
use trustformers_api::{Conversation, ToolChoice};
use trustformers_cpu::{CpuBackend, CpuConfig};
use trustformers_engine::{
    Engine, EngineConfig, EngineMetrics, FinishReason, GenerateParams, GenerationEvent, Grammar,
};
use trustformers_model::Model;
use trustformers_model::chat::ChatRequest;
use trustformers_model::seeded::SeededModel;
use trustformers_plan::Backend;
use trustformers_plan::oracle::Oracle;

const FILE: &str = "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf";

fn engine(model: Arc<Model>, backend: Box<dyn Backend>) -> Engine {
    let config = EngineConfig { max_batch_size: 8, token_budget: 64, ..EngineConfig::default() };
    Engine::start(model, backend, &config, &EngineMetrics::unregistered().unwrap()).unwrap()
}

fn seeded() -> Engine {
    let file = SeededModel { context_tokens: 1024, ..SeededModel::default() }.gguf();
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

/// Functions whose arguments end soon, whatever the weights are.
fn tools() -> Vec<Value> {
    let parameters = json!({
        "type": "object",
        "properties": {
            "city": {"enum": ["Rome", "Oslo"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "hourly": {"type": "boolean"},
            "place": {
                "type": "object",
                "properties": {"level": {"enum": [1, 2]}},
                "required": ["level"],
                "additionalProperties": false,
            },
        },
        "required": ["city", "days"],
        "additionalProperties": false,
    });
    let empty = json!({"properties": {}, "additionalProperties": false});
    vec![
        json!({"type": "function", "function": {"name": "weather", "parameters": parameters}}),
        json!({"type": "function", "function": {"name": "get-time", "parameters": empty}}),
    ]
}

fn conversation(choice: ToolChoice) -> Conversation {
    let messages = vec![json!({"role": "user", "content": "How is the weather in Rome on the next 3 days?"})];
    Conversation { messages, tools: tools(), tool_choice: choice, ..Conversation::default() }
}

/// The text of an answer, and why it ended.
async fn answer(engine: &Engine, params: &GenerateParams) -> (String, FinishReason) {
    let mut generation = engine.submit(params).unwrap();
    let mut all = String::new();
    while let Some(event) = generation.next().await {
        match event.unwrap() {
            GenerationEvent::Token { text, .. } => all.push_str(&text),
            GenerationEvent::Finished { reason, .. } => return (all, reason),
        }
    }
    panic!("a stream ended without its last event");
}

/// Name and arguments of the calls of an answer that holds nothing else.
fn calls_of(
    syntax: CallSyntax,
    conversation: &Conversation,
    text: &str,
) -> Vec<(String, Map<String, Value>)> {
    let syntax = AnswerSyntax { calls: Some(syntax), reasoning: None };
    let mut parser = AnswerParser::new(syntax, &conversation.tools, &conversation.tool_choice);
    let mut parts = parser.push(text);
    parts.extend(parser.finish());
    assert_eq!(parser.cut_call(), None, "{text}");
    let (mut names, mut arguments) = (Vec::new(), Vec::new());
    for part in parts {
        match part {
            Part::CallBegin { name, .. } => names.push(name),
            Part::CallArguments { text, .. } => arguments.push(text),
            other => panic!("{other:?} in {text:?}"),
        }
    }
    assert_eq!(names.len(), arguments.len(), "{text:?}");
    let parsed = arguments.iter().map(|text| serde_json::from_str(text).unwrap());
    names.into_iter().zip(parsed).collect()
}

fn assert_follows_its_schema(name: &str, arguments: &Map<String, Value>) {
    if name == "get-time" {
        assert!(arguments.is_empty(), "{arguments:?}");
        return;
    }
    let declared = ["city", "days", "hourly", "place"];
    assert!(arguments.keys().all(|key| declared.contains(&key.as_str())), "{arguments:?}");
    assert!(["Rome", "Oslo"].contains(&arguments["city"].as_str().unwrap()), "{arguments:?}");
    assert!((1..=9).contains(&arguments["days"].as_u64().unwrap()), "{arguments:?}");
    assert!(arguments.get("hourly").is_none_or(Value::is_boolean), "{arguments:?}");
    let level = arguments.get("place").map(|place| place["level"].as_u64().unwrap());
    assert!(level.is_none_or(|level| level == 1 || level == 2), "{arguments:?}");
}

/// Requests for one call: greedy and sampled.
fn requests(prompt: &str, grammar: &str) -> Vec<GenerateParams> {
    let grammar = Some(Grammar::Lark(grammar.into()));
    let greedy = GenerateParams { grammar, ..GenerateParams::greedy(prompt, 400) };
    let sampled = |seed| GenerateParams { temperature: 1.5, seed: Some(seed), ..greedy.clone() };
    (0..3).map(sampled).chain([greedy.clone()]).collect()
}

#[tokio::test]
async fn a_required_call_of_every_family_is_found_in_the_answer() {
    let engine = seeded();
    let mut names = Vec::new();
    for syntax in CallSyntax::ALL {
        for choice in [ToolChoice::Required, ToolChoice::Named("weather".into())] {
            let conversation = conversation(choice);
            let grammar = call_grammar(syntax, &conversation).unwrap().unwrap();
            for params in requests("hello", &grammar) {
                let (text, reason) = answer(&engine, &params).await;
                assert_eq!(reason, FinishReason::Stop, "{syntax:?}: {text:?}");
                let calls = calls_of(syntax, &conversation, &text);
                assert_eq!(calls.len(), 1, "{syntax:?}: {text:?}");
                let (name, arguments) = &calls[0];
                assert_follows_its_schema(name, arguments);
                names.push(name.clone());
            }
        }
    }
    assert!(names.contains(&"weather".to_owned()) && names.contains(&"get-time".to_owned()), "{names:?}");
}

#[tokio::test]
async fn strings_and_several_calls_are_written_as_the_parser_reads_them() {
    let engine = seeded();
    let parameters = json!({
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "list": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
            "other": {},
        },
        "required": ["text"],
    });
    let tool = json!({"type": "function", "function": {"name": "say", "parameters": parameters}});
    for syntax in CallSyntax::ALL {
        let conversation = Conversation {
            tools: vec![tool.clone()],
            parallel_tool_calls: true,
            ..conversation(ToolChoice::Required)
        };
        let grammar = call_grammar(syntax, &conversation).unwrap().unwrap();
        for params in requests("hello", &grammar) {
            let (text, reason) = answer(&engine, &params).await;
            // Strings of random weights may not end; what ended must be calls.
            if reason == FinishReason::Stop {
                let calls = calls_of(syntax, &conversation, &text);
                assert!(calls.iter().all(|(name, arguments)| name == "say" && arguments["text"].is_string()));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_model_calls_the_function_that_fits() {
    let Some(engine) = real() else { return };
    for choice in [ToolChoice::Required, ToolChoice::Named("weather".into())] {
        let conversation = conversation(choice);
        let model = engine.model();
        let request = ChatRequest {
            messages: &conversation.messages,
            tools: &conversation.tools,
            add_generation_prompt: true,
            variables: &conversation.variables,
            now: SystemTime::UNIX_EPOCH,
        };
        let prompt = model.chat().unwrap().render(&request).unwrap();
        let source = model.facts().chat_template.as_deref().unwrap();
        let detected = AnswerSyntax::detect(source, &prompt);
        assert_eq!(detected, AnswerSyntax { calls: Some(CallSyntax::Hermes), reasoning: None });
        let grammar = call_grammar(CallSyntax::Hermes, &conversation).unwrap().unwrap();
        let grammar = Some(Grammar::Lark(grammar.as_str().into()));
        let params = GenerateParams { grammar, ..GenerateParams::greedy(prompt.as_str(), 200) };
        let (text, reason) = answer(&engine, &params).await;
        assert_eq!(reason, FinishReason::Stop, "{text}");
        let calls = calls_of(CallSyntax::Hermes, &conversation, &text);
        assert_eq!((calls.len(), calls[0].0.as_str()), (1, "weather"), "{text}");
        assert_follows_its_schema(&calls[0].0, &calls[0].1);
        assert_eq!(calls[0].1["city"], "Rome", "{text}");
    }
}
