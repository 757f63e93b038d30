//! Fields without effect, and fields that are refused.

use super::*;

#[tokio::test]
async fn null_is_the_same_as_leaving_a_field_out() {
    let fake = Fake::with(Script::tokens(&["a"]));
    let nulls = |fields: &[&str]| fields.iter().map(|field| ((*field).to_owned(), Value::Null)).collect();
    let of_chat = [
        "model",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "n",
        "seed",
        "priority",
        "top_k",
        "stop",
        "logprobs",
        "top_logprobs",
        "tools",
        "tool_choice",
        "user",
        "store",
        "parallel_tool_calls",
        "response_format",
        "chat_template_kwargs",
        "functions",
        "function_call",
        "audio",
        "modalities",
        "reasoning_effort",
        "prediction",
        "metadata",
        "logit_bias",
        "reasoning_field",
    ];
    let reply = send(&fake, CHAT, &chat(Value::Object(nulls(&of_chat)))).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
    let of_completions = ["suffix", "echo", "best_of", "n", "logprobs", "max_tokens", "user", "stop"];
    let reply = send(&fake, COMPLETIONS, &prompt(Value::Object(nulls(&of_completions)))).await;
    assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
}

#[tokio::test]
async fn fields_without_effect_are_accepted_on_both_routes_and_checked() {
    let fake = Fake::with(Script::tokens(&["a"]));
    for field in WITHOUT_EFFECT {
        let value = match field.name {
            "metadata" => json!({"a": "b"}),
            "store" => json!(false),
            _ => json!("a"),
        };
        for (path, body) in [(CHAT, chat(json!({}))), (COMPLETIONS, prompt(json!({})))] {
            let reply = send(&fake, path, &with(body.clone(), json!({field.name: value}))).await;
            assert_eq!(reply.status, StatusCode::OK, "{}", reply.text);
            let wrong = send(&fake, path, &with(body, json!({field.name: 7}))).await;
            assert_eq!(wrong.json()["error"]["param"], field.name);
        }
    }
    let stored = send(&fake, CHAT, &chat(json!({"store": true}))).await.json();
    assert!(stored["error"]["message"].as_str().unwrap().contains("no answers are stored"), "{stored}");
}

/// Sends each body and expects a refusal that names the parameter and says so much.
async fn refused(path: &str, make: impl Fn(Value) -> Value, cases: Vec<(Value, &str, &str)>) {
    let fake = Fake::with(Script::tokens(&["a"]));
    for (more, param, text) in cases {
        let reply = send(&fake, path, &make(more.clone())).await;
        assert_eq!(reply.status, StatusCode::BAD_REQUEST, "{more}: {}", reply.text);
        assert_eq!(reply.headers["x-should-retry"], "false");
        let error = &reply.json()["error"];
        assert_eq!(
            (&error["param"], &error["type"]),
            (&json!(param), &json!("invalid_request_error")),
            "{more}"
        );
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(text), "{more}: {message}");
    }
}

#[tokio::test]
async fn a_wrong_field_of_both_routes_is_named() {
    let cases = || {
        vec![
            (json!({"model": 7}), "model", "a string"),
            (json!({"n": 0}), "n", "1 to 16"),
            (json!({"n": 17}), "n", "1 to 16"),
            (json!({"n": 1.5}), "n", "found 1.5"),
            (json!({"stream": "yes"}), "stream", "true or false"),
            (json!({"stream_options": {"include_usage": true}}), "stream_options", "\"stream\": true"),
            (json!({"stream": true, "stream_options": 1}), "stream_options", "an object"),
            (
                json!({"stream": true, "stream_options": {"include_usage": 1}}),
                "stream_options.include_usage",
                "true or false",
            ),
            (
                json!({"stream": true, "stream_options": {"usage": true}}),
                "stream_options.usage",
                "include_usage",
            ),
            (
                json!({"stream": true, "stream_options": {"include_obfuscation": true}}),
                "stream_options.include_obfuscation",
                "leave it out",
            ),
            (json!({"max_tokens": 0}), "max_tokens", "from 1"),
            (json!({"max_tokens": -1}), "max_tokens", "found -1"),
            (json!({"temperature": "hot"}), "temperature", "a number"),
            (json!({"temperature": -1}), "temperature", "greedy"),
            (json!({"top_p": 0}), "top_p", "above 0"),
            (json!({"seed": 1.5}), "seed", "64 bits"),
            (json!({"priority": "urgent"}), "priority", "\"high\""),
            (json!({"stop": 7}), "stop", "a list of strings"),
            (json!({"logit_bias": {"a": 1}}), "logit_bias", "found"),
            (json!({"presence_penalty": "a"}), "presence_penalty", "a number"),
            (json!({"frequency_penalty": "a"}), "frequency_penalty", "a number"),
            (json!({"response_format": {"type": "xml"}}), "response_format.type", "json_object"),
            (json!({"temprature": 1}), "temprature", "did you mean \"temperature\""),
            (json!({"ignore_eos": true}), "ignore_eos", "known are"),
        ]
    };
    refused(CHAT, chat, cases()).await;
    refused(COMPLETIONS, prompt, cases()).await;
}

#[tokio::test]
async fn a_wrong_field_of_a_chat_is_named() {
    let schema = |inner: Value| json!({"response_format": {"type": "json_schema", "json_schema": inner}});
    let tool_choice = |choice: Value| json!({"tools": weather(), "tool_choice": choice});
    let cases = vec![
        (json!({"messages": null}), "messages", "at least one"),
        (json!({"messages": []}), "messages", "is empty"),
        (json!({"messages": "Hi"}), "messages", "a list"),
        (json!({"max_completion_tokens": 0}), "max_completion_tokens", "from 1"),
        (json!({"max_tokens": 1, "max_completion_tokens": 2}), "max_completion_tokens", "give one of them"),
        (json!({"logprobs": 1}), "logprobs", "true or false"),
        (json!({"top_logprobs": 1}), "top_logprobs", "\"logprobs\": true"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "0 to 20"),
        (json!({"tools": 1}), "tools", "a list"),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type", "function"),
        (tool_choice(json!({})), "tool_choice", "expected"),
        (tool_choice(json!("any")), "tool_choice", "expected"),
        (
            tool_choice(json!({"type": "function", "function": {"name": "time"}})),
            "tool_choice",
            "not the name of a function",
        ),
        (json!({"tool_choice": "required"}), "tool_choice", "no function"),
        (
            json!({"tool_choice": {"type": "function", "function": {"name": "weather"}}}),
            "tool_choice",
            "no function",
        ),
        (json!({"parallel_tool_calls": 1}), "parallel_tool_calls", "true or false"),
        (json!({"chat_template_kwargs": []}), "chat_template_kwargs", "an object"),
        (json!({"continue_final_message": 1}), "continue_final_message", "true or false"),
        (json!({"continue_final_message": true}), "continue_final_message", "assistant"),
        (json!({"add_generation_prompt": 1}), "add_generation_prompt", "true or false"),
        (json!({"add_generation_prompt": false}), "add_generation_prompt", "contradicts"),
        (json!({"reasoning_field": "thoughts"}), "reasoning_field", "reasoning_content"),
        (json!({"modalities": ["text", "audio"]}), "modalities", "text"),
        (json!({"functions": []}), "functions", "tools"),
        (json!({"function_call": "auto"}), "function_call", "tool_choice"),
        (json!({"audio": {"voice": "alloy"}}), "audio", "text only"),
        (json!({"prediction": {}}), "prediction", "leave it out"),
        (json!({"web_search_options": {}}), "web_search_options", "leave it out"),
        (json!({"reasoning_effort": "much"}), "reasoning_effort", "minimal"),
        (json!({"verbosity": "low"}), "verbosity", "not offered"),
        (json!({"prompt": "Hi"}), "prompt", "messages"),
        (schema(json!("x")), "response_format.json_schema", "an object"),
        (schema(json!({"name": "x"})), "response_format.json_schema.schema", "missing"),
        (schema(json!({"name": "x", "schema": 1})), "response_format.json_schema.schema", "found 1"),
        (schema(json!({"name": 1, "schema": {}})), "response_format.json_schema.name", "a string"),
        (
            schema(json!({"strict": "yes", "schema": {}})),
            "response_format.json_schema.strict",
            "true or false",
        ),
        (schema(json!({"scheme": {}})), "response_format.json_schema.scheme", "did you mean \"schema\""),
    ];
    refused(CHAT, chat, cases).await;
}

#[tokio::test]
async fn a_wrong_field_of_a_completion_is_named() {
    let cases = vec![
        (json!({"prompt": null}), "prompt", "is missing"),
        (json!({"prompt": ""}), "prompt", "is empty"),
        (json!({"prompt": []}), "prompt", "is empty"),
        (json!({"prompt": 7}), "prompt", "token ids"),
        (json!({"prompt": ["a", ""]}), "prompt[1]", "is empty"),
        (json!({"prompt": ["a", 7]}), "prompt[1]", "found 7"),
        (json!({"prompt": [1, -1]}), "prompt[1]", "a token id"),
        (json!({"prompt": [[1], []]}), "prompt[1]", "is empty"),
        (json!({"prompt": [[1, "a"]]}), "prompt[0][1]", "a token id"),
        (json!({"prompt": vec!["a"; 5], "n": 13}), "prompt", "64 answers"),
        (json!({"echo": "yes"}), "echo", "true or false"),
        (json!({"echo": true, "logprobs": 1}), "echo", "logprobs"),
        (json!({"suffix": 1}), "suffix", "a string"),
        (json!({"suffix": "end"}), "suffix", "leave it out"),
        (json!({"best_of": 0}), "best_of", "must equal \"n\""),
        (json!({"best_of": 2}), "best_of", "must equal \"n\""),
        (json!({"logprobs": true}), "logprobs", "a whole number"),
        (json!({"messages": []}), "messages", "chat/completions"),
        (json!({"max_completion_tokens": 1}), "max_completion_tokens", "max_tokens"),
        (json!({"tools": []}), "tools", "known are"),
    ];
    refused(COMPLETIONS, prompt, cases).await;
}
