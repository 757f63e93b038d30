//! `POST /v1/completions`: texts, token ids and log probabilities.

use super::*;

#[tokio::test]
async fn a_whole_completion_has_openais_fields() {
    let fake = Fake::with(Script::tokens(&[" you", " there"]));
    for path in [COMPLETIONS, "/openai/v1/completions"] {
        let reply = send(&fake, path, &prompt(json!({"n": 2, "best_of": 2, "suffix": ""}))).await;
        let body = reply.json();
        assert_eq!((&body["id"], &body["object"]), (&json!("cmpl-1"), &json!("text_completion")));
        let choice =
            |index| json!({"index": index, "text": " you there", "logprobs": null, "finish_reason": "stop"});
        assert_eq!(body["choices"], json!([choice(0), choice(1)]));
        let usage = &body["usage"];
        assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(3), &json!(4)));
        assert_eq!(reply.headers[DIGEST_HEADER], "d1");
    }
    let asked = fake.last_request();
    assert_eq!((asked.max_tokens, asked.temperature, asked.prompt), (16, 1.0, "Hi".into()));
}

#[tokio::test]
async fn prompts_are_texts_or_token_ids_and_are_echoed() {
    let fake = Fake::with(Script::tokens(&["!"]));
    for (given, texts, last) in [
        (json!("a"), vec!["a!"], Prompt::from("a")),
        (json!(["a", "b"]), vec!["a!", "b!"], Prompt::from("b")),
        (json!([4, 5]), vec!["t4t5!"], Prompt::Tokens(vec![4, 5])),
        (json!([[4], [5]]), vec!["t4!", "t5!"], Prompt::Tokens(vec![5])),
    ] {
        let body = json!({"prompt": given, "echo": true});
        let whole = send(&fake, COMPLETIONS, &body).await.json();
        let found: Vec<&str> = whole["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|choice| choice["text"].as_str().unwrap())
            .collect();
        assert_eq!((found, fake.last_request().prompt), (texts.clone(), last));
        assert_eq!(whole["usage"]["prompt_tokens"], 3 * texts.len(), "each prompt counts");
        let chunks = send(&fake, COMPLETIONS, &with(body, json!({"stream": true}))).await.chunks();
        let mut joined = vec![String::new(); texts.len()];
        for chunk in &chunks {
            assert_eq!(chunk["object"], "text_completion");
            let choice = &chunk["choices"][0];
            let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
            joined[index].push_str(choice["text"].as_str().unwrap());
        }
        assert_eq!(joined, texts);
        let ends = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"] == "stop").count();
        assert_eq!(ends, texts.len(), "one reason for each choice");
    }
}

#[tokio::test]
async fn logprobs_of_a_completion_are_lists_with_offsets() {
    let fake = Fake::with(Script::tokens(&["t0", "t1", ""]).with_logprobs());
    let body = prompt(json!({"logprobs": 1}));
    let lists = |offset: usize, name: &str| {
        json!({
            "text_offset": [offset], "tokens": [name], "token_logprobs": [-0.5],
            "top_logprobs": [{"t7": -0.25, name: -0.5}],
        })
    };
    let whole = send(&fake, COMPLETIONS, &body).await.json();
    let found = &whole["choices"][0]["logprobs"];
    assert_eq!((&found["text_offset"], &found["tokens"]), (&json!([0, 2]), &json!(["t0", "t1"])));
    assert_eq!(found["top_logprobs"][1], json!({"t7": -0.25, "t1": -0.5}));
    let chunks = send(&fake, COMPLETIONS, &with(body, json!({"stream": true}))).await.chunks();
    let listed: Vec<&Value> = chunks
        .iter()
        .map(|chunk| &chunk["choices"][0]["logprobs"])
        .filter(|lists| !lists.is_null())
        .collect();
    assert_eq!(listed, [&lists(0, "t0"), &lists(2, "t1")]);
}
