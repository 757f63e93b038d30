//! Tests of both routes over the fake server of models: each rule that a client relies on.

use axum::body::Body;
use axum::http::{Request as HttpRequest, StatusCode};
use serde_json::{Value, json};
use tower::ServiceExt;

use crate::fake::{Fake, Script};
use crate::revision::{DIGEST_HEADER, REVISION_HEADER};
use crate::test_client::{self, Reply};
use crate::tools::{AnswerSyntax, CallSyntax, ReasoningSyntax};
use crate::{ApiError, FinishReason, Prompt, StoppedBy};

/// With the headers and the query of Anthropic's clients.
async fn send(fake: &Fake, path: &str, body: &Value) -> Reply {
    send_with(fake, path, body, &[]).await
}

async fn send_with(fake: &Fake, path: &str, body: &Value, headers: &[(&str, &str)]) -> Reply {
    let request = HttpRequest::post(format!("{path}?beta=true"))
        .header("x-api-key", "any")
        .header("anthropic-version", "2023-06-01")
        .header("anthropic-beta", "interleaved-thinking-2025-05-14");
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    test_client::send(fake, request, body.to_string()).await
}

async fn whole(script: Script, more: Value) -> Value {
    let reply = send(&Fake::with(script), "/v1/messages", &request(more)).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    reply.json()
}

async fn stream(script: Script, more: Value) -> Vec<Value> {
    let mut body = request(more);
    body["stream"] = json!(true);
    send(&Fake::with(script), "/v1/messages", &body).await.events()
}

fn request(more: Value) -> Value {
    let Value::Object(more) = more else { panic!("{more}") };
    let mut body =
        json!({"model": "fake", "max_tokens": 64, "messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut().unwrap().extend(more);
    body
}

fn hermes() -> AnswerSyntax {
    AnswerSyntax { calls: Some(CallSyntax::Hermes), reasoning: Some(ReasoningSyntax::default()) }
}

fn weather() -> Value {
    json!({"tools": [{"name": "weather",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]})
}

/// An answer with reasoning, a text and a call.
fn all_kinds() -> Script {
    let call = r#"<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>"#;
    Script::tokens(&["<think>", "Hm.", "</think>", "\n\n", "Let me ", "look.", call]).with_syntax(hermes())
}

/// What a client makes of the events: blocks from their starts and deltas, the rest from `message_delta`.
fn accumulate(events: &[Value]) -> Value {
    let mut message = Value::Null;
    let mut json_texts: Vec<String> = Vec::new();
    for event in events {
        let index = event["index"].as_u64().and_then(|index| usize::try_from(index).ok());
        match event["type"].as_str().unwrap() {
            "message_start" => message = event["message"].clone(),
            "content_block_start" => {
                let blocks = message["content"].as_array_mut().unwrap();
                assert_eq!(index, Some(blocks.len()), "blocks are numbered in order");
                blocks.push(event["content_block"].clone());
                json_texts.push(String::new());
            }
            "content_block_delta" => {
                let delta = &event["delta"];
                let block = &mut message["content"][index.unwrap()];
                let (key, add) = match delta["type"].as_str().unwrap() {
                    "text_delta" => ("text", &delta["text"]),
                    "thinking_delta" => ("thinking", &delta["thinking"]),
                    "signature_delta" => ("signature", &delta["signature"]),
                    "input_json_delta" => {
                        json_texts[index.unwrap()].push_str(delta["partial_json"].as_str().unwrap());
                        continue;
                    }
                    other => panic!("{other}"),
                };
                block[key] = json!(format!("{}{}", block[key].as_str().unwrap(), add.as_str().unwrap()));
            }
            "content_block_stop" => {
                let text = &json_texts[index.unwrap()];
                if !text.is_empty() {
                    message["content"][index.unwrap()]["input"] = serde_json::from_str(text).unwrap();
                }
            }
            "message_delta" => {
                message["stop_reason"] = event["delta"]["stop_reason"].clone();
                message["stop_sequence"] = event["delta"]["stop_sequence"].clone();
                message["usage"] = event["usage"].clone();
            }
            "ping" | "message_stop" => {}
            other => panic!("{other}"),
        }
    }
    message
}

/// A message without the ids of its calls.
fn without_ids(mut message: Value) -> Value {
    for block in message["content"].as_array_mut().unwrap() {
        if block.get("id").is_some() {
            block["id"] = Value::Null;
        }
    }
    message
}

#[tokio::test]
async fn a_whole_answer_has_anthropics_fields() {
    let fake = Fake::with(Script::tokens(&["Hello", " you"]));
    let reply = send(&fake, "/v1/messages", &request(json!({}))).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    assert_eq!(reply.headers[DIGEST_HEADER], "d1");
    assert_eq!(reply.headers["request-id"], reply.headers["x-request-id"]);
    assert_eq!(
        reply.json(),
        json!({
            "id": "msg_1", "type": "message", "role": "assistant", "model": "fake",
            "content": [{"type": "text", "text": "Hello you"}],
            "stop_reason": "end_turn", "stop_sequence": null,
            "usage": {"input_tokens": 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0,
                "output_tokens": 2},
        })
    );
    let asked = fake.last_request();
    assert_eq!((asked.max_tokens, asked.temperature, asked.top_p), (64, 1.0, 1.0));
    assert!(matches!(asked.prompt, Prompt::Conversation(_)));
}

#[tokio::test]
async fn a_stream_of_text_has_its_events_in_order() {
    let events = stream(Script::tokens(&["Hel", "lo"]), json!({})).await;
    let types: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    assert_eq!(
        types,
        [
            "message_start",
            "ping",
            "content_block_start",
            "content_block_delta",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
    );
    let message = &events[0]["message"];
    assert_eq!(
        (&message["content"], &message["stop_reason"], &message["usage"]["input_tokens"]),
        (&json!([]), &Value::Null, &json!(3))
    );
    assert_eq!(events[2]["content_block"], json!({"type": "text", "text": ""}));
    assert_eq!(events[3]["delta"], json!({"type": "text_delta", "text": "Hel"}));
    assert_eq!(events[6]["delta"], json!({"stop_reason": "end_turn", "stop_sequence": null}));
    assert_eq!(events[6]["usage"]["output_tokens"], 2);
}

#[tokio::test]
async fn thinking_text_and_calls_are_blocks_of_their_own_in_both_forms() {
    let message = whole(all_kinds(), weather()).await;
    let content = &message["content"];
    assert_eq!(content[0], json!({"type": "thinking", "thinking": "Hm.", "signature": ""}));
    assert_eq!(content[1]["text"].as_str().map(str::trim), Some("Let me look."));
    assert_eq!(
        (&content[2]["type"], &content[2]["name"], &content[2]["input"]),
        (&json!("tool_use"), &json!("weather"), &json!({"city": "Bern"}))
    );
    assert_eq!((&message["stop_reason"], content.as_array().unwrap().len()), (&json!("tool_use"), 3));

    let events = stream(all_kinds(), weather()).await;
    let start = events.iter().find(|event| event["content_block"]["type"] == "tool_use").unwrap();
    assert_eq!(start["content_block"]["input"], json!({}));
    let signed = events.iter().position(|event| event["delta"]["type"] == "signature_delta").unwrap();
    assert_eq!(events[signed + 1]["type"], "content_block_stop");
    assert_eq!(without_ids(accumulate(&events)), without_ids(message));
}

#[tokio::test]
async fn thinking_can_be_hidden() {
    let more = json!({"thinking": {"type": "adaptive", "display": "omitted"}});
    let script = || Script::tokens(&["<think>", "Hm.", "</think>", "Yes."]).with_syntax(hermes());
    let message = whole(script(), more.clone()).await;
    assert_eq!(message["content"][0], json!({"type": "thinking", "thinking": "", "signature": ""}));
    assert_eq!(accumulate(&stream(script(), more).await), message);
}

#[tokio::test]
async fn what_an_answer_gives_can_be_sent_back() {
    let content = whole(all_kinds(), weather()).await["content"].clone();
    let result = json!({"type": "tool_result", "tool_use_id": content[2]["id"], "content": "sunny"});
    let messages = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": content},
        {"role": "user", "content": [result]},
    ]);
    let fake = Fake::with(Script::tokens(&["Sunny."]));
    let reply = send(&fake, "/v1/messages", &request(json!({"messages": messages}))).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    let Prompt::Conversation(conversation) = fake.last_request().prompt else { panic!("no conversation") };
    let roles: Vec<&Value> = conversation.messages.iter().map(|message| &message["role"]).collect();
    assert_eq!(roles, ["user", "assistant", "tool"]);
    assert_eq!(conversation.messages[1]["reasoning_content"], "Hm.");
    assert_eq!(conversation.messages[2]["name"], "weather");
}

#[tokio::test]
async fn every_end_has_its_stop_reason() {
    let stopped = || Script::tokens(&["a"]).stopped_by(StoppedBy::Text("END".into()));
    let call = r#"<tool_call>{"name": "weather", "arguments": {}}</tool_call>"#;
    for (script, reason, sequence) in [
        (Script::tokens(&["a"]), "end_turn", Value::Null),
        (Script::tokens(&["a"]).ends_with(FinishReason::Length), "max_tokens", Value::Null),
        (stopped(), "stop_sequence", json!("END")),
        (Script::tokens(&["a"]).stopped_by(StoppedBy::Token(7)), "end_turn", Value::Null),
        (Script::tokens(&[call]).with_syntax(hermes()), "tool_use", Value::Null),
        // A stop text that ends an answer after a whole call does not take the call away.
        (
            Script::tokens(&[call]).with_syntax(hermes()).stopped_by(StoppedBy::Text("END".into())),
            "tool_use",
            Value::Null,
        ),
        (
            Script::tokens(&[call]).with_syntax(hermes()).ends_with(FinishReason::Length),
            "max_tokens",
            Value::Null,
        ),
    ] {
        let message = whole(script.clone(), weather()).await;
        assert_eq!((&message["stop_reason"], &message["stop_sequence"]), (&json!(reason), &sequence));
        let streamed = accumulate(&stream(script, weather()).await);
        assert_eq!(without_ids(streamed), without_ids(message));
    }
}

#[tokio::test]
async fn an_answer_without_text_is_one_empty_block() {
    let message = whole(Script::tokens(&[""]), json!({})).await;
    assert_eq!(message["content"], json!([{"type": "text", "text": ""}]));
    assert_eq!(accumulate(&stream(Script::tokens(&[""]), json!({})).await), message);
}

#[tokio::test]
async fn half_a_call_is_no_call() {
    let script = Script::tokens(&[r#"<tool_call>{"name": "weather", "arguments": {"ci"#])
        .with_syntax(hermes())
        .ends_with(FinishReason::Length);
    let message = whole(script, weather()).await;
    assert_eq!(message["stop_reason"], "max_tokens");
    assert!(!message["content"].to_string().contains("tool_use"), "{message}");
}

#[tokio::test]
async fn tokens_are_counted_over_the_whole_conversation() {
    let fake = Fake::with(Script::default());
    let body = json!({"model": "fake", "system": "Be short.", "messages": [{"role": "user", "content": "Hi"}],
        "tools": weather()["tools"], "thinking": {"type": "enabled", "budget_tokens": 1024}});
    let reply = send(&fake, "/v1/messages/count_tokens", &body).await;
    assert_eq!((reply.status, reply.json()), (StatusCode::OK, json!({"input_tokens": 2})));
    let counted = fake.last_count();
    assert_eq!(counted.model.as_deref(), Some("fake"));
    assert_eq!(counted.revision, None);
    let Prompt::Conversation(conversation) = counted.prompt else { panic!("no conversation") };
    assert_eq!(conversation.tools.len(), 1);
}

#[tokio::test]
async fn a_count_asks_the_revision_that_the_request_names() {
    let fake = Fake::with(Script::default());
    let body = json!({"messages": [{"role": "user", "content": "Hi"}]});
    let path = "/v1/messages/count_tokens";
    let reply = send_with(&fake, path, &body, &[(REVISION_HEADER, "r1")]).await;
    assert_eq!((reply.status, fake.last_count().revision.as_deref()), (StatusCode::OK, Some("r1")));
    let unknown = ApiError::UnknownRevision { model: "fake".into(), asked: "r0".into(), loaded: "r1".into() };
    let reply =
        send_with(&Fake::with(Script::refused(unknown)), path, &body, &[(REVISION_HEADER, "r0")]).await;
    let error = reply.json()["error"].clone();
    assert_eq!((reply.status, &error["type"]), (StatusCode::NOT_FOUND, &json!("not_found_error")));
}

#[tokio::test]
async fn errors_have_anthropics_shape_before_and_inside_a_stream() {
    let reply =
        send(&Fake::with(Script::tokens(&["a"])), "/v1/messages", &request(json!({"max_tokens": null})))
            .await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST);
    let body = reply.json();
    assert_eq!((&body["type"], &body["error"]["type"]), (&json!("error"), &json!("invalid_request_error")));
    assert!(body["error"]["message"].as_str().unwrap().starts_with("max_tokens: is missing"), "{body}");
    assert_eq!(body["request_id"].as_str(), reply.headers["request-id"].to_str().ok());

    let refused = ApiError::Overloaded { message: "full".into(), retry_after_s: 2 };
    for script in [Script::refused(refused.clone()), Script::fails_before_a_token(refused)] {
        let reply = send(&Fake::with(script), "/v1/messages", &request(json!({"stream": true}))).await;
        assert_eq!(reply.status.as_u16(), 529);
        assert_eq!(reply.json()["error"]["type"], "overloaded_error");
        assert_eq!(reply.headers["retry-after"], "2");
    }

    let error = ApiError::Internal { message: "device lost".into() };
    let events = stream(Script::tokens(&["a"]).then_fails(error), json!({})).await;
    let last = events.last().unwrap();
    assert_eq!(*last, json!({"type": "error", "error": {"type": "api_error", "message": "device lost"}}));
}

#[tokio::test]
async fn leaving_a_stream_cancels_its_work() {
    let fake = Fake::with(Script::tokens(&["a"]).then_hangs());
    let body = Body::from(request(json!({"stream": true})).to_string());
    let request = HttpRequest::post("/v1/messages").body(body).unwrap();
    let response = crate::http::router(fake.api()).oneshot(request).await.unwrap();
    assert_eq!(fake.running(), 1);
    drop(response);
    assert_eq!(fake.running(), 0);
}
