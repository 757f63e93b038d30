//! Chat templates: from the messages of a conversation to the text that a model continues.
//!
//! A template is a Jinja program that comes with the model, so it is untrusted code. It runs without files or
//! network, sees only the request's values, and has bounds on its work and its memory: [`MAX_STEPS`] on
//! instructions, [`MAX_BYTES`] on its source, and a thread of its own with [`STACK_BYTES`] of stack. The
//! language is minijinja's; this module adds the functions of transformers, JSON as Python writes it, and
//! Python's methods on texts, lists and maps.

pub(crate) mod config;
mod json;
mod namespace;
mod rewrite;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, ErrorKind, Value};
use minijinja_contrib::pycompat::unknown_method_callback;
use namespace::Namespace;
use serde::Serialize;
use std::fmt;
use std::time::SystemTime;
use thiserror::Error;

/// Bound on the work of rendering: each instruction counts one, and so do 64 bytes of text. A conversation of
/// a thousand messages takes about a hundred thousand.
const MAX_STEPS: u64 = 500_000;

/// Longest template in bytes; the longest known ones have some twenty thousand.
const MAX_BYTES: usize = 128 << 10;

/// Longest tag or expression in bytes. The compiler evaluates constants at each level of a chain such as
/// `1+1+1` anew: 8 million steps for the 4 Ki levels of such a tag.
const MAX_TAG_BYTES: usize = 8 << 10;

/// Stack of the thread that compiles or renders. A template can nest one level of a value with each
/// instruction: half a million levels at most, which printing, comparing or dropping the value goes through,
/// so there are 1 KiB for each. The compiler recurses far less: 4 Ki levels for a chain of [`MAX_TAG_BYTES`].
/// The system provides memory only for the pages that are used.
const STACK_BYTES: usize = 512 << 20;

/// The name of the template in messages.
const NAME: &str = "chat_template";

/// The name of the template for conversations with tools, in messages and in files.
pub(crate) const TOOLS: &str = "tool_use";

/// Longest message of a template's own refusal, in characters.
const MAX_REFUSAL_CHARS: usize = 1000;

/// Why there is no text for a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ChatError {
    /// The model has no template.
    #[error(
        "the model has no chat template; send a prompt without a conversation, or use a model that was trained to chat"
    )]
    NoTemplate,
    /// The template does not compile.
    #[error("the model's chat template cannot be used: {0}")]
    Template(String),
    /// The template itself refuses the conversation.
    #[error("the model's chat template refuses the conversation: {0}")]
    Refused(String),
    /// The template failed on this conversation.
    #[error("the model's chat template failed: {0}")]
    Failed(String),
}

/// A conversation, and the other values that a template may use.
#[derive(Debug, Clone)]
pub struct ChatRequest<'a> {
    /// The messages, oldest first: objects with `role`, `content` and the other keys that the model's
    /// template reads.
    pub messages: &'a [serde_json::Value],
    /// Functions that the model may call, as JSON schemas; empty for none.
    pub tools: &'a [serde_json::Value],
    /// Whether the text ends where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// Further variables, such as `enable_thinking`; they do not replace those above.
    pub variables: &'a serde_json::Map<String, serde_json::Value>,
    /// The time that `strftime_now` returns, in UTC.
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
    /// Whether there is a template of its own for conversations with tools, and what is wrong with it.
    tools: Option<Result<(), ChatError>>,
    /// The text of that template.
    tools_source: Option<String>,
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
        let environment = compiled(source, NAME, environment())?;
        Ok(Self { environment, special, tools: None, tools_source: None })
    }

    /// Adds the template that conversations with tools take. Where it cannot be used, only they fail.
    #[must_use]
    pub fn with_tools(mut self, source: &str) -> Self {
        let compiled = compiled(source, TOOLS, self.environment.clone());
        self.tools = Some(compiled.map(|environment| self.environment = environment));
        self.tools_source = Some(source.to_owned());
        self
    }

    /// The Jinja text of the template that conversations with tools take, where it is another one.
    pub fn tools_source(&self) -> Option<&str> {
        self.tools_source.as_deref()
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`ChatError::Refused`] where the template says so, [`ChatError::Failed`] for everything else that goes
    /// wrong.
    pub fn render(&self, request: &ChatRequest<'_>) -> Result<String, ChatError> {
        on_large_stack(|| self.render_here(request)).unwrap_or_else(|why| Err(ChatError::Failed(why)))
    }

    fn render_here(&self, request: &ChatRequest<'_>) -> Result<String, ChatError> {
        let failed = |error: &minijinja::Error| match refusal(error) {
            Some(why) => ChatError::Refused(why),
            None => ChatError::Failed(describe(error)),
        };
        let mut environment = self.environment.clone();
        let now = request.now;
        environment.add_function("strftime_now", move |format: String| strftime(now, &format));
        // Later entries win, so a request cannot replace its own messages by a variable of that name.
        let mut context = request.variables.clone();
        if let Ok(serde_json::Value::Object(special)) = serde_json::to_value(&self.special) {
            context.extend(special);
        }
        let messages: Vec<serde_json::Value> = request.messages.iter().map(with_reasoning).collect();
        context.insert("messages".to_owned(), messages.into());
        if request.tools.is_empty() {
            context.insert("tools".to_owned(), serde_json::Value::Null);
        } else {
            context.insert("tools".to_owned(), request.tools.into());
        }
        context.insert("add_generation_prompt".to_owned(), request.add_generation_prompt.into());
        let name = match &self.tools {
            Some(compiled) if !request.tools.is_empty() => compiled.clone().map(|()| TOOLS)?,
            _ => NAME,
        };
        let template = environment.get_template(name).map_err(|error| failed(&error))?;
        template.render(Serde(context)).map_err(|error| failed(&error))
    }
}

/// Names under which callers send the reasoning of an earlier answer. Templates read the first or the second.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// A message whose reasoning stands under both names that templates read, as transformers gives it to them.
fn with_reasoning(message: &serde_json::Value) -> serde_json::Value {
    let found = REASONING.iter().filter_map(|key| message.get(*key)).find(|value| !value.is_null());
    let (Some(reasoning), Some(entries)) = (found, message.as_object()) else { return message.clone() };
    let mut own = serde_json::Map::new();
    own.insert("thinking".to_owned(), reasoning.clone());
    own.extend(entries.clone());
    own.insert("reasoning_content".to_owned(), reasoning.clone());
    own.into()
}

/// The environment with a template under this name.
fn compiled(
    source: &str,
    name: &'static str,
    mut environment: Environment<'static>,
) -> Result<Environment<'static>, ChatError> {
    if source.len() > MAX_BYTES {
        let why = format!("it has {} bytes, more than {MAX_BYTES}", source.len());
        return Err(ChatError::Template(why));
    }
    let longest = rewrite::longest_tag(source);
    if longest > MAX_TAG_BYTES {
        let why = format!("it has a tag of {longest} bytes, more than {MAX_TAG_BYTES}");
        return Err(ChatError::Template(why));
    }
    let compile = move || {
        environment
            .add_template_owned(name, rewrite::rewrite(source))
            .map_err(|error| ChatError::Template(describe(&error)))?;
        Ok(environment)
    };
    on_large_stack(compile).unwrap_or_else(|why| Err(ChatError::Template(why)))
}

/// Runs a template's work on a thread with [`STACK_BYTES`] of stack, and contains a panic of the library.
/// Everything that the template made is dropped there too.
fn on_large_stack<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("chat".to_owned()).stack_size(STACK_BYTES);
        match thread.spawn_scoped(scope, work).map(std::thread::ScopedJoinHandle::join) {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(_)) => Err("the template library panicked; see the log".to_owned()),
            Err(error) => Err(format!("no thread for the template: {error}")),
        }
    })
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
    environment.set_fuel(Some(MAX_STEPS));
    environment.add_function("namespace", Namespace::create);
    environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception")
            .with_source(Refusal(message)))
    });
    environment.add_filter("tojson", tojson);
    environment.add_test("iterable", is_iterable);
    environment
}

/// As in Jinja2, where none cannot be iterated.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// A template's own refusal, carried through the library's error.
#[derive(Debug, Error)]
#[error("{0}")]
struct Refusal(String);

fn refusal(error: &minijinja::Error) -> Option<String> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(Refusal(message)) = error.downcast_ref() {
            return Some(message.chars().take(MAX_REFUSAL_CHARS).collect());
        }
        cause = error.source();
    }
    None
}

/// The error with its line and its causes.
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

/// Bound on the values that `tojson` writes, counted along every path: a list that contains a list twice, 20
/// levels deep, has a million.
const MAX_JSON_VALUES: usize = 1_000_000;

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
    let mut left = MAX_JSON_VALUES;
    namespace::check(&value, namespace::MAX_DEPTH, &mut left)?;
    let value = serde_json::to_value(&value).map_err(|error| invalid(error.to_string()))?;
    Ok(json::Style { item, key, indent, ascii, sorted }.write(&value))
}

#[cfg(test)]
mod tests;
