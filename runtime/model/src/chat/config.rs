//! The chat template of a checkpoint: a key of `tokenizer_config.json`, or a file of its own.

use super::{SpecialTokens, TOOLS};
use crate::checkpoint::{CheckpointFiles, TOKENIZER_CONFIG};
use crate::error::LoadError;
use serde::Deserialize;

/// The file of the template in newer checkpoints.
const TEMPLATE: &str = "chat_template.jinja";

/// The file of the template for conversations with tools, in newer checkpoints.
const TOOLS_TEMPLATE: &str = "additional_chat_templates/tool_use.jinja";

/// The name of the template that applies to conversations without tools.
const DEFAULT: &str = "default";

#[derive(Deserialize, Default)]
#[serde(default)]
struct Config {
    chat_template: Option<Templates>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    unk_token: Option<Token>,
    pad_token: Option<Token>,
}

/// One template, or several with names.
#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

/// A token's text, or an object around it.
#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Object { content: String },
}

impl Token {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Object { content: text } => text,
        }
    }
}

/// The template, if the checkpoint has one, and the special tokens that it may print.
pub(crate) fn of_checkpoint(files: &CheckpointFiles) -> Result<(Option<String>, SpecialTokens), LoadError> {
    let config: Config = files.optional_json(TOKENIZER_CONFIG)?.unwrap_or_default();
    let own_file = files.optional_text(TEMPLATE)?;
    let in_config = config.chat_template.and_then(|templates| match templates {
        Templates::One(template) => Some(template),
        Templates::Named(templates) => named(templates, DEFAULT),
    });
    let special = SpecialTokens {
        bos_token: config.bos_token.map(Token::text),
        eos_token: config.eos_token.map(Token::text),
        unk_token: config.unk_token.map(Token::text),
        pad_token: config.pad_token.map(Token::text),
    };
    Ok((own_file.or(in_config), special))
}

/// The template for conversations with tools, where it is another one.
pub(crate) fn tools_of_checkpoint(files: &CheckpointFiles) -> Result<Option<String>, LoadError> {
    let config: Config = files.optional_json(TOKENIZER_CONFIG)?.unwrap_or_default();
    let own_file = files.optional_text(TOOLS_TEMPLATE)?;
    let in_config = config.chat_template.and_then(|templates| match templates {
        Templates::One(_) => None,
        Templates::Named(templates) => named(templates, TOOLS),
    });
    Ok(own_file.or(in_config))
}

fn named(templates: Vec<Named>, name: &str) -> Option<String> {
    templates.into_iter().find(|named| named.name == name).map(|named| named.template)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(files: &[(&str, &str)]) -> (Option<String>, SpecialTokens) {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in files {
            std::fs::write(folder.path().join(name), content).unwrap();
        }
        of_checkpoint(&CheckpointFiles::of_folder(folder.path()).unwrap()).unwrap()
    }

    #[test]
    fn templates_are_in_the_configuration_or_a_file() {
        assert_eq!(read(&[]), (None, SpecialTokens::default()));
        let one = r#"{"chat_template": "a", "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false},
                      "pad_token": null}"#;
        let (template, special) = read(&[(TOKENIZER_CONFIG, one)]);
        assert_eq!(template.as_deref(), Some("a"));
        assert_eq!(special.bos_token.as_deref(), Some("<s>"));
        assert_eq!((special.eos_token.as_deref(), special.pad_token), (Some("</s>"), None));
        let named = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        assert_eq!(read(&[(TOKENIZER_CONFIG, named)]).0.as_deref(), Some("d"));
        assert_eq!(read(&[(TOKENIZER_CONFIG, named), (TEMPLATE, "f")]).0.as_deref(), Some("f"));
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(TOKENIZER_CONFIG), named).unwrap();
        let tools = || tools_of_checkpoint(&CheckpointFiles::of_folder(folder.path()).unwrap()).unwrap();
        assert_eq!(tools().as_deref(), Some("t"));
        std::fs::create_dir(folder.path().join("additional_chat_templates")).unwrap();
        std::fs::write(folder.path().join(TOOLS_TEMPLATE), "file").unwrap();
        assert_eq!(tools().as_deref(), Some("file"));
    }
}
