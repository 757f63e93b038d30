//! `POST /v1/completions`: the fields of a request, the handler, and the answers.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};

use super::request::{self, Delivery, RefusedField, RouteFields, whole};
use super::stream::{self, ChunkWriter};
use super::wire::{ChoiceEnd, Heading, UsageSum};
use crate::chat_answer::{self, ChatAnswer, ChatEvent, ChatEventKind, ChosenToken, MAX_ANSWERS};
use crate::conversation::Prompt;
use crate::embed::token_ids;
use crate::error::ApiError;
use crate::fields::{Asked, Defaults, Generation};
use crate::json_body::{found, take};
use crate::sse_frames::Frame;
use crate::{Api, request_body};

/// OpenAI's defaults.
const COMPLETION_DEFAULTS: Defaults = Defaults { max_tokens: 16, temperature: 1.0, top_p: 1.0 };

pub(crate) const FIELDS: RouteFields = RouteFields {
    own: &["prompt", "echo", "suffix", "best_of"],
    refused: &[
        RefusedField {
            name: "messages",
            instead: "is a field of POST /v1/chat/completions; give \"prompt\"",
        },
        RefusedField {
            name: "max_completion_tokens",
            instead: "is a field of chat completions; give \"max_tokens\"",
        },
    ],
    example: r#"{"prompt": "Hello", "max_tokens": 32}"#,
};

/// A request that was read.
struct CompletionRequest {
    /// In order, at least one.
    prompts: Vec<Prompt>,
    /// What is asked of the model for each of them.
    asked: Asked,
    delivery: Delivery,
    echo: bool,
}

/// `POST /v1/completions`.
pub(crate) async fn completions(State(api): State<Api>, request: Request) -> Result<Response, ApiError> {
    let (head, body) = request.into_parts();
    let bytes = request_body::read(&head, body).await?;
    let CompletionRequest { prompts, asked, delivery, echo } = api.parse(bytes, parse).await?;
    let checked = asked.with_headers(&head.headers)?.check(&COMPLETION_DEFAULTS)?;
    let shared = Generation { prompt: Prompt::default(), ..checked };
    if !delivery.stream {
        chat_answer::check_whole(&shared, prompts.len() * delivery.choices as usize)?;
    }
    let echoed = if echo { prompts.clone() } else { Vec::new() };
    let requests = prompts.into_iter().flat_map(move |prompt| {
        chat_answer::choices(Generation { prompt, ..shared.clone() }, delivery.choices)
    });
    let answer = chat_answer::ask(&api, requests).await?;
    let mut texts = Vec::new();
    for prompt in echoed {
        let text = echo_of(&answer, prompt)?;
        texts.extend(std::iter::repeat_n(text, delivery.choices as usize));
    }
    texts.resize(answer.head.prompt_tokens.len(), String::new());
    let heading = Heading::new(&answer.head, "cmpl", "text_completion");
    if delivery.stream {
        let choices = texts.into_iter().map(CompletionText::begins_with).collect();
        return Ok(stream::response(answer, delivery, CompletionChunks { heading, choices }));
    }
    whole_response(answer, &heading, delivery, texts).await
}

fn parse(bytes: &[u8]) -> Result<CompletionRequest, ApiError> {
    let mut object = FIELDS.read(bytes)?;
    let delivery = Delivery::from_json(&object)?;
    let suffix = take(&object, "suffix", "a string", |value| value.as_str().map(str::to_owned))?;
    if suffix.is_some_and(|text| !text.is_empty()) {
        let why = "is not offered: the models here only continue a prompt; leave it out";
        return Err(ApiError::field("suffix", why));
    }
    let best_of = take(&object, "best_of", "a whole number from 1 on", whole)?;
    if best_of.is_some_and(|count| count != delivery.choices) {
        let choices = delivery.choices;
        let why = format!("must equal \"n\" ({choices}): all answers are returned; leave it out");
        return Err(ApiError::field("best_of", why));
    }
    let echo = take(&object, "echo", "true or false", Value::as_bool)?.unwrap_or(false);
    let prompts = prompts(object.remove("prompt"))?;
    let answers = prompts.len() * delivery.choices as usize;
    if answers > MAX_ANSWERS {
        let (count, choices) = (prompts.len(), delivery.choices);
        let why = format!(
            "{count} prompts times {choices} choices are more than {MAX_ANSWERS} answers; send fewer"
        );
        return Err(ApiError::field("prompt", why));
    }
    let first = prompts.first().cloned().unwrap_or_default();
    let asked = request::asked(&object, bytes, first)?;
    if echo && asked.options.logprobs.is_some() {
        let why = "is not offered together with \"logprobs\": a prompt has none; leave out one of them";
        return Err(ApiError::field("echo", why));
    }
    Ok(CompletionRequest { prompts, asked, delivery, echo })
}

/// A text, a list of texts, the ids of one prompt, or a list of the ids of several.
fn prompts(prompt: Option<Value>) -> Result<Vec<Prompt>, ApiError> {
    let expected = "a text, a list of texts, or token ids";
    let list = match prompt {
        None | Some(Value::Null) => {
            return Err(ApiError::field("prompt", format!("is missing: give {expected}")));
        }
        Some(Value::String(text)) => return Ok(vec![not_empty("prompt", Prompt::Text(text))?]),
        Some(Value::Array(list)) if list.is_empty() => {
            return Err(ApiError::field("prompt", format!("is empty: give {expected}")));
        }
        Some(Value::Array(list)) => list,
        Some(other) => {
            return Err(ApiError::field("prompt", format!("expected {expected}, found {}", found(&other))));
        }
    };
    if list.first().is_some_and(Value::is_number) {
        return Ok(vec![Prompt::Tokens(token_ids("prompt", &list)?)]);
    }
    let one = |index: usize, value: Value| {
        let field = format!("prompt[{index}]");
        let prompt = match value {
            Value::String(text) => Prompt::Text(text),
            Value::Array(ids) => Prompt::Tokens(token_ids(&field, &ids)?),
            other => {
                let why = format!("expected a text or a list of token ids, found {}", found(&other));
                return Err(ApiError::field(&field, why));
            }
        };
        not_empty(&field, prompt)
    };
    list.into_iter().enumerate().map(|(index, value)| one(index, value)).collect()
}

fn not_empty(field: &str, prompt: Prompt) -> Result<Prompt, ApiError> {
    if prompt.is_empty() {
        return Err(ApiError::field(field, "is empty: give what the model is to continue"));
    }
    Ok(prompt)
}

/// The text of a prompt, which `echo` puts before the answer.
fn echo_of(answer: &ChatAnswer, prompt: Prompt) -> Result<String, ApiError> {
    match prompt {
        Prompt::Text(text) => Ok(text),
        Prompt::Tokens(ids) => {
            let texts = (answer.texts)(&ids)?;
            let bytes: Vec<u8> = texts.into_iter().flat_map(|token| token.bytes).collect();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        }
        Prompt::Conversation(_) => Ok(String::new()),
    }
}

#[derive(Serialize)]
struct CompletionChoice {
    index: usize,
    text: String,
    /// Null where there are none.
    logprobs: Option<CompletionLogprobs>,
    #[serde(flatten)]
    end: ChoiceEnd,
}

/// The tokens of a text as lists of equal length.
#[derive(Default, Serialize)]
struct CompletionLogprobs {
    /// Where each token begins in the text, in characters.
    text_offset: Vec<usize>,
    tokens: Vec<String>,
    token_logprobs: Vec<Value>,
    /// For each token the best ones and itself: text to log probability.
    top_logprobs: Vec<Map<String, Value>>,
}

/// The text of a choice, as far as it is known.
struct CompletionText {
    /// The prompt, where it is echoed and not written yet.
    echo: String,
    /// Characters of the tokens so far, and of the echo.
    chars: usize,
    /// Tokens that wait for their text.
    waiting: Vec<ChosenToken>,
}

impl CompletionText {
    fn begins_with(echo: String) -> Self {
        Self { chars: echo.chars().count(), echo, waiting: Vec::new() }
    }

    /// The logprobs of the tokens that waited.
    fn take_logprobs(&mut self) -> Option<CompletionLogprobs> {
        if self.waiting.is_empty() {
            return None;
        }
        let mut lists = CompletionLogprobs::default();
        for ChosenToken { chosen, top } in std::mem::take(&mut self.waiting) {
            // A byte that continues a character does not begin one; a token that begins inside of a character
            // has the offset of that character.
            let begins = |byte: &&u8| **byte & 0b1100_0000 != 0b1000_0000;
            let inside = chosen.token.bytes.first().is_some_and(|byte| !begins(&byte));
            lists.text_offset.push(self.chars.saturating_sub(usize::from(inside)));
            self.chars += chosen.token.bytes.iter().filter(begins).count();
            let mut alternatives = Map::new();
            for score in top.iter().chain([&chosen]) {
                alternatives.entry(score.token.text.as_str()).or_insert_with(|| score.logprob_json());
            }
            lists.token_logprobs.push(chosen.logprob_json());
            lists.top_logprobs.push(alternatives);
            lists.tokens.push(chosen.token.text);
        }
        Some(lists)
    }
}

async fn whole_response(
    answer: ChatAnswer,
    heading: &Heading,
    delivery: Delivery,
    echoes: Vec<String>,
) -> Result<Response, ApiError> {
    let headers = answer.head.headers.clone();
    let mut usage = UsageSum::new(delivery.choices);
    let collected = answer.collect().await?;
    let mut choices = Vec::new();
    for (index, (choice, echo)) in collected.into_iter().zip(echoes).enumerate() {
        usage.add(index, choice.usage);
        let mut text = CompletionText { waiting: choice.logprobs, ..CompletionText::begins_with(echo) };
        let logprobs = text.take_logprobs();
        let end = ChoiceEnd::new(choice.reason, choice.stopped_by.as_ref(), true);
        choices.push(CompletionChoice { index, text: text.echo + &choice.content, logprobs, end });
    }
    Ok((headers, Json(heading.body(&choices, Some(usage.body())))).into_response())
}

/// Writes the chunks of completions.
struct CompletionChunks {
    heading: Heading,
    choices: Vec<CompletionText>,
}

impl ChunkWriter for CompletionChunks {
    fn heading(&self) -> &Heading {
        &self.heading
    }

    fn first_chunks(&mut self) -> Vec<Frame> {
        let echoes = self.choices.iter_mut().map(|choice| std::mem::take(&mut choice.echo));
        let echoes: Vec<String> = echoes.collect();
        let chunk = |(index, text)| {
            self.heading.chunk(CompletionChoice { index, text, logprobs: None, end: ChoiceEnd::OPEN })
        };
        echoes.into_iter().enumerate().filter(|(_, text)| !text.is_empty()).map(chunk).collect()
    }

    fn chunks(&mut self, event: ChatEvent) -> Vec<Frame> {
        let ChatEvent { choice: index, kind } = event;
        let Some(choice) = self.choices.get_mut(index) else { return Vec::new() };
        let (text, end) = match kind {
            ChatEventKind::Logprobs(tokens) => {
                choice.waiting.extend(tokens);
                return Vec::new();
            }
            ChatEventKind::Content(text) => (text, ChoiceEnd::OPEN),
            ChatEventKind::Finished { reason, stopped_by, .. } => {
                (String::new(), ChoiceEnd::new(reason, stopped_by.as_ref(), true))
            }
            // The answer to a prompt of text or tokens is read as text only.
            ChatEventKind::Reasoning(_)
            | ChatEventKind::CallBegin { .. }
            | ChatEventKind::CallArguments { .. } => return Vec::new(),
        };
        let logprobs = choice.take_logprobs();
        vec![self.heading.chunk(CompletionChoice { index, text, logprobs, end })]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TokenText;
    use crate::chat_answer::TokenScore;
    use serde_json::json;

    #[test]
    fn offsets_count_characters_and_not_bytes() {
        let token = |bytes: &[u8]| {
            let token =
                TokenText { text: String::from_utf8_lossy(bytes).into_owned(), bytes: bytes.to_vec() };
            ChosenToken { chosen: TokenScore { id: 0, token, logprob: f32::NEG_INFINITY }, top: Vec::new() }
        };
        let mut text = CompletionText::begins_with("h\u{e9}".to_owned());
        // The letter of two bytes is written by two tokens.
        text.waiting = vec![token(b"a"), token(&[0xc3]), token(&[0xa9]), token(b"bc")];
        let lists = text.take_logprobs().unwrap();
        assert_eq!(lists.text_offset, [2, 3, 3, 4]);
        assert_eq!(lists.token_logprobs[0], json!(-9999.0), "JSON has no infinity");
        text.waiting = vec![token(b"d")];
        assert_eq!(text.take_logprobs().unwrap().text_offset, [6]);
        assert!(text.take_logprobs().is_none());
    }
}
