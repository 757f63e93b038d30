//! Chat templates: from the messages of a conversation to the text that a model continues.
//!
//! A template is a Jinja program that comes with the model, so it is somebody else's code: it runs without files or
//! network, with a bound on its work, and sees only what a request hands in. The language is minijinja's; what
//! templates expect beyond it is here: the functions that transformers offers, JSON as Python writes it, and Python's
//! methods on texts, lists and maps.

pub(crate) mod config;
mod json;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, ErrorKind, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use serde::Serialize;
use std::fmt;
use std::time::SystemTime;
use thiserror::Error;

/// Work that rendering may take: an instruction counts one, and so do 64 bytes of a text that is made. A conversation of
/// a thousand messages takes about a hundred thousand.
const MOST_STEPS: u64 = 2_000_000;

/// Longest template in bytes; the longest known ones have some twenty thousand.
const MOST_BYTES: usize = 1 << 20;

/// The name that messages of a failing template carry.
const NAME: &str = "chat_template";

/// Marks that other programs use to find the assistant's part; the text is the same without them.
const MARKS: [(&str, &str); 2] = [("generation", "if true"), ("endgeneration", "endif")];

/// Why there is no text for a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ChatError {
    /// The model has no template.
    #[error(
        "the model has no chat template; write the prompt yourself, or take a model that was trained to chat"
    )]
    NoTemplate,
    /// The template is not Jinja as it is understood here.
    #[error("the model's chat template cannot be used: {0}")]
    Template(String),
    /// The template itself refuses the conversation.
    #[error("the model's chat template refuses the conversation: {0}")]
    Refused(String),
    /// The template failed on this conversation.
    #[error("the model's chat template failed: {0}")]
    Failed(String),
}

/// A conversation and what else a template may use.
#[derive(Debug, Clone)]
pub struct ChatRequest<'a> {
    /// The messages, oldest first: objects with `role`, `content` and whatever else the model's template reads.
    pub messages: &'a [serde_json::Value],
    /// Functions that the model may call, as JSON schemas; empty for none.
    pub tools: &'a [serde_json::Value],
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Further variables, such as `enable_thinking`; they do not replace those above.
    pub variables: &'a serde_json::Map<String, serde_json::Value>,
    /// What `strftime_now` tells, in UTC.
    pub now: SystemTime,
}

/// Texts of special tokens that templates may print.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct SpecialTokens {
    /// The beginning of a text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bos_token: Option<String>,
    /// The end of a text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eos_token: Option<String>,
    /// The unknown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unk_token: Option<String>,
    /// Padding.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pad_token: Option<String>,
}

/// A compiled template.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: SpecialTokens,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("special", &self.special).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// [`ChatError::Template`] with the line.
    pub fn new(source: &str, special: SpecialTokens) -> Result<Self, ChatError> {
        if source.len() > MOST_BYTES {
            let why = format!("it has {} bytes, more than {MOST_BYTES}", source.len());
            return Err(ChatError::Template(why));
        }
        let mut environment = environment();
        environment
            .add_template_owned(NAME, without_marks(source))
            .map_err(|error| ChatError::Template(describe(&error)))?;
        Ok(Self { environment, special })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`ChatError::Refused`] where the template says so, [`ChatError::Failed`] for everything else that goes wrong.
    pub fn render(&self, request: &ChatRequest<'_>) -> Result<String, ChatError> {
        let failed = |error: &minijinja::Error| match refusal(error) {
            Some(why) => ChatError::Refused(why),
            None => ChatError::Failed(describe(error)),
        };
        let mut environment = self.environment.clone();
        let now = request.now;
        environment.add_function("strftime_now", move |format: String| strftime(now, &format));
        // What stands later wins, so that a request cannot replace its own messages by a variable of that name.
        let mut context = request.variables.clone();
        if let Ok(serde_json::Value::Object(special)) = serde_json::to_value(&self.special) {
            context.extend(special);
        }
        context.insert("messages".to_owned(), request.messages.into());
        if request.tools.is_empty() {
            context.insert("tools".to_owned(), serde_json::Value::Null);
        } else {
            context.insert("tools".to_owned(), request.tools.into());
        }
        context.insert("add_generation_prompt".to_owned(), request.add_generation_prompt.into());
        let template = environment.get_template(NAME).map_err(|error| failed(&error))?;
        template.render(Serde(context)).map_err(|error| failed(&error))
    }
}

/// The language of chat templates, as transformers sets Jinja up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    if let Ok(syntax) = syntax.build() {
        environment.set_syntax(syntax);
    }
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(unknown_method_callback);
    environment.set_fuel(Some(MOST_STEPS));
    environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception")
            .with_source(Refusal(message)))
    });
    environment.add_filter("tojson", tojson);
    environment
}

/// A refusal on its way out of the template.
#[derive(Debug, Error)]
#[error("{0}")]
struct Refusal(String);

fn refusal(error: &minijinja::Error) -> Option<String> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(Refusal(message)) = error.downcast_ref() {
            return Some(message.clone());
        }
        cause = error.source();
    }
    None
}

/// The error with its line and what lies behind it.
fn describe(error: &minijinja::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn strftime(now: SystemTime, format: &str) -> Result<String, minijinja::Error> {
    let invalid = |error: jiff::Error| {
        minijinja::Error::new(ErrorKind::InvalidOperation, "strftime_now").with_source(error)
    };
    let now = Timestamp::try_from(now).map_err(invalid)?.to_zoned(TimeZone::UTC);
    jiff::fmt::strtime::format(format, &now).map_err(invalid)
}

/// `json.dumps` with the options that transformers passes on.
#[expect(clippy::needless_pass_by_value, reason = "the signature of a filter")]
fn tojson(value: Value, options: Kwargs) -> Result<String, minijinja::Error> {
    let invalid = |why: String| minijinja::Error::new(ErrorKind::InvalidOperation, why);
    if value.is_undefined() {
        return Err(invalid("an undefined value has no JSON".to_owned()));
    }
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<Vec<String>> = options.get("separators")?;
    let (item, key) = match separators.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("separators are two texts".to_owned())),
    };
    let ascii = options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sorted = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    options.assert_all_used()?;
    let value = serde_json::to_value(&value).map_err(|error| invalid(error.to_string()))?;
    Ok(json::Style { item, key, indent, ascii, sorted }.write(&value))
}

/// The template with [`MARKS`] turned into what they mean for the text, in whatever spelling of blanks and dashes.
fn without_marks(source: &str) -> String {
    let mut text = String::with_capacity(source.len());
    for (place, piece) in source.split("{%").enumerate() {
        if place == 0 {
            text.push_str(piece);
            continue;
        }
        text.push_str("{%");
        // A tag that never ends is named by the compiler.
        let (tag, after) = piece.split_at(piece.find("%}").unwrap_or(0));
        let word = tag.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        match MARKS.iter().find(|(mark, _)| *mark == word) {
            Some((mark, meaning)) => text.push_str(&tag.replacen(mark, meaning, 1)),
            None => text.push_str(tag),
        }
        text.push_str(after);
    }
    text
}

#[cfg(test)]
mod tests;
