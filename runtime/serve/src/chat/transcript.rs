//! What was said: instructions, messages and answers, in the words of `/v1/chat/completions`.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use trustformers_api::{Conversation, CountRequest};

/// Bytes of a saved conversation. The longest context is 128 Ki tokens, half a MiB of text at the customary
/// 4 bytes a token; this leaves room for escapes and for longer contexts.
const MAX_FILE_BYTES: u64 = 4 * 1024 * 1024;

/// A file that is no conversation, or that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {why}", path.display())]
pub(crate) struct TranscriptError {
    path: PathBuf,
    why: String,
}

/// A conversation as it grows.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Transcript {
    system: Option<String>,
    /// Messages of the user and answers in turn.
    messages: Vec<Value>,
}

impl Transcript {
    /// A conversation with these instructions.
    pub(crate) fn new(system: Option<String>) -> Self {
        Self { system, messages: Vec::new() }
    }

    /// A message of the user.
    pub(crate) fn ask(&mut self, text: &str) {
        self.messages.push(json!({"role": "user", "content": text}));
    }

    /// The answer to the last message, whole or interrupted.
    pub(crate) fn answer(&mut self, text: &str) {
        self.messages.push(json!({"role": "assistant", "content": text}));
    }

    /// Forgets what was said; the instructions stay.
    pub(crate) fn clear(&mut self) {
        self.messages.clear();
    }

    /// Sets or removes the instructions.
    pub(crate) fn set_system(&mut self, text: Option<String>) {
        self.system = text;
    }

    /// Takes the last answer back; false where no message would be left to answer.
    pub(crate) fn drop_answer(&mut self) -> bool {
        if self.messages.last().is_some_and(|message| message["role"] == "assistant") {
            self.messages.pop();
        }
        self.messages.last().is_some_and(|message| message["role"] == "user")
    }

    /// Takes the last message of the user back, with what followed it; false where there is none.
    pub(crate) fn drop_turn(&mut self) -> bool {
        let last = self.messages.iter().rposition(|message| message["role"] == "user");
        if let Some(last) = last {
            self.messages.truncate(last);
        }
        last.is_some()
    }

    /// What the model is asked.
    pub(crate) fn conversation(&self) -> Conversation {
        Conversation { messages: self.all(), ..Conversation::default() }
    }

    /// What is counted: the conversation as it would be asked now.
    pub(crate) fn counted(&self) -> CountRequest {
        if self.messages.is_empty() {
            return self.probe();
        }
        CountRequest { model: None, revision: None, prompt: self.conversation().into() }
    }

    /// The conversation with one short message, which any model that chats can render.
    pub(crate) fn probe(&self) -> CountRequest {
        let mut with_message = Self { system: self.system.clone(), messages: Vec::new() };
        with_message.ask("Hello");
        CountRequest { model: None, revision: None, prompt: with_message.conversation().into() }
    }

    /// Writes the messages as a JSON array.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn save(&self, path: &Path) -> Result<(), TranscriptError> {
        let text = format!("{:#}\n", Value::from(self.all()));
        std::fs::write(path, text).map_err(|error| failed(path, format!("cannot be written: {error}")))
    }

    /// Reads what [`Self::save`] wrote.
    ///
    /// # Errors
    /// When the file cannot be read, or holds something else.
    pub(crate) fn load(path: &Path) -> Result<Self, TranscriptError> {
        let unreadable = |error: std::io::Error| failed(path, format!("cannot be read: {error}"));
        let length = std::fs::metadata(path).map_err(unreadable)?.len();
        if length > MAX_FILE_BYTES {
            return Err(failed(path, format!("has {length} bytes, more than {MAX_FILE_BYTES}")));
        }
        let bytes = std::fs::read(path).map_err(unreadable)?;
        let messages: Vec<Value> = serde_json::from_slice(&bytes)
            .map_err(|error| failed(path, format!("is no JSON array of messages: {error}")))?;
        let mut transcript = Self::default();
        for (index, message) in messages.into_iter().enumerate() {
            let text = message["content"].as_str().map(str::to_owned);
            match (message["role"].as_str(), text) {
                (Some("system"), Some(text)) if index == 0 => transcript.system = Some(text),
                (Some("user"), Some(text)) => transcript.ask(&text),
                (Some("assistant"), Some(text)) => transcript.answer(&text),
                _ => {
                    let why = format!(
                        "message {index} is none of this chat: each has a role (system first, then user and \
                         assistant) and a content that is a text"
                    );
                    return Err(failed(path, why));
                }
            }
        }
        Ok(transcript)
    }

    fn all(&self) -> Vec<Value> {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        system.chain(self.messages.iter().cloned()).collect()
    }
}

fn failed(path: &Path, why: String) -> TranscriptError {
    TranscriptError { path: path.to_owned(), why }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn two_turns() -> Transcript {
        let mut transcript = Transcript::new(Some("Be brief.".to_owned()));
        for (question, answer) in [("One?", "1"), ("Two?", "2")] {
            transcript.ask(question);
            transcript.answer(answer);
        }
        transcript
    }

    fn roles(transcript: &Transcript) -> Vec<String> {
        let all = transcript.conversation().messages;
        all.iter().map(|message| message["role"].as_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn answers_and_turns_are_taken_back() {
        let mut transcript = two_turns();
        assert!(transcript.drop_answer());
        assert_eq!(roles(&transcript), ["system", "user", "assistant", "user"]);
        assert!(transcript.drop_turn() && transcript.drop_turn());
        assert_eq!(roles(&transcript), ["system"]);
        assert!(!transcript.drop_turn() && !transcript.drop_answer());
    }

    #[test]
    fn instructions_outlive_a_new_conversation() {
        let mut transcript = two_turns();
        transcript.clear();
        assert_eq!(roles(&transcript), ["system"]);
        transcript.set_system(None);
        assert!(roles(&transcript).is_empty());
    }

    #[test]
    fn a_saved_conversation_is_read_again_and_another_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("chat.json");
        two_turns().save(&file).unwrap();
        assert_eq!(Transcript::load(&file).unwrap(), two_turns());
        for wrong in ["{}", r#"[{"role": "tool", "content": "x"}]"#, r#"[{"role": "user", "content": 1}]"#] {
            std::fs::write(&file, wrong).unwrap();
            let error = Transcript::load(&file).unwrap_err().to_string();
            assert!(error.contains("chat.json"), "{error}");
        }
        assert!(Transcript::load(&folder.path().join("none")).is_err());
    }
}
