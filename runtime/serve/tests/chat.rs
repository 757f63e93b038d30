//! `trustformers-serve chat` as users run it, with a pipe for the terminal.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod models;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use trustformers_model::seeded::SeededModel;

/// Runs the program with these lines on stdin.
fn chat(model: &Path, arguments: &[&str], typed: &str) -> Output {
    let mut program = Command::new(env!("CARGO_BIN_EXE_trustformers-serve"));
    program.env_remove("RUST_LOG").arg("chat").arg("--model").arg(model).args(arguments);
    let mut child =
        program.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A program that ends early closes the pipe: its status and stderr say why.
    let _ = child.stdin.take().unwrap().write_all(typed.as_bytes());
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn the_real_model_answers_with_the_conversation_in_mind() {
    let Some(model) = models::real_model() else { return };
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("chat.json");
    let typed =
        format!("How many legs has a spider?\nAnd how many has an ant?\n/undo\n/save {}\n", file.display());
    let output = chat(&model, &["--temperature", "0", "--max-tokens", "24"], &typed);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let answers = text(&output.stdout);
    assert!(answers.lines().next().unwrap().contains('8'), "{answers}");
    assert!(answers.lines().count() >= 2, "{answers}");
    let saved: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let roles: Vec<&str> =
        saved.as_array().unwrap().iter().map(|message| message["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["user", "assistant"], "/undo took one turn back");
    assert!(answers.starts_with(saved[1]["content"].as_str().unwrap()), "{saved}");
}

#[test]
fn a_model_that_cannot_chat_is_named_before_the_first_message() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    std::fs::write(&file, SeededModel::default().gguf()).unwrap();
    let output = chat(&file, &[], "Hello\n");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("template"), "{}", text(&output.stderr));
    assert!(output.stdout.is_empty());

    let missing = chat(&folder.path().join("none.gguf"), &[], "");
    assert_eq!(missing.status.code(), Some(1));
    assert!(text(&missing.stderr).contains("none.gguf"), "{}", text(&missing.stderr));
}
