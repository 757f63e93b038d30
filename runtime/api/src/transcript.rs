//! Builds the messages of a conversation from the parts that protocols with items or blocks send: chat
//! templates expect one message for all that the assistant said and called in a row.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

/// Between two texts of one message. Each is a unit; without a separator their words would touch.
const BETWEEN_TEXTS: &str = "\n";
/// Between two texts of the system message.
const BETWEEN_SYSTEM_TEXTS: &str = "\n\n";

/// Messages in the form of chat templates, in the making.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    messages: Vec<Value>,
    /// The assistant's message that further parts may join.
    assistant: Option<AssistantMessage>,
    /// The name of each function that was called, by the id of its call.
    called: HashMap<String, String>,
}

#[derive(Debug, Default)]
struct AssistantMessage {
    reasoning: String,
    content: String,
    calls: Vec<Value>,
}

/// A call of a function in the history.
#[derive(Debug)]
pub(crate) struct PastCall<'a> {
    /// Its id.
    pub(crate) id: &'a str,
    /// The name of the function.
    pub(crate) name: &'a str,
    /// The arguments by name.
    pub(crate) arguments: Map<String, Value>,
}

/// How a conversation ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LastMessage {
    /// With a message that asks for an answer, or with none.
    Other,
    /// With text of the assistant that can be continued.
    AssistantText,
    /// With a message of the assistant that holds no text, or calls without their results.
    AssistantWithoutText,
}

impl Transcript {
    /// A system message. Those at the beginning become one: most templates have room for one only.
    pub(crate) fn system(&mut self, text: &str) {
        self.end_assistant();
        match self.messages.as_mut_slice() {
            [only] if only["role"] == "system" => {
                let before = only["content"].as_str().unwrap_or_default();
                only["content"] = json!(format!("{before}{BETWEEN_SYSTEM_TEXTS}{text}"));
            }
            _ => self.messages.push(json!({"role": "system", "content": text})),
        }
    }

    /// A message of the user.
    pub(crate) fn user(&mut self, text: &str) {
        self.end_assistant();
        self.messages.push(json!({"role": "user", "content": text}));
    }

    /// What the assistant thought.
    pub(crate) fn assistant_reasoning(&mut self, text: &str) {
        // Templates write reasoning in front of the rest of a message.
        if self
            .assistant
            .as_ref()
            .is_some_and(|message| !message.content.is_empty() || !message.calls.is_empty())
        {
            self.end_assistant();
        }
        append(&mut self.assistant.get_or_insert_default().reasoning, text);
    }

    /// What the assistant wrote.
    pub(crate) fn assistant_text(&mut self, text: &str) {
        // Templates write calls after the text of a message.
        if self.assistant.as_ref().is_some_and(|message| !message.calls.is_empty()) {
            self.end_assistant();
        }
        append(&mut self.assistant.get_or_insert_default().content, text);
    }

    /// A call that the assistant made.
    pub(crate) fn assistant_call(&mut self, call: PastCall<'_>) {
        let PastCall { id, name, arguments } = call;
        self.called.insert(id.to_owned(), name.to_owned());
        let function = json!({"name": name, "arguments": arguments});
        let call = json!({"id": id, "type": "function", "function": function});
        self.assistant.get_or_insert_default().calls.push(call);
    }

    /// The result of a call. False where no call before it has this id.
    #[must_use]
    pub(crate) fn result(&mut self, call_id: &str, text: &str) -> bool {
        let Some(name) = self.called.get(call_id).cloned() else { return false };
        self.end_assistant();
        let message = json!({"role": "tool", "tool_call_id": call_id, "name": name, "content": text});
        self.messages.push(message);
        true
    }

    /// How the conversation ends now.
    pub(crate) fn last(&self) -> LastMessage {
        match &self.assistant {
            None => LastMessage::Other,
            Some(message) if message.calls.is_empty() && !message.content.is_empty() => {
                LastMessage::AssistantText
            }
            Some(_) => LastMessage::AssistantWithoutText,
        }
    }

    /// The messages.
    pub(crate) fn into_messages(mut self) -> Vec<Value> {
        self.end_assistant();
        self.messages
    }

    fn end_assistant(&mut self) {
        let Some(AssistantMessage { reasoning, content, calls }) = self.assistant.take() else { return };
        let mut message = json!({"role": "assistant", "content": content});
        if !reasoning.is_empty() {
            message["reasoning_content"] = json!(reasoning);
        }
        if !calls.is_empty() {
            message["tool_calls"] = json!(calls);
        }
        self.messages.push(message);
    }
}

fn append(whole: &mut String, text: &str) {
    if !whole.is_empty() {
        whole.push_str(BETWEEN_TEXTS);
    }
    whole.push_str(text);
}

/// Texts of one message, joined.
pub(crate) fn join(texts: &[&str]) -> String {
    texts.join(BETWEEN_TEXTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(id: &str) -> PastCall<'_> {
        PastCall { id, name: "f", arguments: Map::from_iter([("k".to_owned(), json!(1))]) }
    }

    fn call_json(id: &str) -> Value {
        json!({"id": id, "type": "function", "function": {"name": "f", "arguments": {"k": 1}}})
    }

    #[test]
    fn parts_of_one_answer_become_one_message() {
        let mut transcript = Transcript::default();
        transcript.user("Hi");
        transcript.assistant_reasoning("think");
        transcript.assistant_text("Let me look.");
        transcript.assistant_text("Now.");
        transcript.assistant_call(call("c1"));
        transcript.assistant_call(call("c2"));
        assert!(transcript.result("c2", "2"));
        assert!(transcript.result("c1", "1"));
        assert_eq!(
            transcript.into_messages(),
            [
                json!({"role": "user", "content": "Hi"}),
                json!({"role": "assistant", "content": "Let me look.\nNow.", "reasoning_content": "think",
                    "tool_calls": [call_json("c1"), call_json("c2")]}),
                json!({"role": "tool", "tool_call_id": "c2", "name": "f", "content": "2"}),
                json!({"role": "tool", "tool_call_id": "c1", "name": "f", "content": "1"}),
            ]
        );
    }

    #[test]
    fn text_after_calls_and_reasoning_after_text_begin_a_new_message() {
        let mut transcript = Transcript::default();
        transcript.assistant_call(call("c1"));
        transcript.assistant_text("done");
        transcript.assistant_reasoning("more");
        let messages = transcript.into_messages();
        assert_eq!(
            messages,
            [
                json!({"role": "assistant", "content": "", "tool_calls": [call_json("c1")]}),
                json!({"role": "assistant", "content": "done"}),
                json!({"role": "assistant", "content": "", "reasoning_content": "more"}),
            ]
        );
    }

    #[test]
    fn system_messages_at_the_beginning_become_one_and_later_ones_stay() {
        let mut transcript = Transcript::default();
        transcript.system("a");
        transcript.system("b");
        transcript.user("u");
        transcript.system("c");
        assert_eq!(
            transcript.into_messages(),
            [
                json!({"role": "system", "content": "a\n\nb"}),
                json!({"role": "user", "content": "u"}),
                json!({"role": "system", "content": "c"}),
            ]
        );
    }

    #[test]
    fn a_result_without_its_call_is_not_taken() {
        let mut transcript = Transcript::default();
        assert!(!transcript.result("c1", "1"));
        assert!(transcript.into_messages().is_empty());
    }

    #[test]
    fn the_end_of_a_conversation_is_known() {
        let mut transcript = Transcript::default();
        assert_eq!(transcript.last(), LastMessage::Other);
        transcript.assistant_reasoning("r");
        assert_eq!(transcript.last(), LastMessage::AssistantWithoutText);
        transcript.assistant_text("t");
        assert_eq!(transcript.last(), LastMessage::AssistantText);
        transcript.assistant_call(call("c1"));
        assert_eq!(transcript.last(), LastMessage::AssistantWithoutText);
        transcript.user("u");
        assert_eq!(transcript.last(), LastMessage::Other);
    }
}
