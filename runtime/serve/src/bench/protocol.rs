//! Requests and answers of each protocol that servers of models speak.

use serde_json::{Map, Value, json};

/// A protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Api {
    /// This server's /v1/generate/stream.
    Generate,
    /// OpenAI's /v1/completions, streamed: llama-server, vLLM and others.
    Completions,
    /// llama.cpp's own /completion, streamed.
    Llama,
    /// /v1/embeddings, this server's and OpenAI's.
    Embeddings,
}

/// One request, before it has a form.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BenchRequest<'a> {
    /// Texts: one prompt, or the texts to embed.
    pub(super) texts: Vec<String>,
    /// The model's name, where one is given.
    pub(super) model: Option<&'a str>,
    /// New tokens at most.
    pub(super) max_tokens: u32,
    /// Fields that are added, or put in the place of ours.
    pub(super) extra: &'a Map<String, Value>,
}

/// The content of one event of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Piece {
    /// It carries a token.
    pub(super) token: bool,
    /// It is the last that counts.
    pub(super) end: bool,
    /// Tokens of the prompt, where the server counts them.
    pub(super) prompt_tokens: Option<u64>,
    /// Tokens of the answer, where the server counts them.
    pub(super) output_tokens: Option<u64>,
}

impl Api {
    /// The route.
    pub(super) fn path(self) -> &'static str {
        match self {
            Self::Generate => "/v1/generate/stream",
            Self::Completions => "/v1/completions",
            Self::Llama => "/completion",
            Self::Embeddings => "/v1/embeddings",
        }
    }

    /// Whether the answer is a stream of tokens.
    pub(super) fn streams(self) -> bool {
        self != Self::Embeddings
    }

    /// The body of a request. Generation is greedy.
    pub(super) fn body(self, ask: &BenchRequest<'_>) -> Value {
        let prompt = ask.texts.first().map_or("", String::as_str);
        let mut body = match self {
            Self::Generate => json!({"prompt": prompt, "max_tokens": ask.max_tokens, "temperature": 0}),
            Self::Completions => json!({
                "prompt": prompt, "max_tokens": ask.max_tokens, "temperature": 0, "stream": true,
                "stream_options": {"include_usage": true},
            }),
            Self::Llama => json!({
                "prompt": prompt, "n_predict": ask.max_tokens, "temperature": 0, "stream": true,
            }),
            Self::Embeddings if ask.texts.len() == 1 => json!({"input": prompt}),
            Self::Embeddings => json!({"input": ask.texts}),
        };
        if let Some(model) = ask.model {
            body["model"] = json!(model);
        }
        for (key, value) in ask.extra {
            body[key.as_str()] = value.clone();
        }
        body
    }

    /// Reads the data of one event; `None` when it is no answer (an error object, or something unknown).
    pub(super) fn piece(self, data: &str) -> Option<Piece> {
        if data == "[DONE]" {
            return Some(Piece { end: true, ..Piece::default() });
        }
        let event: Value = serde_json::from_str(data).ok()?;
        if event.get("error").is_some_and(|error| !error.is_null()) {
            return None;
        }
        let count = |path: &str| event.pointer(path).and_then(Value::as_u64);
        let usage = Piece {
            prompt_tokens: count("/usage/prompt_tokens"),
            output_tokens: count("/usage/completion_tokens"),
            ..Piece::default()
        };
        match self {
            Self::Generate if event.get("token").is_some() => Some(Piece { token: true, ..usage }),
            Self::Generate => event.get("finish_reason").map(|_| Piece { end: true, ..usage }),
            Self::Completions => {
                let choices = event.get("choices")?.as_array()?;
                let text = choices.first().and_then(|choice| choice.get("text")).and_then(Value::as_str);
                // The end is `[DONE]`: the counts come after the last choice.
                Some(Piece { token: text.is_some_and(|text| !text.is_empty()), ..usage })
            }
            Self::Llama => {
                let end = event.get("stop")?.as_bool()?;
                Some(Piece {
                    token: !end,
                    end,
                    prompt_tokens: count("/tokens_evaluated"),
                    output_tokens: count("/tokens_predicted"),
                })
            }
            Self::Embeddings => None,
        }
    }

    /// Reads a whole answer of embeddings: tokens of the input, or `None` when it is none of `texts` vectors.
    pub(super) fn whole(self, body: &[u8], texts: usize) -> Option<u64> {
        let answer: Value = serde_json::from_slice(body).ok()?;
        let data = answer.get("data")?.as_array()?;
        (data.len() == texts && data.iter().all(|one| one.get("embedding").is_some()))
            .then(|| answer.pointer("/usage/prompt_tokens").and_then(Value::as_u64).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(api: Api, texts: &[&str], extra: Value) -> Value {
        let Value::Object(extra) = extra else { panic!("an object") };
        let texts = texts.iter().map(ToString::to_string).collect();
        api.body(&BenchRequest { texts, model: Some("m"), max_tokens: 9, extra: &extra })
    }

    #[test]
    fn bodies_name_what_each_protocol_names() {
        let generate = body(Api::Generate, &["a"], json!({"logit_bias": {"2": -100}}));
        assert_eq!(
            generate,
            json!({"prompt": "a", "max_tokens": 9, "temperature": 0, "model": "m", "logit_bias": {"2": -100}})
        );
        assert_eq!(body(Api::Llama, &["a"], json!({}))["n_predict"], 9);
        assert_eq!(body(Api::Completions, &["a"], json!({"max_tokens": 3}))["max_tokens"], 3, "extra wins");
        assert_eq!(body(Api::Embeddings, &["a"], json!({}))["input"], "a");
        assert_eq!(body(Api::Embeddings, &["a", "b"], json!({}))["input"], json!(["a", "b"]));
    }

    #[test]
    fn tokens_ends_and_counts_are_read_from_every_protocol() {
        let token = Some(Piece { token: true, ..Piece::default() });
        let end = |prompt, output| {
            Some(Piece {
                end: true,
                prompt_tokens: Some(prompt),
                output_tokens: Some(output),
                ..Piece::default()
            })
        };
        assert_eq!(Api::Generate.piece(r#"{"text":"","token":7}"#), token);
        let last =
            r#"{"text":"","finish_reason":"length","usage":{"prompt_tokens":3,"completion_tokens":9}}"#;
        assert_eq!(Api::Generate.piece(last), end(3, 9));
        assert_eq!(Api::Completions.piece(r#"{"choices":[{"text":"a","finish_reason":null}]}"#), token);
        let counts = r#"{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":9}}"#;
        let counted = Piece { prompt_tokens: Some(3), output_tokens: Some(9), ..Piece::default() };
        assert_eq!(Api::Completions.piece(counts), Some(counted));
        assert_eq!(Api::Completions.piece("[DONE]"), Some(Piece { end: true, ..Piece::default() }));
        assert_eq!(Api::Llama.piece(r#"{"content":"a","stop":false}"#), token);
        let last = r#"{"content":"","stop":true,"tokens_evaluated":3,"tokens_predicted":9}"#;
        assert_eq!(Api::Llama.piece(last), end(3, 9));
    }

    #[test]
    fn what_is_no_answer_is_none() {
        for api in [Api::Generate, Api::Completions, Api::Llama] {
            for data in [r#"{"error":{"message":"gone"}}"#, "{}", "no json", "[]"] {
                assert_eq!(api.piece(data), None, "{api:?} {data}");
            }
        }
        assert_eq!(Api::Embeddings.whole(br#"{"data":[{"embedding":[0.1]}]}"#, 1), Some(0));
        assert_eq!(Api::Embeddings.whole(br#"{"data":[{"embedding":[0.1]}]}"#, 2), None, "one is missing");
        assert_eq!(Api::Embeddings.whole(br#"{"error":{}}"#, 1), None);
    }
}
