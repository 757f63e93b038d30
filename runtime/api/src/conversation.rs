//! What a request asks a model to continue: a text, token ids, or a conversation.

use serde_json::{Map, Value};

/// What to continue.
#[derive(Debug, Clone, PartialEq)]
pub enum Prompt {
    /// A text; special tokens spelled in it are recognised.
    Text(String),
    /// Token ids, used as they are.
    Tokens(Vec<u32>),
    /// Messages, rendered by the model's own chat template.
    Conversation(Box<Conversation>),
}

impl Default for Prompt {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Conversation> for Prompt {
    fn from(conversation: Conversation) -> Self {
        Self::Conversation(Box::new(conversation))
    }
}

impl Prompt {
    /// Whether there is nothing to continue: no text, no ids, no messages.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Text(text) => text.is_empty(),
            Self::Tokens(ids) => ids.is_empty(),
            Self::Conversation(conversation) => conversation.messages.is_empty(),
        }
    }

    /// The field that errors about it name.
    pub(crate) fn field(&self) -> &'static str {
        match self {
            Self::Text(_) | Self::Tokens(_) => "prompt",
            Self::Conversation(_) => "messages",
        }
    }
}

/// The messages of a conversation, with what else a chat template reads.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversation {
    /// The messages as chat templates read them, oldest first: objects with `role` (`system`, `user`,
    /// `assistant` or `tool`) and `content`, a text. An assistant's message may have `reasoning_content` and
    /// `tool_calls: [{"id", "type": "function", "function": {"name", "arguments"}}]`, whose arguments are an
    /// object; a tool's message has `tool_call_id` and may have `name`.
    pub messages: Vec<Value>,
    /// Functions that the model may call, each `{"type": "function", "function": {"name", "description",
    /// "parameters"}}`.
    pub tools: Vec<Value>,
    /// Whether the answer is a call.
    pub tool_choice: ToolChoice,
    /// Whether an answer may hold more than one call.
    pub parallel_tool_calls: bool,
    /// Further variables of the template, such as `enable_thinking`.
    pub variables: Map<String, Value>,
    /// Whether the last message is the assistant's and is continued, without a new header.
    pub continue_last: bool,
}

/// Whether an answer is a call of a function.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ToolChoice {
    /// The model decides.
    #[default]
    Auto,
    /// It is none.
    None,
    /// It is a call of any function.
    Required,
    /// It is a call of this function.
    Named(String),
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_prompt_without_content_is_empty_in_every_form() {
        let mut conversation = Conversation::default();
        let empty = [Prompt::from(""), Prompt::Tokens(Vec::new()), conversation.clone().into()];
        assert!(empty.iter().all(Prompt::is_empty));
        conversation.messages.push(json!({"role": "user", "content": ""}));
        let given = [Prompt::from("a".to_owned()), Prompt::Tokens(vec![0]), conversation.into()];
        assert!(!given.iter().any(Prompt::is_empty));
        assert_eq!(given.each_ref().map(Prompt::field), ["prompt", "prompt", "messages"]);
    }
}
