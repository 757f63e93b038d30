//! Answers as the chat protocols need them: content, reasoning and tool calls of each choice, in order of
//! arrival.
//!
//! A codec makes one [`Generation`] for each choice ([`choices`]), calls [`ask`] or [`ask_whole`], and writes
//! the events of the [`ChatAnswer`] in the words of its protocol. The merged stream ends after the first
//! error.

use axum::http::HeaderMap;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use serde_json::{Value, json};

use crate::Api;
use crate::conversation::{Conversation, Prompt, ToolChoice};
use crate::error::ApiError;
use crate::fields::Generation;
use crate::inference::{Answer, Event, FinishReason, Logprobs, StoppedBy, TokenText, TokenTexts, Usage};
use crate::tools::{AnswerParser, Part};

/// The most answers that one request may ask for, `n` times the number of its prompts. Each is a request of
/// its own in the queue of the engine: one call then takes at most an eighth of the default queue of 512.
pub const MAX_ANSWERS: usize = 64;
/// The most choices of one prompt (`n`): requests of several prompts reach [`MAX_ANSWERS`] first.
pub const MAX_CHOICES: u32 = 16;

/// Bytes of one alternative in an answer: its text, the bytes of its text as numbers and its log probability.
/// Most tokens have up to 8 bytes, of which each takes up to 4 characters.
const ALTERNATIVE_BYTES: u64 = 128;
/// Tokens that a choice without a smaller limit of its own is expected to have at most.
const EXPECTED_TOKENS: u64 = 8192;
/// Most bytes that the log probabilities of one answer in one piece may take: half of what one caller alone
/// may have waiting (128 MiB), so that an answer is not refused for its length once it was made. One choice
/// of 8,192 tokens with 20 alternatives takes 22 MB.
const MAX_LOGPROB_BYTES: u64 = 64 * 1024 * 1024;

/// The answers to one request, admitted and with a first token.
pub struct ChatAnswer {
    /// What all choices share.
    pub head: ChatHead,
    /// The texts of tokens, by the model of the first choice.
    pub texts: TokenTexts,
    /// For each choice its parts, then exactly one [`ChatEventKind::Finished`]; or an error, after which
    /// nothing follows. Dropping the stream cancels the work.
    pub events: BoxStream<'static, Result<ChatEvent, ApiError>>,
}

/// What all choices of an answer share, known before the first token.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatHead {
    /// Unique id, of the first choice.
    pub id: String,
    /// The first of the names that the model answers to.
    pub model: String,
    /// sha256 of the weights that answer, 64 hex digits.
    pub model_digest: String,
    /// When the request was admitted, in seconds since 1970.
    pub created_unix_s: u64,
    /// Tokens of the prompt of each choice.
    pub prompt_tokens: Vec<u32>,
    /// Headers that every HTTP answer carries.
    pub headers: HeaderMap,
}

/// One event of one choice.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatEvent {
    /// Index of the choice, as the generations were passed to [`ask`].
    pub choice: usize,
    /// What happened.
    pub kind: ChatEventKind,
}

/// What happens in an answer.
#[derive(Debug, Clone, PartialEq)]
pub enum ChatEventKind {
    /// Text for the user, not empty.
    Content(String),
    /// Text of the model's reasoning, not empty.
    Reasoning(String),
    /// A tool call begins. Whether it is complete is known at the end of the choice.
    CallBegin {
        /// Number of the call within its choice, from 0 without gaps.
        index: u32,
        /// Its id.
        id: String,
        /// The name of the function.
        name: String,
    },
    /// A piece of the arguments of a call, as JSON text.
    CallArguments {
        /// Number of the call.
        index: u32,
        /// The piece.
        text: String,
    },
    /// The tokens since the last event of this kind, where the request asked for logprobs. It precedes the
    /// text of the last of its tokens. A token that added no text, such as the end token or those of a stop
    /// text, is not listed.
    Logprobs(Vec<ChosenToken>),
    /// The end of the choice.
    Finished {
        /// Why it ended.
        reason: ChatFinish,
        /// What of the request ended it, where that was not the model, its format or a limit.
        stopped_by: Option<StoppedBy>,
        /// The call that began last, where its arguments were cut or are no JSON: it is no call.
        cut_call: Option<u32>,
        /// What was counted.
        usage: ChatUsage,
    },
}

/// Why a choice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatFinish {
    /// The model ended it, or a stop text, a stop token or the format did.
    Stop,
    /// `max_tokens` or the context was reached. Complete calls may precede it.
    Length,
    /// The choice holds at least one call and ended by itself.
    ToolCalls,
}

/// Tokens of one choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChatUsage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// New tokens, the end token included.
    pub completion_tokens: u32,
    /// The new tokens that wrote reasoning.
    pub reasoning_tokens: u32,
}

/// A token of an answer with the model's opinion of it.
#[derive(Debug, Clone, PartialEq)]
pub struct ChosenToken {
    /// The token itself.
    pub chosen: TokenScore,
    /// The best tokens, best first, as many as the request asked for.
    pub top: Vec<TokenScore>,
}

/// A token with its log probability.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenScore {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub token: TokenText,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// The log probability that stands for minus infinity, which JSON cannot write; OpenAI's number.
const LOWEST_LOGPROB: f64 = -9999.0;

impl TokenScore {
    /// The log probability with the six places that an f32 holds, in a range that JSON can write.
    pub fn logprob_json(&self) -> Value {
        if self.logprob.is_finite() {
            json!((f64::from(self.logprob) * 1e6).round() / 1e6)
        } else {
            json!(LOWEST_LOGPROB)
        }
    }

    /// `{"token", "logprob", "bytes"}`.
    pub fn to_json(&self) -> Value {
        json!({"token": self.token.text, "logprob": self.logprob_json(), "bytes": self.token.bytes})
    }
}

impl ChosenToken {
    /// `{"token", "logprob", "bytes", "top_logprobs"}`: the shape of chat completions and of responses.
    pub fn to_json(&self) -> Value {
        let mut token = self.chosen.to_json();
        token["top_logprobs"] = self.top.iter().map(TokenScore::to_json).collect();
        token
    }
}

/// A choice with all of its parts.
#[derive(Debug, Clone, PartialEq)]
pub struct CollectedChoice {
    /// Text for the user; may be empty.
    pub content: String,
    /// Text of the model's reasoning; may be empty.
    pub reasoning: String,
    /// Calls in order.
    pub calls: Vec<CollectedCall>,
    /// The tokens, where the request asked for logprobs.
    pub logprobs: Vec<ChosenToken>,
    /// Why it ended.
    pub reason: ChatFinish,
    /// What of the request ended it.
    pub stopped_by: Option<StoppedBy>,
    /// What was counted.
    pub usage: ChatUsage,
}

/// A tool call with all of its arguments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CollectedCall {
    /// Its id.
    pub id: String,
    /// The name of the function.
    pub name: String,
    /// JSON text.
    pub arguments: String,
}

/// One generation for each of `count` choices. Where a seed is given, each choice gets its own: seed + index.
/// A copy is made when its choice is admitted: a request may be large.
pub fn choices(request: Generation, count: u32) -> impl Iterator<Item = Generation> + Send {
    let copies = std::iter::repeat_n(request, count as usize).zip(0..);
    copies.map(|(request, index): (Generation, u64)| {
        let seed = request.seed.map(|seed| seed.wrapping_add(index));
        Generation { seed, ..request }
    })
}

/// Asks for an answer to each of `requests` (at least one), and waits until all are admitted and the first of
/// them has a token: until then a failure is an ordinary refusal, which a caller may send again.
///
/// Calls begin as soon as their function is known, for answers that are streamed.
///
/// # Errors
/// Any [`ApiError`]; nothing is left running.
pub async fn ask(api: &Api, requests: impl IntoIterator<Item = Generation>) -> Result<ChatAnswer, ApiError> {
    admit(api, requests, CallDelivery::AtOnce).await
}

/// [`ask`] for an answer in one piece: only complete calls are calls, and what looked like one is content.
///
/// # Errors
/// As [`ask`].
pub async fn ask_whole(
    api: &Api,
    requests: impl IntoIterator<Item = Generation>,
) -> Result<ChatAnswer, ApiError> {
    admit(api, requests, CallDelivery::Complete).await
}

/// When a call is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CallDelivery {
    /// As soon as its function is known.
    AtOnce,
    /// When all of it is known.
    Complete,
}

async fn admit(
    api: &Api,
    requests: impl IntoIterator<Item = Generation>,
    calls: CallDelivery,
) -> Result<ChatAnswer, ApiError> {
    let mut head = None;
    let mut texts = None;
    let mut prompt_tokens = Vec::new();
    let mut streams = Vec::new();
    let requests = requests.into_iter();
    let expected = requests.size_hint().0;
    for (choice, request) in requests.enumerate() {
        if choice == 0 && calls == CallDelivery::Complete {
            check_whole(&request, expected)?;
        }
        let plan = ParsePlan::of(&request, calls);
        let answer = api.inference.generate(request).await?;
        prompt_tokens.push(answer.prompt_tokens);
        let first = head.get_or_insert_with(|| ChatHead {
            id: answer.id.clone(),
            model: answer.model.clone(),
            model_digest: answer.model_digest.clone(),
            created_unix_s: answer.created_unix_s,
            prompt_tokens: Vec::new(),
            headers: answer.head_headers(),
        });
        if first.model_digest != answer.model_digest {
            let message = "the model changed while the choices were admitted; send the request again";
            return Err(ApiError::Unavailable { message: message.to_owned(), retry_after_s: Some(0) });
        }
        texts.get_or_insert_with(|| answer.texts.clone());
        streams.push(ChoiceReader::new(choice, &plan, answer).into_stream());
    }
    let (mut head, texts) = head.zip(texts).ok_or_else(ApiError::ended_early)?;
    head.prompt_tokens = prompt_tokens;
    let mut batches = until_error(stream::select_all(streams).boxed());
    let first = batches.next().await.ok_or_else(ApiError::ended_early)??;
    let rest = batches.flat_map(|batch| {
        stream::iter(match batch {
            Ok(events) => events.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        })
    });
    let events = stream::iter(first.into_iter().map(Ok)).chain(rest).boxed();
    Ok(ChatAnswer { head, texts, events })
}

/// Refuses an answer in one piece whose log probabilities would be too long, before anything is computed.
///
/// # Errors
/// [`ApiError::InvalidRequest`] with the arithmetic.
pub(crate) fn check_whole(request: &Generation, choices: usize) -> Result<(), ApiError> {
    let alternatives = request.options.logprobs.map_or(0, |count| u64::from(count) + 1);
    let tokens = u64::from(request.max_tokens).min(EXPECTED_TOKENS);
    let bytes = choices as u64 * tokens * alternatives * ALTERNATIVE_BYTES;
    if bytes <= MAX_LOGPROB_BYTES {
        return Ok(());
    }
    let why = format!(
        "the log probabilities of {choices} choices may take {bytes} bytes, at {ALTERNATIVE_BYTES} for each token and \
         alternative, more than {MAX_LOGPROB_BYTES}: ask for fewer tokens, choices or alternatives, or set stream"
    );
    Err(ApiError::field("logprobs", why))
}

impl ChatAnswer {
    /// Waits for the end of all choices.
    ///
    /// # Errors
    /// The first error of any choice.
    pub async fn collect(mut self) -> Result<Vec<CollectedChoice>, ApiError> {
        let empty = || CollectedChoice {
            content: String::new(),
            reasoning: String::new(),
            calls: Vec::new(),
            logprobs: Vec::new(),
            reason: ChatFinish::Length,
            stopped_by: None,
            usage: ChatUsage::default(),
        };
        let mut choices: Vec<CollectedChoice> = self.head.prompt_tokens.iter().map(|_| empty()).collect();
        let mut unfinished = choices.len();
        while let Some(event) = self.events.next().await {
            let ChatEvent { choice, kind } = event?;
            unfinished -= usize::from(matches!(kind, ChatEventKind::Finished { .. }));
            choices.get_mut(choice).ok_or_else(ApiError::ended_early)?.add(kind);
        }
        if unfinished > 0 { Err(ApiError::ended_early()) } else { Ok(choices) }
    }
}

impl CollectedChoice {
    fn add(&mut self, kind: ChatEventKind) {
        match kind {
            ChatEventKind::Content(text) => self.content.push_str(&text),
            ChatEventKind::Reasoning(text) => self.reasoning.push_str(&text),
            ChatEventKind::CallBegin { id, name, .. } => {
                self.calls.push(CollectedCall { id, name, arguments: String::new() });
            }
            // Pieces follow the beginning of their own call.
            ChatEventKind::CallArguments { text, .. } => {
                if let Some(call) = self.calls.last_mut() {
                    call.arguments.push_str(&text);
                }
            }
            ChatEventKind::Logprobs(tokens) => self.logprobs.extend(tokens),
            ChatEventKind::Finished { reason, stopped_by, cut_call, usage } => {
                // Calls are numbered from 0 without gaps, and only the last one can be cut.
                if let Some(index) = cut_call {
                    self.calls.truncate(index as usize);
                }
                (self.reason, self.stopped_by, self.usage) = (reason, stopped_by, usage);
            }
        }
    }
}

/// What of a request decides how its answer is read.
struct ParsePlan {
    tools: Vec<Value>,
    choice: ToolChoice,
    calls: CallDelivery,
    /// At most one call is wanted.
    single_call: bool,
    /// The caller's format holds from the first token on: the answer has no reasoning.
    formatted: bool,
}

impl ParsePlan {
    fn of(request: &Generation, calls: CallDelivery) -> Self {
        let formatted = request.options.format.is_some();
        match &request.prompt {
            Prompt::Conversation(conversation) => {
                let Conversation { tools, tool_choice, parallel_tool_calls, .. } = conversation.as_ref();
                let single_call = !parallel_tool_calls;
                Self { tools: tools.clone(), choice: tool_choice.clone(), calls, single_call, formatted }
            }
            Prompt::Text(_) | Prompt::Tokens(_) => {
                Self { tools: Vec::new(), choice: ToolChoice::None, calls, single_call: false, formatted }
            }
        }
    }
}

/// A token whose logprobs wait for its text.
struct UnlistedToken {
    id: u32,
    logprobs: Logprobs,
}

/// Reads one choice.
struct ChoiceReader {
    choice: usize,
    texts: TokenTexts,
    events: BoxStream<'static, Result<Event, ApiError>>,
    parser: AnswerParser,
    single_call: bool,
    /// Calls that the parser found.
    calls: u32,
    unlisted: Vec<UnlistedToken>,
    usage: ChatUsage,
    ended: bool,
}

type Batch = Result<Vec<ChatEvent>, ApiError>;

impl ChoiceReader {
    fn new(choice: usize, plan: &ParsePlan, answer: Answer) -> Self {
        let mut syntax = answer.syntax;
        if plan.formatted {
            syntax.reasoning = None;
        }
        let mut parser = AnswerParser::new(syntax, &plan.tools, &plan.choice);
        if plan.calls == CallDelivery::Complete {
            parser = parser.whole_calls();
        }
        Self {
            choice,
            texts: answer.texts,
            events: answer.events,
            parser,
            single_call: plan.single_call,
            calls: 0,
            unlisted: Vec::new(),
            usage: ChatUsage { prompt_tokens: answer.prompt_tokens, ..ChatUsage::default() },
            ended: false,
        }
    }

    /// The events of each event of the engine, possibly none.
    fn into_stream(self) -> BoxStream<'static, Batch> {
        let next = async |mut reader: Self| {
            if reader.ended {
                return None;
            }
            let batch = reader.next_batch().await;
            Some((batch, reader))
        };
        stream::unfold(self, next).boxed()
    }

    async fn next_batch(&mut self) -> Batch {
        let kinds = match self.events.next().await.unwrap_or_else(|| Err(ApiError::ended_early()))? {
            Event::Token { id, text, logprobs } => {
                self.unlisted.extend(logprobs.map(|logprobs| UnlistedToken { id, logprobs }));
                self.token(&text)?
            }
            Event::Finished { reason, stopped_by, usage } => self.finish(reason, stopped_by, usage)?,
        };
        let choice = self.choice;
        Ok(kinds.into_iter().map(|kind| ChatEvent { choice, kind }).collect())
    }

    fn token(&mut self, text: &str) -> Result<Vec<ChatEventKind>, ApiError> {
        self.usage.completion_tokens += 1;
        let mut kinds = Vec::new();
        if !text.is_empty() {
            kinds.extend(self.list_tokens()?);
        }
        let parts = self.parser.push(text);
        self.usage.reasoning_tokens += u32::from(parts.iter().any(|part| matches!(part, Part::Reasoning(_))));
        self.add_parts(parts, &mut kinds);
        Ok(kinds)
    }

    fn finish(
        &mut self,
        reason: FinishReason,
        stopped_by: Option<StoppedBy>,
        counted: Usage,
    ) -> Result<Vec<ChatEventKind>, ApiError> {
        let mut kinds = Vec::new();
        if reason == FinishReason::Length {
            kinds.extend(self.list_tokens()?);
        }
        self.usage.prompt_tokens = counted.prompt_tokens;
        self.usage.completion_tokens = counted.completion_tokens;
        let parts = self.parser.finish();
        self.add_parts(parts, &mut kinds);
        if !self.ended {
            let complete = self.calls.saturating_sub(u32::from(self.parser.cut_call().is_some()));
            let reason = match reason {
                FinishReason::Length => ChatFinish::Length,
                FinishReason::Stop if complete > 0 => ChatFinish::ToolCalls,
                FinishReason::Stop => ChatFinish::Stop,
            };
            self.end(reason, stopped_by, &mut kinds);
        }
        Ok(kinds)
    }

    /// Adds the events of parts. Where one call is wanted, the beginning of a second one ends the choice, and
    /// the engine is left at once.
    fn add_parts(&mut self, parts: Vec<Part>, kinds: &mut Vec<ChatEventKind>) {
        for part in parts {
            let kind = match part {
                Part::Content(text) => ChatEventKind::Content(text),
                Part::Reasoning(text) => ChatEventKind::Reasoning(text),
                Part::CallBegin { .. } if self.single_call && self.calls > 0 => {
                    return self.end(ChatFinish::ToolCalls, None, kinds);
                }
                Part::CallBegin { index, id, name } => {
                    self.calls += 1;
                    ChatEventKind::CallBegin { index, id, name }
                }
                Part::CallArguments { index, text } => ChatEventKind::CallArguments { index, text },
            };
            kinds.push(kind);
        }
    }

    fn end(&mut self, reason: ChatFinish, stopped_by: Option<StoppedBy>, kinds: &mut Vec<ChatEventKind>) {
        self.ended = true;
        self.events = stream::empty().boxed();
        let cut_call = self.parser.cut_call();
        kinds.push(ChatEventKind::Finished { reason, stopped_by, cut_call, usage: self.usage });
    }

    /// The tokens that were not listed yet, with their texts.
    fn list_tokens(&mut self) -> Result<Option<ChatEventKind>, ApiError> {
        if self.unlisted.is_empty() {
            return Ok(None);
        }
        let unlisted = std::mem::take(&mut self.unlisted);
        let mut scores: Vec<(u32, f32)> = Vec::new();
        for UnlistedToken { id, logprobs } in &unlisted {
            scores.push((*id, logprobs.logprob));
            scores.extend(&logprobs.top);
        }
        let ids: Vec<u32> = scores.iter().map(|(id, _)| *id).collect();
        let texts = (self.texts)(&ids)?;
        let mut scored =
            scores.into_iter().zip(texts).map(|((id, logprob), token)| TokenScore { id, token, logprob });
        let tokens = unlisted.iter().map_while(|UnlistedToken { logprobs, .. }| {
            let chosen = scored.next()?;
            Some(ChosenToken { chosen, top: scored.by_ref().take(logprobs.top.len()).collect() })
        });
        Ok(Some(ChatEventKind::Logprobs(tokens.collect())))
    }
}

/// The same items up to the first error; what follows is dropped, and with it the work behind it.
fn until_error<T: Send + 'static>(
    items: BoxStream<'static, Result<T, ApiError>>,
) -> BoxStream<'static, Result<T, ApiError>> {
    let next = async |items: Option<BoxStream<'static, Result<T, ApiError>>>| {
        let mut items = items?;
        let item = items.next().await?;
        let rest = item.is_ok().then_some(items);
        Some((item, rest))
    };
    stream::unfold(Some(items), next).boxed()
}
