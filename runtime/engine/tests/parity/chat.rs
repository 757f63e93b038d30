//! The chat templates inside the models' files, with the conversations of the recipe.

use serde_json::Value;
use std::time::UNIX_EPOCH;
use trustformers_model::chat::{ChatError, ChatRequest};

#[test]
fn chat_templates_give_the_texts_of_transformers() {
    let reference: Value = serde_json::from_str(include_str!("../reference/chat.json")).unwrap();
    let models = reference["models"].as_object().unwrap();
    assert_eq!(models.len(), 2);
    for (file, texts) in models {
        let Some(model) = super::model(file) else { continue };
        for (name, wanted) in texts.as_object().unwrap() {
            let conversation = &reference["conversations"][name];
            let list = |key: &str| conversation[key].as_array().cloned().unwrap_or_default();
            let request = ChatRequest {
                messages: &list("messages"),
                tools: &list("tools"),
                add_generation_prompt: conversation["add_generation_prompt"].as_bool().unwrap_or(true),
                variables: &serde_json::Map::new(),
                now: UNIX_EPOCH,
            };
            match (model.chat().unwrap().render(&request), wanted["error"].as_str()) {
                (Ok(text), None) => {
                    assert_eq!(text, wanted["text"].as_str().unwrap(), "{file} with {name}");
                    // The tokenizer reads the special tokens of the template as such.
                    let ids = model.tokenizer().encode_rendered(&text).unwrap();
                    let start = model.tokenizer().encode("<|im_start|>").unwrap()[0];
                    assert!(ids.iter().filter(|id| **id == start).count() >= request.messages.len().min(2));
                }
                (Err(ChatError::Failed(_)), Some("failed")) => {}
                (text, error) => panic!("{file} with {name}: {text:?} instead of {error:?}"),
            }
        }
    }
}
