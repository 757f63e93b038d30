//! Tests of both routes over the fake server of models: each rule that a client relies on.

use axum::body::Body;
use axum::http::{Request as HttpRequest, StatusCode};
use serde_json::{Value, json};
use tower::ServiceExt;

use super::request::WITHOUT_EFFECT;
use crate::fake::{Fake, Script};
use crate::revision::{DIGEST_HEADER, REVISION_HEADER};
use crate::test_client::{self, Reply};
use crate::tools::{AnswerSyntax, CallSyntax, ReasoningSyntax};
use crate::{ApiError, Conversation, FinishReason, Format, Priority, Prompt, StoppedBy, ToolChoice};

mod completions;
mod fields;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

async fn send(fake: &Fake, path: &str, body: &Value) -> Reply {
    send_with(fake, path, body, &[]).await
}

async fn send_with(fake: &Fake, path: &str, body: &Value, headers: &[(&str, &str)]) -> Reply {
    let request = HttpRequest::post(path);
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    test_client::send(fake, request, body.to_string()).await
}

/// A chat of one message, with further fields.
fn chat(more: Value) -> Value {
    with(json!({"messages": [{"role": "user", "content": "Hi"}]}), more)
}

fn prompt(more: Value) -> Value {
    with(json!({"prompt": "Hi"}), more)
}

fn with(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("{more}") };
    body.as_object_mut().unwrap().extend(more);
    body
}

fn weather() -> Value {
    json!([{"type": "function", "function": {"name": "weather", "strict": true, "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}},
    }}}])
}

fn hermes() -> AnswerSyntax {
    AnswerSyntax { calls: Some(CallSyntax::Hermes), reasoning: None }
}

fn thinking() -> AnswerSyntax {
    let reasoning = Some(ReasoningSyntax { opened_by_template: true });
    AnswerSyntax { calls: None, reasoning }
}

/// An answer of one call.
fn calling() -> Script {
    let call = r#"{"name": "weather", "arguments": {"city": "Bern"}}"#;
    Script::tokens(&["<tool_call>", "\n", call, "\n", "</tool_call>", ""]).with_syntax(hermes())
}

fn conversation(fake: &Fake) -> Conversation {
    match fake.last_request().prompt {
        Prompt::Conversation(conversation) => *conversation,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_whole_chat_has_openais_fields_and_names_what_answered() {
    let fake = Fake::with(Script::tokens(&["Hello", " you"]));
    for path in [CHAT, "/openai/v1/chat/completions"] {
        let reply = send(&fake, path, &chat(json!({}))).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
        assert_eq!(
            reply.json(),
            json!({
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1_700_000_000,
                "model": "fake",
                "system_fingerprint": "fp_d1",
                "choices": [{
                    "index": 0,
                    "message": {"role": "assistant", "content": "Hello you", "refusal": null},
                    "logprobs": null,
                    "finish_reason": "stop",
                }],
                "usage": {
                    "prompt_tokens": 3,
                    "completion_tokens": 2,
                    "total_tokens": 5,
                    "completion_tokens_details": {"reasoning_tokens": 0},
                },
            })
        );
        assert_eq!(reply.headers["content-type"], "application/json");
        assert_eq!(reply.headers[REVISION_HEADER], "r1");
        assert_eq!(reply.headers[DIGEST_HEADER], "d1");
    }
    let asked = fake.last_request();
    assert_eq!((asked.max_tokens, asked.temperature, asked.top_p), (u32::MAX, 1.0, 1.0));
    let conversation = conversation(&fake);
    assert_eq!(conversation.messages, [json!({"role": "user", "content": "Hi"})]);
    assert!(conversation.parallel_tool_calls && !conversation.continue_last);
}

#[tokio::test]
async fn a_stream_has_roles_in_order_then_parts_then_one_reason_for_each_choice() {
    let fake = Fake::with(Script::tokens(&["Hel", "lo"]));
    let reply = send(&fake, CHAT, &chat(json!({"stream": true, "n": 3, "seed": 5}))).await;
    assert_eq!(reply.headers[DIGEST_HEADER], "d1");
    let chunks = reply.chunks();
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        for name in ["id", "created", "model", "system_fingerprint"] {
            assert_eq!(chunk[name], chunks[0][name], "{name}");
        }
        assert_eq!(
            chunk["choices"].as_array().unwrap().len(),
            1,
            "no chunk counts tokens: none was asked for"
        );
        assert!(chunk.get("usage").is_none());
        let delta = chunk["choices"][0]["delta"].as_object().unwrap();
        let empty = |value: &Value| value.is_null() || value == "" || value == &json!([]);
        assert!(!delta.values().any(empty), "{chunk}");
    }
    let choice = |chunk: &Value| chunk["choices"][0]["index"].as_u64().unwrap();
    let roles: Vec<u64> = chunks
        .iter()
        .filter(|chunk| chunk["choices"][0]["delta"]["role"] == "assistant")
        .map(choice)
        .collect();
    assert_eq!(roles, [0, 1, 2]);
    assert_eq!(chunks[..3].iter().map(choice).collect::<Vec<_>>(), roles);
    for index in 0..3 {
        let own: Vec<&Value> = chunks.iter().filter(|chunk| choice(chunk) == index).collect();
        let texts: Vec<&str> =
            own.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
        assert_eq!(texts.concat(), "Hello");
        let (last, before) = own.split_last().unwrap();
        assert_eq!(last["choices"][0], json!({"index": index, "delta": {}, "finish_reason": "stop"}));
        assert!(before.iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null()));
    }
    assert_eq!(fake.last_request().seed, Some(7), "each choice has a seed of its own");
}

#[tokio::test]
async fn usage_comes_last_and_only_when_it_is_asked_for() {
    let fake = Fake::with(Script::tokens(&["a"]));
    for (path, body) in [(CHAT, chat(json!({}))), (COMPLETIONS, prompt(json!({})))] {
        let more = json!({"stream": true, "n": 2, "stream_options": {"include_usage": true}});
        let chunks = send(&fake, path, &with(body.clone(), more)).await.chunks();
        let (last, before) = chunks.split_last().unwrap();
        assert_eq!(last["choices"], json!([]));
        // The prompt of two choices counts once.
        let counted = &last["usage"];
        assert_eq!((&counted["prompt_tokens"], &counted["completion_tokens"]), (&json!(3), &json!(2)));
        assert_eq!(counted["total_tokens"], 5);
        assert!(before.iter().all(|chunk| chunk.get("usage").is_none()));
        let plain = send(&fake, path, &with(body, json!({"stream": true, "stream_options": null}))).await;
        assert!(!plain.text.contains("usage"), "{}", plain.text);
    }
}

#[tokio::test]
async fn a_call_is_told_whole_or_in_chunks_of_one_call_each() {
    let wanted = json!({"name": "weather", "arguments": "{\"city\": \"Bern\"}"});
    let parsed = |text: &Value| serde_json::from_str::<Value>(text.as_str().unwrap()).unwrap();
    for (choice, reason) in [
        (json!("auto"), "tool_calls"),
        (json!("required"), "tool_calls"),
        (json!({"type": "function", "function": {"name": "weather"}}), "stop"),
    ] {
        let fake = Fake::with(calling());
        let body = chat(json!({"tools": weather(), "tool_choice": choice}));
        let whole = send(&fake, CHAT, &body).await.json();
        let choice = &whole["choices"][0];
        assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!(reason), &Value::Null));
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert_eq!((calls.len(), &calls[0]["type"]), (1, &json!("function")));
        assert!(calls[0]["id"].as_str().unwrap().starts_with("call_"));
        assert_eq!(calls[0]["function"]["name"], wanted["name"]);
        assert_eq!(parsed(&calls[0]["function"]["arguments"]), json!({"city": "Bern"}));
        let tools = conversation(&fake).tools;
        assert!(tools[0]["function"].get("strict").is_none(), "templates do not know it: {tools:?}");

        let chunks = send(&fake, CHAT, &with(body, json!({"stream": true}))).await.chunks();
        let deltas: Vec<&Value> =
            chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"].get("tool_calls")).collect();
        assert!(deltas.iter().all(|calls| calls.as_array().unwrap().len() == 1));
        let first = &deltas[0][0];
        assert_eq!((&first["index"], &first["type"]), (&json!(0), &json!("function")));
        assert_eq!(first["function"], json!({"name": "weather", "arguments": ""}));
        assert!(first["id"].is_string());
        let pieces: Vec<&str> =
            deltas[1..].iter().map(|calls| calls[0]["function"]["arguments"].as_str().unwrap()).collect();
        assert_eq!(parsed(&json!(pieces.concat())), json!({"city": "Bern"}));
        for later in &deltas[1..] {
            assert!(later[0].get("id").is_none() && later[0]["function"].get("name").is_none(), "{later}");
        }
        assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], reason);
    }
}

#[tokio::test]
async fn a_cut_call_is_no_call_and_ends_with_length() {
    let pieces = ["<tool_call>", r#"{"name": "weather", "arguments": {"city": "#];
    let script = Script::tokens(&pieces).with_syntax(hermes()).ends_with(FinishReason::Length);
    let fake = Fake::with(script);
    let whole = send(&fake, CHAT, &chat(json!({"tools": weather()}))).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert!(choice["message"].get("tool_calls").is_none(), "{choice}");
    let chunks = send(&fake, CHAT, &chat(json!({"tools": weather(), "stream": true}))).await.chunks();
    assert_eq!(chunks.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn without_parallel_calls_the_second_one_ends_the_answer() {
    let call = r#"<tool_call>{"name": "weather", "arguments": {}}</tool_call>"#;
    let fake = Fake::with(Script::tokens(&[call, "\n", call, " more"]).with_syntax(hermes()).then_hangs());
    let body = chat(json!({"tools": weather(), "parallel_tool_calls": false}));
    let whole = send(&fake, CHAT, &body).await.json();
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 1);
    assert_eq!(choice["message"]["tool_calls"][0]["function"]["arguments"], "{}");
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(fake.running(), 0, "the engine does not go on");
    assert!(whole["usage"]["completion_tokens"].as_u64().unwrap() >= 3);
}

#[tokio::test]
async fn a_model_that_must_not_call_sees_no_tools_and_calls_none() {
    let fake = Fake::with(calling());
    let body = chat(json!({"tools": weather(), "tool_choice": "none"}));
    let whole = send(&fake, CHAT, &body).await.json();
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    assert!(whole["choices"][0]["message"]["content"].as_str().unwrap().contains("weather"));
    assert_eq!((conversation(&fake).tools.len(), conversation(&fake).tool_choice), (0, ToolChoice::None));
    // Wrappers send an empty list, and a choice without tools.
    let reply = send(&fake, CHAT, &chat(json!({"tools": [], "tool_choice": "auto"}))).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
}

#[tokio::test]
async fn log_probabilities_that_would_be_too_long_are_refused_before_any_work() {
    let fake = Fake::with(Script::tokens(&["a"]));
    let asks = |choices: u32, max_tokens: u32, more: Value| {
        let mut body =
            chat(json!({"n": choices, "max_tokens": max_tokens, "logprobs": true, "top_logprobs": 20}));
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body
    };
    let reply = send(&fake, CHAT, &asks(16, 4000, json!({}))).await;
    assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{}", reply.text);
    assert!(
        reply.json()["error"]["message"].as_str().unwrap().contains("choices may take"),
        "{}",
        reply.text
    );
    assert_eq!(fake.running(), 0, "what was admitted was cancelled");
    for body in
        [asks(16, 1000, json!({})), asks(1, 1_000_000, json!({})), asks(16, 4000, json!({"stream": true}))]
    {
        assert_eq!(send(&fake, CHAT, &body).await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn a_call_that_was_cut_may_stay_in_the_conversation() {
    let fake = Fake::with(Script::tokens(&["a"]));
    let call = json!({"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": \"b"}});
    let messages = json!([
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "the arguments are no JSON"},
    ]);
    let reply = send(&fake, CHAT, &json!({"model": "fake", "messages": messages})).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    let shown = &conversation(&fake).messages[1]["tool_calls"][0]["function"]["arguments"];
    assert_eq!(*shown, json!({"unreadable_arguments": "{\"a\": \"b"}));
}

#[tokio::test]
async fn allowed_tools_leave_only_those() {
    let mut tools = weather();
    tools.as_array_mut().unwrap().push(json!({"type": "function", "function": {"name": "time"}}));
    let allowed = |mode: &str, name: &str| {
        let names = [json!({"type": "function", "function": {"name": name}})];
        let choice = json!({"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": names}});
        chat(json!({"tools": tools, "tool_choice": choice}))
    };
    let fake = Fake::with(Script::tokens(&["a"]));
    for (mode, choice) in [("auto", ToolChoice::Auto), ("required", ToolChoice::Required)] {
        assert_eq!(send(&fake, CHAT, &allowed(mode, "time")).await.status, StatusCode::OK);
        let conversation = conversation(&fake);
        assert_eq!((conversation.tools.len(), conversation.tool_choice), (1, choice));
        assert_eq!(conversation.tools[0]["function"]["name"], "time");
    }
    for (body, param) in [
        (allowed("auto", "nothing"), "tool_choice.allowed_tools.tools"),
        (allowed("any", "time"), "tool_choice.allowed_tools.mode"),
    ] {
        assert_eq!(send(&fake, CHAT, &body).await.json()["error"]["param"], param);
    }
}

#[tokio::test]
async fn reasoning_has_a_field_of_its_own_under_either_name() {
    let script =
        || Script::tokens(&["let me", " see", "</think>", "\n\n", "yes", ""]).with_syntax(thinking());
    for (more, name, other) in [
        (json!({}), "reasoning_content", "reasoning"),
        (json!({"reasoning_field": "reasoning"}), "reasoning", "reasoning_content"),
    ] {
        let fake = Fake::with(script());
        let whole = send(&fake, CHAT, &chat(more.clone())).await.json();
        let message = &whole["choices"][0]["message"];
        assert_eq!(message[name].as_str().unwrap().trim(), "let me see");
        assert_eq!(message["content"].as_str().unwrap().trim(), "yes");
        assert!(message.get(other).is_none(), "{message}");
        assert_eq!(whole["usage"]["completion_tokens_details"]["reasoning_tokens"], 2);
        let chunks = send(&fake, CHAT, &chat(with(more, json!({"stream": true})))).await.chunks();
        let join = |name: &str| -> String {
            chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"][name].as_str()).collect()
        };
        assert_eq!(
            (join(name).trim(), join("content").trim(), join(other).as_str()),
            ("let me see", "yes", "")
        );
    }
    // A format holds from the first token on, so such an answer has no reasoning.
    let fake = Fake::with(Script::tokens(&["{\"a\":", "1}"]).with_syntax(thinking()));
    let body = chat(json!({"response_format": {"type": "json_object"}}));
    assert_eq!(send(&fake, CHAT, &body).await.json()["choices"][0]["message"]["content"], "{\"a\":1}");
}

#[tokio::test]
async fn logprobs_of_a_chat_list_the_tokens_with_a_text() {
    // The third token has no text: it is the end.
    let script = || Script::tokens(&["a", "b", ""]).with_logprobs();
    let token = |id: u8| {
        json!({
            "token": format!("t{id}"), "logprob": -0.5, "bytes": [b't', b'0' + id],
            "top_logprobs": [{"token": "t7", "logprob": -0.25, "bytes": [b't', b'7']}],
        })
    };
    let body = chat(json!({"logprobs": true, "top_logprobs": 1}));
    let fake = Fake::with(script());
    let whole = send(&fake, CHAT, &body).await.json();
    let wanted = json!({"content": [token(0), token(1)], "refusal": null});
    assert_eq!(whole["choices"][0]["logprobs"], wanted);
    assert_eq!(fake.last_request().options.logprobs, Some(1));
    let chunks = send(&fake, CHAT, &with(body, json!({"stream": true}))).await.chunks();
    let listed: Vec<&Value> = chunks.iter().filter_map(|chunk| chunk["choices"][0].get("logprobs")).collect();
    assert_eq!((listed.len(), &listed[0]["content"][0]), (2, &token(0)));
    // Without a number of alternatives there are none.
    let fake = Fake::with(script());
    send(&fake, CHAT, &chat(json!({"logprobs": true}))).await;
    assert_eq!(fake.last_request().options.logprobs, Some(0));
    let plain = send(&fake, CHAT, &chat(json!({"logprobs": false, "top_logprobs": null}))).await;
    assert_eq!(plain.status, StatusCode::OK);
    assert_eq!(fake.last_request().options.logprobs, None);
}

#[tokio::test]
async fn what_ended_an_answer_is_told() {
    let fake = Fake::with(Script::tokens(&["a"]).stopped_by(StoppedBy::Text("END".into())));
    for (path, body) in
        [(CHAT, chat(json!({"stop": "END"}))), (COMPLETIONS, prompt(json!({"stop": ["END"]})))]
    {
        let whole = send(&fake, path, &body).await.json();
        assert_eq!(whole["choices"][0]["stopped_by"], "END");
        assert_eq!(fake.last_request().options.stop, ["END"]);
        let chunks = send(&fake, path, &with(body, json!({"stream": true}))).await.chunks();
        assert_eq!(chunks.last().unwrap()["choices"][0]["stopped_by"], "END");
    }
}

#[tokio::test]
async fn a_refusal_before_the_first_token_has_its_status_even_for_a_stream() {
    let full = || ApiError::Overloaded { message: "full".into(), retry_after_s: 2 };
    for script in [Script::refused(full()), Script::fails_before_a_token(full())] {
        let fake = Fake::with(script);
        for (path, body) in [(CHAT, chat(json!({"stream": true}))), (COMPLETIONS, prompt(json!({"n": 2})))] {
            let reply = send(&fake, path, &body).await;
            assert_eq!(reply.status, StatusCode::TOO_MANY_REQUESTS, "{path}");
            assert_eq!(reply.headers["retry-after"], "2");
            assert_eq!(reply.headers["content-type"], "application/json");
            let error = &reply.json()["error"];
            assert_eq!((&error["type"], &error["code"]), (&json!("rate_limit_error"), &json!("overloaded")));
            assert_eq!(fake.running(), 0, "nothing of the other choice is left");
        }
    }
}

#[tokio::test]
async fn an_error_inside_a_stream_is_its_last_frame() {
    let error = ApiError::Internal { message: "device lost".into() };
    let fake = Fake::with(Script::tokens(&["a"]).then_fails(error));
    for (path, body) in [(CHAT, chat(json!({}))), (COMPLETIONS, prompt(json!({})))] {
        let reply = send(&fake, path, &with(body.clone(), json!({"stream": true, "n": 2}))).await;
        let frames = reply.data();
        let last: Value = serde_json::from_str(frames.last().unwrap()).unwrap();
        assert_eq!(last["error"]["message"], "device lost");
        assert_eq!((&last["error"]["type"], &last["error"]["param"]), (&json!("server_error"), &Value::Null));
        assert_eq!(frames.iter().filter(|frame| frame.contains("error")).count(), 1, "nothing follows it");
        assert_eq!(fake.running(), 0);
        assert_eq!(send(&fake, path, &body).await.status, StatusCode::INTERNAL_SERVER_ERROR);
    }
}

#[tokio::test]
async fn leaving_a_stream_cancels_every_choice() {
    let fake = Fake::with(Script::tokens(&["a"]).then_hangs());
    let body = chat(json!({"stream": true, "n": 4})).to_string();
    let request = HttpRequest::post(CHAT).body(Body::from(body)).unwrap();
    let response = crate::http::router(fake.api()).oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(fake.running(), 4);
    drop(response);
    fake.until_running(0).await;
}

#[tokio::test]
async fn every_option_arrives() {
    let schema = json!({"type": "json_schema", "json_schema": {
        "name": "x", "strict": true, "description": null, "schema": {"type": "object"},
    }});
    let fake = Fake::with(Script::tokens(&["a"]));
    let body = chat(json!({
        "model": "fake", "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.25, "seed": -1,
        "presence_penalty": 0.5, "frequency_penalty": 1, "logit_bias": {"5": -1}, "stop": ["a", "b"],
        "response_format": schema, "chat_template_kwargs": {"enable_thinking": false}, "top_k": 3,
        "min_p": 0.5, "typical_p": 0.5, "repetition_penalty": 1.5, "stop_token_ids": [9], "priority": "low",
        "modalities": ["text"],
    }));
    let headers = [("x-trustformers-priority", "high"), (REVISION_HEADER, "r1")];
    let reply = send_with(&fake, CHAT, &body, &headers).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    let asked = fake.last_request();
    assert_eq!((asked.model.as_deref(), asked.max_tokens, asked.seed), (Some("fake"), 7, Some(u64::MAX)));
    assert_eq!((asked.temperature, asked.top_p), (0.5, 0.25));
    assert_eq!((asked.priority, asked.revision.as_deref()), (Priority::Low, Some("r1")));
    let options = asked.options;
    assert_eq!((options.presence_penalty, options.frequency_penalty), (Some(0.5), Some(1.0)));
    assert_eq!((options.logit_bias, options.stop_token_ids), (vec![(5, -1.0)], vec![9]));
    assert_eq!((options.top_k, options.min_p, options.typical_p), (Some(3), Some(0.5), Some(0.5)));
    assert_eq!((options.repetition_penalty, options.stop.len()), (Some(1.5), 2));
    assert_eq!(options.format, Some(Format::JsonSchema(r#"{"type":"object"}"#.into())));
    assert_eq!(conversation(&fake).variables["enable_thinking"], false);
}

#[tokio::test]
async fn reasoning_effort_becomes_the_variables_that_templates_know() {
    for (more, variables) in [
        (json!({}), json!({})),
        (json!({"reasoning_effort": "none"}), json!({"enable_thinking": false})),
        (json!({"reasoning_effort": "low"}), json!({"enable_thinking": true, "reasoning_effort": "low"})),
        (
            json!({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": false}}),
            json!({"enable_thinking": false, "reasoning_effort": "high"}),
        ),
    ] {
        let fake = Fake::with(Script::tokens(&["a"]));
        let reply = send(&fake, CHAT, &chat(more)).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
        assert_eq!(Value::from(conversation(&fake).variables), variables);
    }
}

#[test]
fn the_page_names_what_is_refused_and_what_has_no_effect() {
    let page = include_str!("../../../../docs/openai.md");
    let refused = [&super::chat::FIELDS, &super::completions::FIELDS];
    let refused = refused.into_iter().flat_map(|route| route.refused).map(|field| field.name);
    for name in WITHOUT_EFFECT.iter().map(|field| field.name).chain(refused) {
        assert!(page.contains(&format!("`{name}`")), "{name}");
    }
}

#[tokio::test]
async fn a_last_message_of_the_assistant_is_continued_where_it_is_asked_for() {
    let messages = json!([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]);
    for (more, continued) in [
        (json!({}), false),
        (json!({"add_generation_prompt": true}), false),
        (json!({"continue_final_message": true}), true),
        (json!({"continue_final_message": true, "add_generation_prompt": false}), true),
    ] {
        let fake = Fake::with(Script::tokens(&["lo"]));
        let reply = send(&fake, CHAT, &with(json!({"messages": messages}), more)).await;
        assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
        assert_eq!(conversation(&fake).continue_last, continued);
    }
}
