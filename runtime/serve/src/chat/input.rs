//! What the user types: messages, commands that begin with `/`, and messages of several lines.

use std::path::PathBuf;

/// The commands, for `/help`.
pub(crate) const HELP: &str = "\
/help           this list
/system TEXT    sets the instructions of the conversation; without a text removes them
/clear          begins a new conversation; the instructions stay
/retry          answers the last message again
/undo           takes the last message and its answer back
/tokens         how many tokens the conversation has
/save FILE      writes the conversation as JSON, the messages of /v1/chat/completions
/load FILE      reads such a file
/exit           ends, as Ctrl-D does
\"\"\"             begins a message of several lines, and ends it
//TEXT          a message that begins with /";

/// Begins and ends a message of several lines.
const BLOCK: &str = "\"\"\"";

/// A command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ChatCommand {
    /// Lists the commands.
    Help,
    /// Sets the instructions; none: removes them.
    System(Option<String>),
    /// Begins a new conversation.
    Clear,
    /// Answers the last message again.
    Retry,
    /// Takes the last message back.
    Undo,
    /// Counts the tokens of the conversation.
    Tokens,
    /// Writes the conversation to a file.
    Save(PathBuf),
    /// Reads the conversation from a file.
    Load(PathBuf),
    /// Ends.
    Exit,
}

/// What was typed, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ChatInput {
    /// An empty line.
    Nothing,
    /// A message to the model.
    Message(String),
    /// A command.
    Command(ChatCommand),
    /// No such command, or one without what it needs. The text says what to type.
    Unknown(String),
}

/// Puts lines together.
#[derive(Debug, Default)]
pub(crate) struct InputLines {
    /// The lines of a message whose end is not there yet.
    block: Option<Vec<String>>,
}

impl InputLines {
    /// Whether a message of several lines has begun.
    pub(crate) fn is_open(&self) -> bool {
        self.block.is_some()
    }

    /// Takes a line; gives what is complete with it.
    pub(crate) fn push(&mut self, line: &str) -> Option<ChatInput> {
        if let Some(lines) = &mut self.block {
            let Some(last) = line.trim_end().strip_suffix(BLOCK) else {
                lines.push(line.to_owned());
                return None;
            };
            if !last.is_empty() {
                lines.push(last.to_owned());
            }
            let text = lines.join("\n");
            self.block = None;
            return Some(message(&text));
        }
        let Some(first) = line.trim_start().strip_prefix(BLOCK) else { return Some(read(line)) };
        // A message in quotes on one line.
        if let Some(whole) = first.trim_end().strip_suffix(BLOCK) {
            return Some(message(whole));
        }
        self.block = Some(if first.is_empty() { Vec::new() } else { vec![first.to_owned()] });
        None
    }
}

fn message(text: &str) -> ChatInput {
    if text.trim().is_empty() { ChatInput::Nothing } else { ChatInput::Message(text.to_owned()) }
}

fn read(line: &str) -> ChatInput {
    let line = line.trim();
    let Some(rest) = line.strip_prefix('/') else { return message(line) };
    if rest.starts_with('/') {
        return message(rest);
    }
    let (word, value) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let value = value.trim();
    let path = |command: fn(PathBuf) -> ChatCommand| {
        if value.is_empty() {
            ChatInput::Unknown(format!("/{word} needs a file, such as /{word} chat.json"))
        } else {
            ChatInput::Command(command(PathBuf::from(value)))
        }
    };
    let alone = |command: ChatCommand| {
        if value.is_empty() {
            ChatInput::Command(command)
        } else {
            ChatInput::Unknown(format!("/{word} takes nothing; a message that begins with / is typed as //"))
        }
    };
    match word {
        "help" | "?" => alone(ChatCommand::Help),
        "system" => ChatInput::Command(ChatCommand::System((!value.is_empty()).then(|| value.to_owned()))),
        "clear" => alone(ChatCommand::Clear),
        "retry" => alone(ChatCommand::Retry),
        "undo" => alone(ChatCommand::Undo),
        "tokens" => alone(ChatCommand::Tokens),
        "save" => path(ChatCommand::Save),
        "load" => path(ChatCommand::Load),
        "exit" | "quit" | "bye" => alone(ChatCommand::Exit),
        _ => ChatInput::Unknown(format!(
            "there is no command /{word}; /help lists them, and a message that begins with / is typed as //"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(lines: &[&str]) -> Vec<Option<ChatInput>> {
        let mut input = InputLines::default();
        lines.iter().map(|line| input.push(line)).collect()
    }

    fn one(line: &str) -> ChatInput {
        InputLines::default().push(line).expect("one line")
    }

    #[test]
    fn a_line_is_a_message_and_a_slash_begins_a_command() {
        assert_eq!(one(" Hello there "), ChatInput::Message("Hello there".to_owned()));
        assert_eq!(one("   "), ChatInput::Nothing);
        assert_eq!(one("/exit"), ChatInput::Command(ChatCommand::Exit));
        assert_eq!(
            one("/system Be brief."),
            ChatInput::Command(ChatCommand::System(Some("Be brief.".to_owned())))
        );
        assert_eq!(one("/system"), ChatInput::Command(ChatCommand::System(None)));
        assert_eq!(one("/save a b.json"), ChatInput::Command(ChatCommand::Save(PathBuf::from("a b.json"))));
        assert_eq!(one("//etc/passwd is a file"), ChatInput::Message("/etc/passwd is a file".to_owned()));
    }

    #[test]
    fn a_wrong_command_says_what_to_type() {
        for (line, words) in [("/sing", "/help"), ("/save", "/save chat.json"), ("/clear all", "//")] {
            let ChatInput::Unknown(why) = one(line) else { panic!("{line} was accepted") };
            assert!(why.contains(words), "{why}");
        }
    }

    #[test]
    fn quotes_keep_the_lines_of_a_message_together() {
        let typed = all(&["\"\"\"fn main() {", "  /exit", "}\"\"\"", "next"]);
        let text = "fn main() {\n  /exit\n}";
        let message = |text: &str| Some(ChatInput::Message(text.to_owned()));
        assert_eq!(typed, [None, None, message(text), message("next")]);
        assert_eq!(all(&["\"\"\"", "one", "\"\"\""]), [None, None, message("one")]);
        assert_eq!(all(&["\"\"\"one\"\"\""]), [message("one")]);
        assert_eq!(all(&["\"\"\"", "\"\"\""]), [None, Some(ChatInput::Nothing)]);
    }
}
