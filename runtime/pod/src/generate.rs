//! A request for a generation on its way to the engine, and the engine's events on their way back.

use std::time::{Duration, SystemTime};

use trustformers_api::{
    AnswerSyntax, ApiError, Conversation, CountRequest, Event, FinishReason, Generation, Logprobs, Prompt,
    StoppedBy, TokenText, ToolChoice, Usage,
};
use trustformers_engine::{
    Engine, GenerateError, GenerationEvent, Prompt as EnginePrompt, RequestFault, StopCause, SubmitError,
    TokenLogprobs,
};
use trustformers_model::{Model, TokenizerProblem};
use trustformers_telemetry::traces::Trace;

use crate::conversation::{control_tokens, render};
use crate::inflight::InflightGuard;
use crate::params::{generate_params, with_model_settings};
use crate::runner::Runner;
use crate::trace::PhaseSpans;

/// Seconds after which a refused caller may try again: a small model frees a place within one.
pub(crate) const RETRY_AFTER_S: u32 = 1;
/// Longer prompts are tokenised, and formats compiled, away from the threads that serve connections. A
/// shorter prompt takes less than the few milliseconds that a connection may wait.
pub(crate) const LONG_PROMPT_BYTES: usize = 16 * 1024;

/// What the engine took.
pub(crate) struct Submitted {
    pub(crate) generation: trustformers_engine::Generation,
    /// How the model writes calls and reasoning.
    pub(crate) syntax: AnswerSyntax,
}

/// Whether [`submit`] may take longer than a connection may wait.
pub(crate) fn is_long(request: &Generation) -> bool {
    let prompt = match &request.prompt {
        Prompt::Text(text) => text.len() > LONG_PROMPT_BYTES,
        Prompt::Tokens(_) => false,
        Prompt::Conversation(_) => true,
    };
    prompt || request.options.format.is_some()
}

/// Whether a grammar is compiled for a request: its answer has a format, or must be a call.
pub(crate) fn has_format(request: &Generation) -> bool {
    let must_call = |conversation: &Conversation| {
        matches!(conversation.tool_choice, ToolChoice::Required | ToolChoice::Named(_))
    };
    let calls = matches!(&request.prompt, Prompt::Conversation(conversation) if must_call(conversation));
    calls || request.options.format.is_some()
}

/// Gives a request to the engine, which answers with the adapter if one is named: renders a conversation,
/// tokenises a text, compiles a format.
pub(crate) fn submit(
    engine: &Engine,
    mut request: Generation,
    adapter: Option<String>,
    trace: &Trace,
) -> Result<Submitted, ApiError> {
    let preparing = trace.child("prepare");
    let mut visible_tokens = Vec::new();
    let asked_format = request.options.format.is_some();
    let (prompt, syntax) = match std::mem::take(&mut request.prompt) {
        Prompt::Text(text) => {
            check_length(engine, &text)?;
            (EnginePrompt::Text(text), AnswerSyntax::default())
        }
        Prompt::Tokens(ids) => (EnginePrompt::Tokens(ids), AnswerSyntax::default()),
        Prompt::Conversation(conversation) => {
            let model = engine.model();
            let rendered = render(model, &conversation, request.options.format.take())?;
            check_length(engine, &rendered.text)?;
            request.options.format = rendered.format;
            visible_tokens = control_tokens(model, &rendered.syntax.tags());
            let ids =
                model.tokenizer().encode_rendered(&rendered.text).map_err(|error| untokenised(&error))?;
            (EnginePrompt::Tokens(ids), rendered.syntax)
        }
    };
    let request = with_model_settings(request, engine.model().sampling());
    let mut params = generate_params(request, prompt);
    params.visible_tokens = visible_tokens;
    params.adapter = adapter;
    let generation = engine.submit_observed(&params, PhaseSpans::of(trace)).map_err(|error| match error {
        // The only grammar that the caller did not write as a format is the one of its functions.
        SubmitError::Invalid { field: "response_format", why } if !asked_format => {
            ApiError::field("tools", why)
        }
        error => refused(&error),
    })?;
    drop(preparing);
    Ok(Submitted { generation, syntax })
}

/// How many tokens a prompt has.
pub(crate) fn count(runner: &Runner, request: &CountRequest) -> Result<u32, ApiError> {
    let model = runner.model();
    let tokens = match (runner, &request.prompt) {
        (_, Prompt::Tokens(ids)) => ids.len(),
        (Runner::Embed(_) | Runner::Classify(_) | Runner::Rerank(_), Prompt::Text(text)) => {
            check_bytes(model, runner.context_tokens(), text)?;
            model.encode(text).map_err(|error| untokenised(&error))?.ids.len()
        }
        (Runner::Generate(engine), Prompt::Text(text)) => {
            check_length(engine, text)?;
            model.tokenizer().encode(text).map_err(|error| untokenised(&error))?.len()
        }
        (_, Prompt::Conversation(conversation)) => {
            let rendered = render(model, conversation, None)?;
            check_bytes(model, runner.context_tokens(), &rendered.text)?;
            let ids = model.tokenizer().encode_rendered(&rendered.text);
            ids.map_err(|error| untokenised(&error))?.len()
        }
    };
    Ok(u32::try_from(tokens).unwrap_or(u32::MAX))
}

/// What each of these ids adds to a text. A control token is spelled, as in a prompt.
pub(crate) fn texts(model: &Model, ids: &[u32]) -> Result<Vec<TokenText>, ApiError> {
    let tokenizer = model.tokenizer();
    let vocabulary = tokenizer.len();
    let text = |id: &u32| {
        if *id as usize >= vocabulary {
            let why = format!("token id {id} is outside the model's vocabulary of {vocabulary}");
            return Err(ApiError::field("prompt", why));
        }
        let bytes = match tokenizer.token_bytes(*id) {
            [] => tokenizer.token(*id).unwrap_or_default().into_bytes(),
            bytes => bytes.to_vec(),
        };
        Ok(TokenText { text: String::from_utf8_lossy(&bytes).into_owned(), bytes })
    };
    ids.iter().map(text).collect()
}

/// The present time, in seconds since the Unix epoch.
pub(crate) fn now_unix_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn untokenised(error: &TokenizerProblem) -> ApiError {
    ApiError::field("prompt", error)
}

/// Refuses a prompt that has too many tokens however it is tokenised. One token is left for the answer.
fn check_length(engine: &Engine, prompt: &str) -> Result<(), ApiError> {
    check_bytes(engine.model(), engine.info().context_tokens.saturating_sub(1), prompt)
}

/// Refuses a text that has more than `most` tokens however it is tokenised. Tokenising takes some hundred
/// bytes of memory for each byte of a text, so a text of which the answer is known is not tokenised.
fn check_bytes(model: &Model, most: usize, text: &str) -> Result<(), ApiError> {
    // A token stands for at least one byte; the exact figure is only needed for texts that may be too long.
    if text.len() <= most {
        return Ok(());
    }
    let longest = model.tokenizer().longest_token_bytes();
    if text.len() <= most.saturating_mul(longest) {
        return Ok(());
    }
    let bytes = text.len();
    let message = format!(
        "prompt: it is {bytes} bytes long, and the {most} tokens that fit stand for at most {longest} bytes each; shorten it"
    );
    Err(ApiError::TooLong { message })
}

/// An event of the engine as one of the API. `_busy` is only carried: it ends when the stream is dropped.
pub(crate) fn translate(
    event: Result<GenerationEvent, GenerateError>,
    _busy: &InflightGuard,
) -> Result<Event, ApiError> {
    let count = |tokens: usize| u32::try_from(tokens).unwrap_or(u32::MAX);
    match event {
        Ok(GenerationEvent::Token { id, text, logprobs, .. }) => {
            let logprobs = logprobs.map(|TokenLogprobs { logprob, top }| Logprobs { logprob, top });
            Ok(Event::Token { id, text, logprobs })
        }
        Ok(GenerationEvent::Finished { reason, stop, prompt_tokens, completion_tokens, .. }) => {
            Ok(Event::Finished {
                stopped_by: stop.map(|stop| match stop {
                    StopCause::Text(text) => StoppedBy::Text(text),
                    StopCause::Token(id) => StoppedBy::Token(id),
                }),
                reason: match reason {
                    trustformers_engine::FinishReason::Stop => FinishReason::Stop,
                    trustformers_engine::FinishReason::Length => FinishReason::Length,
                },
                usage: Usage {
                    prompt_tokens: count(prompt_tokens),
                    completion_tokens: count(completion_tokens),
                },
            })
        }
        Err(error @ GenerateError::Stopped) => {
            Err(ApiError::Unavailable { message: error.to_string(), retry_after_s: Some(RETRY_AFTER_S) })
        }
        Err(GenerateError::Request(fault)) => {
            let field = matches!(fault, RequestFault::Grammar { .. }).then(|| "response_format".to_owned());
            Err(ApiError::InvalidRequest { field, message: fault.to_string() })
        }
        Err(error @ GenerateError::Overloaded { retry_after }) => {
            Err(overloaded(error.to_string(), retry_after))
        }
        Err(error) => Err(ApiError::Internal { message: error.to_string() }),
    }
}

/// A refusal with the time of the next attempt.
pub(crate) fn overloaded(message: String, retry_after: Duration) -> ApiError {
    ApiError::Overloaded { message, retry_after_s: u32::try_from(retry_after.as_secs()).unwrap_or(u32::MAX) }
}

pub(crate) fn refused(error: &SubmitError) -> ApiError {
    let message = error.to_string();
    match error {
        SubmitError::Overloaded { retry_after, .. } | SubmitError::Busy { retry_after, .. } => {
            overloaded(message, *retry_after)
        }
        SubmitError::PromptTooLong { .. } => ApiError::TooLong { message },
        // Callers name an adapter in the model's name.
        SubmitError::Invalid { field: "adapter", .. } => {
            ApiError::InvalidRequest { field: Some("model".to_owned()), message }
        }
        SubmitError::Invalid { field, .. } => {
            ApiError::InvalidRequest { field: Some((*field).to_owned()), message }
        }
        SubmitError::Model(_) => ApiError::Internal { message },
        SubmitError::Stopped => ApiError::Unavailable { message, retry_after_s: Some(RETRY_AFTER_S) },
    }
}
