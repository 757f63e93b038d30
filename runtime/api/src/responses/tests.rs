//! Tests of the route over the fake server of models: each rule that a client relies on.

use axum::body::Body;
use axum::http::{Request as HttpRequest, StatusCode};
use serde_json::{Map, Value, json};
use tower::ServiceExt;

use crate::budget::Caller;
use crate::fake::{Fake, Script};
use crate::limits::Limits;
use crate::revision::{DIGEST_HEADER, REVISION_HEADER};
use crate::test_client::{self, Reply};
use crate::tools::{AnswerSyntax, CallSyntax, ReasoningSyntax};
use crate::{ApiError, FinishReason, Priority, Prompt};

/// Every field of a response object that the Open Responses specification or openai-python requires.
const REQUIRED: &[&str] = &[
    "id",
    "object",
    "created_at",
    "completed_at",
    "status",
    "incomplete_details",
    "model",
    "previous_response_id",
    "instructions",
    "output",
    "error",
    "tools",
    "tool_choice",
    "truncation",
    "parallel_tool_calls",
    "text",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "top_logprobs",
    "temperature",
    "reasoning",
    "usage",
    "max_output_tokens",
    "max_tool_calls",
    "store",
    "background",
    "service_tier",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
];

/// The events of a stream, whose numbers have no gaps and after which `[DONE]` says that all was sent.
#[track_caller]
fn events(reply: &Reply) -> Vec<Value> {
    let events = reply.events();
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number);
    }
    let complete =
        |event: &Value| event["type"] == "response.completed" || event["type"] == "response.incomplete";
    assert_eq!(events.last().is_some_and(complete), reply.is_done(), "{}", reply.text);
    events
}

async fn send(fake: &Fake, body: &Value) -> Reply {
    let request = HttpRequest::post("/v1/responses")
        .header("authorization", "Bearer sk-any")
        .header("x-trustformers-priority", "low");
    test_client::send(fake, request, body.to_string()).await
}

async fn stream(script: Script, more: Value) -> Vec<Value> {
    let mut body = request(more);
    body["stream"] = json!(true);
    events(&send(&Fake::with(script), &body).await)
}

fn request(more: Value) -> Value {
    let Value::Object(more) = more else { panic!("{more}") };
    let mut body = Map::from_iter([("input".to_owned(), json!("Hi"))]);
    body.extend(more);
    body.into()
}

fn hermes() -> AnswerSyntax {
    AnswerSyntax { calls: Some(CallSyntax::Hermes), reasoning: Some(ReasoningSyntax::default()) }
}

fn weather() -> Value {
    json!({"tools": [{"type": "function", "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]})
}

/// An answer with reasoning, a text and a call.
fn all_kinds() -> Script {
    let call = r#"<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}</tool_call>"#;
    Script::tokens(&["<think>", "Hm.", "</think>", "\n\n", "Let me ", "look.", call]).with_syntax(hermes())
}

fn types(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}

/// A response object without what differs from answer to answer.
fn without_ids(mut response: Value) -> Value {
    response["completed_at"] = Value::Null;
    for item in response["output"].as_array_mut().unwrap() {
        item["id"] = Value::Null;
        if item.get("call_id").is_some() {
            item["call_id"] = Value::Null;
        }
    }
    response
}

#[tokio::test]
async fn a_whole_answer_has_every_field_that_clients_require() {
    let fake = Fake::with(Script::tokens(&["Hello", " you"]));
    let reply = send(&fake, &request(json!({"model": "fake", "metadata": {"k": "v"}}))).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    assert_eq!(reply.headers[REVISION_HEADER], "r1");
    assert_eq!(reply.headers[DIGEST_HEADER], "d1");
    assert_eq!(reply.headers["content-type"], "application/json");
    let response = reply.json();
    for field in REQUIRED {
        assert!(response.get(field).is_some(), "{field}: {response}");
    }
    assert_eq!((&response["id"], &response["object"]), (&json!("resp_1"), &json!("response")));
    assert_eq!((&response["status"], &response["store"]), (&json!("completed"), &json!(false)));
    assert_eq!((&response["created_at"], &response["model"]), (&json!(1_700_000_000), &json!("fake")));
    assert!(response["completed_at"].is_u64());
    let item = &response["output"][0];
    assert!(item["id"].as_str().unwrap().starts_with("msg_"));
    let part = json!({"type": "output_text", "text": "Hello you", "annotations": [], "logprobs": []});
    assert_eq!(
        (&item["type"], &item["role"], &item["status"], &item["content"]),
        (&json!("message"), &json!("assistant"), &json!("completed"), &json!([part]))
    );
    assert_eq!(
        response["usage"],
        json!({
            "input_tokens": 3, "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 2, "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 5,
        })
    );
    let asked = fake.last_request();
    assert_eq!((asked.max_tokens, asked.temperature, asked.top_p), (u32::MAX, 1.0, 1.0));
    assert_eq!((asked.model.as_deref(), asked.priority), (Some("fake"), Priority::Low));
    assert!(matches!(asked.prompt, Prompt::Conversation(_)));
}

#[tokio::test]
async fn a_stream_of_text_has_its_events_in_order() {
    let events = stream(Script::tokens(&["Hel", "lo"]), json!({})).await;
    assert_eq!(
        types(&events),
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
    );
    let created = &events[0]["response"];
    assert_eq!(
        (&created["status"], &created["output"], &created["usage"]),
        (&json!("in_progress"), &json!([]), &Value::Null)
    );
    let id = &events[2]["item"]["id"];
    assert_eq!(
        (&events[2]["item"]["status"], &events[2]["item"]["content"]),
        (&json!("in_progress"), &json!([]))
    );
    for event in &events[3..8] {
        assert_eq!(
            (&event["item_id"], &event["output_index"], &event["content_index"]),
            (id, &json!(0), &json!(0))
        );
    }
    assert_eq!((&events[4]["delta"], &events[4]["logprobs"]), (&json!("Hel"), &json!([])));
    assert_eq!((&events[6]["text"], &events[7]["part"]["text"]), (&json!("Hello"), &json!("Hello")));
    let response = &events[9]["response"];
    assert_eq!((&response["output"][0], &response["output"][0]["id"]), (&events[8]["item"], id));
    assert_eq!(response["usage"]["total_tokens"], 5);
}

#[tokio::test]
async fn reasoning_text_and_calls_are_items_of_their_own() {
    let events = stream(all_kinds(), weather()).await;
    let of_item = |index: u64| -> Vec<&str> {
        let of = |event: &&Value| event["output_index"] == index;
        events.iter().filter(of).map(|event| event["type"].as_str().unwrap()).collect()
    };
    assert_eq!(
        of_item(0),
        [
            "response.output_item.added",
            "response.content_part.added",
            "response.reasoning_text.delta",
            "response.reasoning_text.done",
            "response.content_part.done",
            "response.output_item.done",
        ]
    );
    let call = of_item(2);
    assert_eq!(call.first(), Some(&"response.output_item.added"));
    assert_eq!(
        call[call.len() - 2..],
        ["response.function_call_arguments.done", "response.output_item.done"]
    );
    assert!(call[1..call.len() - 2].iter().all(|kind| *kind == "response.function_call_arguments.delta"));
    let deltas: String = events
        .iter()
        .filter(|event| event["type"] == "response.function_call_arguments.delta")
        .map(|event| event["delta"].as_str().unwrap())
        .collect();
    let done = events.iter().find(|event| event["type"] == "response.function_call_arguments.done").unwrap();
    assert_eq!((&done["name"], &done["arguments"]), (&json!("weather"), &json!(deltas)));
    assert_eq!(serde_json::from_str::<Value>(&deltas).unwrap(), json!({"city": "Bern"}));

    let response = &events.last().unwrap()["response"];
    let output = response["output"].as_array().unwrap();
    let kinds: Vec<&Value> = output.iter().map(|item| &item["type"]).collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call"]);
    assert_eq!(output[0]["content"], json!([{"type": "reasoning_text", "text": "Hm."}]));
    assert_eq!(
        (&output[0]["summary"], output[1]["content"][0]["text"].as_str().map(str::trim)),
        (&json!([]), Some("Let me look."))
    );
    assert!(output[2]["id"].as_str().unwrap().starts_with("fc_"));
    assert!(output[2]["call_id"].as_str().unwrap().starts_with("call_"));
    assert_eq!(response["status"], "completed");
    assert!(response["usage"]["output_tokens_details"]["reasoning_tokens"].as_u64() > Some(0));

    let whole = send(&Fake::with(all_kinds()), &request(weather())).await.json();
    assert_eq!(without_ids(whole), without_ids(response.clone()));
}

#[tokio::test]
async fn what_an_answer_gives_can_be_sent_back() {
    let output = send(&Fake::with(all_kinds()), &request(weather())).await.json()["output"].clone();
    let mut input = vec![json!({"role": "user", "content": "Weather?"})];
    input.extend(output.as_array().unwrap().clone());
    let call_id = &output[2]["call_id"];
    input.push(json!({"type": "function_call_output", "call_id": call_id, "output": "sunny"}));
    let fake = Fake::with(Script::tokens(&["Sunny."]));
    let reply = send(&fake, &request(json!({"input": input}))).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    let Prompt::Conversation(conversation) = fake.last_request().prompt else { panic!("no conversation") };
    let assistant = &conversation.messages[1];
    assert_eq!(assistant["reasoning_content"], "Hm.");
    assert_eq!(
        assistant["tool_calls"][0]["function"],
        json!({"name": "weather", "arguments": {"city": "Bern"}})
    );
    assert_eq!(conversation.messages[2]["content"], "sunny");
}

#[tokio::test]
async fn a_limit_makes_an_answer_incomplete() {
    let script = || Script::tokens(&["Hel"]).ends_with(FinishReason::Length);
    let whole = send(&Fake::with(script()), &request(json!({"max_output_tokens": 16}))).await.json();
    assert_eq!((&whole["status"], &whole["completed_at"]), (&json!("incomplete"), &Value::Null));
    assert_eq!(whole["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(
        (&whole["output"][0]["status"], &whole["max_output_tokens"]),
        (&json!("incomplete"), &json!(16))
    );
    let events = stream(script(), json!({})).await;
    assert_eq!(events.last().unwrap()["type"], "response.incomplete");
}

#[tokio::test]
async fn an_answer_without_text_has_an_empty_message() {
    let events = stream(Script::tokens(&[""]), json!({})).await;
    assert!(!types(&events).contains(&"response.output_text.delta"));
    assert_eq!(events.last().unwrap()["response"]["output"][0]["content"][0]["text"], "");
}

#[tokio::test]
async fn log_probabilities_come_with_their_text() {
    let wanted = json!({"include": ["message.output_text.logprobs"], "top_logprobs": 1});
    let events = stream(Script::tokens(&["a", "b"]).with_logprobs(), wanted).await;
    let top = json!({"token": "t7", "logprob": -0.25, "bytes": [116, 55]});
    let token = |id: u8| {
        let bytes = [b't', b'0' + id];
        json!({"token": format!("t{id}"), "logprob": -0.5, "bytes": bytes, "top_logprobs": [top]})
    };
    let deltas: Vec<&Value> = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .map(|event| &event["logprobs"])
        .collect();
    assert_eq!(deltas, [&json!([token(0)]), &json!([token(1)])]);
    let part = &events.last().unwrap()["response"]["output"][0]["content"][0];
    assert_eq!(part["logprobs"], json!([token(0), token(1)]));
}

#[tokio::test]
async fn a_failure_after_the_first_token_ends_the_stream_without_done() {
    let error = ApiError::Internal { message: "device lost".into() };
    let events = stream(Script::tokens(&["Hel"]).then_fails(error.clone()), json!({})).await;
    let [.., first, last] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!(
        (&first["type"], &first["message"], &first["error"]["message"]),
        (&json!("error"), &json!("device lost"), &json!("device lost"))
    );
    let response = &last["response"];
    assert_eq!((&last["type"], &response["status"]), (&json!("response.failed"), &json!("failed")));
    assert_eq!(response["error"], json!({"code": "server_error", "message": "device lost"}));
    assert_eq!(response["output"][0]["content"][0]["text"], "Hel");
    assert_eq!(response["output"][0]["status"], "incomplete");

    let whole = send(&Fake::with(Script::tokens(&["Hel"]).then_fails(error)), &request(json!({}))).await;
    assert_eq!(whole.status, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(whole.json()["error"]["message"], "device lost");
}

#[tokio::test]
async fn a_refusal_before_the_first_token_has_its_status_even_for_a_stream() {
    let refused = || ApiError::Overloaded { message: "full".into(), retry_after_s: 2 };
    for script in [Script::refused(refused()), Script::fails_before_a_token(refused())] {
        let reply = send(&Fake::with(script), &request(json!({"stream": true}))).await;
        assert_eq!(reply.status, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(reply.headers["retry-after"], "2");
        assert_eq!(reply.json()["error"]["type"], "rate_limit_error");
    }
}

#[tokio::test]
async fn a_refused_field_is_told_in_openais_words() {
    let reply =
        send(&Fake::with(Script::tokens(&["a"])), &request(json!({"previous_response_id": "resp_1"}))).await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST);
    let error = &reply.json()["error"];
    assert_eq!(
        (&error["type"], &error["param"], &error["code"]),
        (&json!("invalid_request_error"), &json!("previous_response_id"), &json!("invalid_request"))
    );
}

#[tokio::test]
async fn leaving_a_stream_cancels_its_work() {
    let fake = Fake::with(Script::tokens(&["a"]).then_hangs());
    let body = Body::from(request(json!({"stream": true})).to_string());
    let request = HttpRequest::post("/v1/responses").body(body).unwrap();
    let response = crate::http::router(fake.api()).oneshot(request).await.unwrap();
    assert_eq!(fake.running(), 1);
    drop(response);
    assert_eq!(fake.running(), 0);
}

/// A stream holds its settings and two events with them. Of 128 MiB of unread answers that one caller may
/// have, 96 are taken: 32 MiB are left for streams of three times 129 KiB, which are 84.
#[tokio::test]
async fn settings_that_an_answer_repeats_count_as_unread_bytes_of_its_caller() {
    let limits = Limits::default().of(Caller::at([10, 0, 0, 1].into()));
    let _held = limits.answer_bytes(96 << 20).unwrap();
    let body = request(json!({"stream": true, "instructions": "x".repeat(128 * 1024)})).to_string();
    let fake = Fake::with(Script::tokens(&["a"]).then_hangs());
    let router = crate::http::router(fake.api());
    let open = async || {
        let request = HttpRequest::post("/v1/responses").extension(limits.clone());
        router.clone().oneshot(request.body(Body::from(body.clone())).unwrap()).await.unwrap()
    };
    let mut streams = Vec::new();
    let refused = loop {
        let response = open().await;
        if response.status() != StatusCode::OK {
            break response;
        }
        streams.push(response);
        assert!(streams.len() < 1000, "nothing counts them");
    };
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!((80..90).contains(&streams.len()), "{}", streams.len());
    streams.clear();
    assert_eq!(open().await.status(), StatusCode::OK, "what was read is free again");
}
